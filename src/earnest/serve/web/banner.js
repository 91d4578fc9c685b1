// What the pages say when something does not work, such as the server: a banner, and the question for the key.

import { apiKey, Failure, keyIsKept, setApiKey } from "./api.js";
import { byId, el } from "./dom.js";

/** Say above the page what did not work, and what helps. `buttons`: label to what it does. */
export function showProblem(title, remedy, buttons) {
  byId("banner").replaceChildren(
    el(
      "div",
      { class: "problem" },
      el("p", {}, el("strong", { text: title }), " ", remedy),
      el(
        "p",
        { class: "buttons" },
        ...Object.entries(buttons).map(([text, act]) => el("button", { type: "button", class: "link", text, on: { click: act } })),
      ),
    ),
  );
}

/**
 * Say what is wrong with the server; ask for the key if that is what is missing.
 * @param {Error} error
 * @param {object} acts `again()` tries again, `enterKey(failure)` asks for the key.
 */
export function showFailure(error, { again, enterKey }) {
  const failure = error instanceof Failure ? error : new Failure("other", "The page failed.", "Reload it.");
  showProblem(failure.title, failure.remedy, {
    ...(failure.kind === "key" && { "Enter the key": () => enterKey(failure) }),
    "Try again": again,
  });
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
