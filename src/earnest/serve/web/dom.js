// Making elements. Text is always text: nothing here parses markup.

/**
 * An element.
 * @param {string} tag
 * @param {object} [options] `text`, `on` ({event: listener}); everything else is an attribute
 *   (false, null and undefined: left out; true: empty).
 * @param {...(Node|string|null)} children
 */
export function el(tag, options = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "text") made.textContent = value;
    else if (name === "on") {
      for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    } else setAttribute(made, name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Set an attribute, or remove it: false, null and undefined do; true makes it empty. */
export function setAttribute(element, name, value) {
  if (value === false || value === null || value === undefined) element.removeAttribute(name);
  else element.setAttribute(name, value === true ? "" : String(value));
}

/** One of the pictures that index.html defines. */
export function icon(name) {
  const namespace = "http://www.w3.org/2000/svg";
  const made = document.createElementNS(namespace, "svg");
  made.setAttribute("class", "icon");
  made.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(namespace, "use");
  use.setAttribute("href", `#i-${name}`);
  made.append(use);
  return made;
}

/** A button that is only a picture; its label is read out and shown as a hint. */
export function iconButton(name, label, listener, options = {}) {
  return el(
    "button",
    { type: "button", class: "quiet", "aria-label": label, title: label, on: { click: listener }, ...options },
    icon(name),
  );
}

export const byId = (id) => document.getElementById(id);

/** Copy text; also where the browser offers no clipboard (plain http on another machine). */
export async function copy(text) {
  if (navigator.clipboard && window.isSecureContext) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const host = document.querySelector("dialog[open]") ?? document.body;
  const area = el("textarea", { class: "offscreen", readonly: true, "aria-hidden": "true" });
  area.value = text;
  const before = document.activeElement;
  host.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
  before?.focus?.();
}

/** A copy button that says so when it is done. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    await copy(text());
    button.replaceChildren(icon("check"));
    announce("Copied");
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

/** Let screen readers say something. */
export function announce(text) {
  byId("announcer").textContent = text;
}

let toastTimer = 0;

/** A short notice at the bottom, with at most one thing to do about it. */
export function toast(text, action = null) {
  const shown = byId("toast");
  const hide = () => shown.replaceChildren();
  clearTimeout(toastTimer);
  shown.replaceChildren(
    el(
      "div",
      { class: "toast" },
      el("span", { text }),
      action &&
        el("button", {
          type: "button",
          class: "link",
          text: action.label,
          on: {
            click: () => {
              hide();
              action.run();
            },
          },
        }),
    ),
  );
  toastTimer = setTimeout(hide, 8000);
}

/** Let the reader save text as a file. */
export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = el("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
