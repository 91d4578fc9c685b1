// What both pages say when the server does not answer them: a banner, and the question for the key.

import { apiKey, Failure, keyIsKept, setApiKey } from "./api.js";
import { byId, el } from "./dom.js";

/**
 * Say above the page what went wrong; ask for the key if that is what is missing.
 * @param {Error} error
 * @param {object} acts `again()` tries again, `enterKey(failure)` asks for the key.
 */
export function showFailure(error, { again, enterKey }) {
  const failure = error instanceof Failure ? error : new Failure("other", "The page failed.", "Reload it.");
  const button = (text, act) => el("button", { type: "button", class: "link", text, on: { click: act } });
  byId("banner").replaceChildren(
    el(
      "div",
      { class: "problem" },
      el("p", {}, el("strong", { text: failure.title }), " ", failure.remedy),
      el(
        "p",
        { class: "buttons" },
        ...(failure.kind === "key" ? [button("Enter the key", () => enterKey(failure))] : []),
        button("Try again", again),
      ),
    ),
  );
  if (failure.kind === "key") enterKey(failure);
}

/** Ask for the API key, because of a failure or of nothing; `onDone` is called when one was given. */
export function askKey(failure, onDone) {
  const reason = failure ? `${failure.title} ${failure.remedy}` : "It goes to this server only, with every call.";
  const dialog = byId("key");
  const field = el("input", {
    type: "password",
    id: "key-field",
    autocomplete: "off",
    spellcheck: "false",
    placeholder: "API key",
    "aria-label": "API key",
    "aria-describedby": "key-reason",
  });
  field.value = apiKey();
  const keep = el("input", { type: "checkbox", id: "key-keep" });
  keep.checked = keyIsKept();
  dialog.replaceChildren(
    el(
      "form",
      {
        on: {
          submit: (event) => {
            event.preventDefault();
            setApiKey(field.value, keep.checked);
            dialog.close();
            onDone();
          },
        },
      },
      el("h2", { id: "key-title", text: "API key" }),
      el("p", { class: "note", id: "key-reason", text: reason }),
      field,
      el("label", { class: "check" }, keep, "Remember it on this device"),
      el(
        "div",
        { class: "buttons" },
        el("button", { type: "button", class: "plain-button", text: "Cancel", on: { click: () => dialog.close() } }),
        el("button", { type: "submit", class: "main-button", text: "Use it" }),
      ),
    ),
  );
  if (!dialog.open) dialog.showModal();
  field.focus();
  field.select();
}
