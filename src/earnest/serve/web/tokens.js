// An answer token by token: how likely each was, and on click what else could have stood there.

import { el } from "./dom.js";

/** A token's text for the eye: bytes of half a character as hex, line ends visible. */
export function shownToken(text) {
  if (text === "") return "∅";
  const bytes = /^bytes:((?:\\x[0-9a-f]{2})+)$/.exec(text);
  if (bytes) return `‹${bytes[1].replaceAll("\\x", " ").trim()}›`;
  return text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "·");
}

const percent = (logprob) => {
  const share = 100 * Math.exp(logprob);
  return share >= 99.95 ? "100 %" : share >= 0.1 ? `${share.toFixed(1)} %` : "< 0.1 %";
};

// Five tints, from "as good as sure" to "a surprise".
const tintOf = (logprob) => {
  const share = Math.exp(logprob);
  return share > 0.9 ? 0 : share > 0.6 ? 1 : share > 0.3 ? 2 : share > 0.1 ? 3 : 4;
};

/** The view. Arrow keys go from token to token. */
export function tokenView(tokens) {
  const detail = el("div", { class: "alternatives", role: "status", hidden: true });
  const text = el("div", { class: "tokens", role: "group", "aria-label": "Tokens; arrow keys move" });
  const view = el(
    "div",
    { class: "probabilities" },
    el("p", { class: "note", text: "The stronger the tint, the less likely the token was. Choose one to see what else the model considered." }),
    text,
    detail,
  );
  let chosen = null;
  tokens.forEach((token, i) => {
    // Not buttons: those do not flow like text.
    const span = el("span", {
      role: "button",
      class: `token tint-${tintOf(token[1])}`,
      tabindex: i === 0 ? 0 : -1,
      "aria-label": `${shownToken(token[0])}, ${percent(token[1])}`,
    });
    const lines = (/^bytes:/.test(token[0]) ? shownToken(token[0]) : token[0]).split("\n");
    for (const line of lines.slice(0, -1)) span.append(`${line}⏎`, el("br"));
    span.append(lines.at(-1));
    text.append(span);
  });
  const spans = [...text.querySelectorAll(".token")];

  function choose(span) {
    const again = span === chosen;
    chosen?.removeAttribute("aria-pressed");
    chosen = again ? null : span;
    detail.hidden = again;
    if (again) return;
    span.setAttribute("aria-pressed", "true");
    detail.replaceChildren(...alternatives(tokens[spans.indexOf(span)]));
    // Below the token, within the view.
    const [outer, inner] = [view.getBoundingClientRect(), span.getClientRects()[0]];
    const left = Math.max(0, Math.min(inner.left - outer.left, outer.width - detail.offsetWidth));
    detail.style.left = `${left}px`;
    detail.style.top = `${inner.bottom - outer.top + 6}px`;
    detail.scrollIntoView({ block: "nearest" });
  }

  text.addEventListener("click", (event) => {
    const span = event.target.closest(".token");
    if (span) {
      focus(span);
      choose(span);
    }
  });
  text.addEventListener("keydown", (event) => {
    const at = spans.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (event.key === "Escape" && chosen) {
      event.stopPropagation();
      choose(chosen);
    } else if (at !== -1 && (event.key === "Enter" || event.key === " ")) {
      event.preventDefault();
      choose(spans[at]);
    } else if (at !== -1 && spans[to]) {
      event.preventDefault();
      focus(spans[to]);
      if (chosen && chosen !== spans[to]) choose(spans[to]);
    }
  });

  function focus(span) {
    for (const other of text.querySelectorAll(".token[tabindex='0']")) other.tabIndex = -1;
    span.tabIndex = 0;
    span.focus({ preventScroll: true });
  }
  return view;
}

function alternatives([text, logprob, top]) {
  const rows = top.some(([other]) => other === text) ? top : [...top, [text, logprob]];
  return [
    el(
      "ol",
      {},
      ...rows.map(([other, value]) => {
        const bar = el("span", { class: "bar", "aria-hidden": "true" });
        bar.style.width = `${Math.max(1, 100 * Math.exp(value))}%`;
        return el(
          "li",
          { class: other === text ? "taken" : null },
          el("code", { text: shownToken(other) }),
          el("span", { class: "track" }, bar),
          el("span", { class: "share", text: percent(value) }),
        );
      }),
    ),
    el("p", { class: "note", text: "Before temperature and penalties." }),
  ];
}
