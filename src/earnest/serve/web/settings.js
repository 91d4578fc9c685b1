// Settings: the system prompt of the conversation, and what holds for all: sampling, thoughts, looks.

import { apiKey, keyIsKept } from "./api.js";
import { byId, el, iconButton } from "./dom.js";
import { remember, remembered } from "./store.js";

/** Sampling parameters that can be set. Empty means: as the model's authors recommend. */
export const FIELDS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, hint: "0 always takes the likeliest token." },
  { name: "top_p", label: "Top-p", min: 0.01, max: 1, step: 0.01, hint: "The likeliest tokens that together reach this share." },
  { name: "top_k", label: "Top-k", min: 0, step: 1, hint: "Only so many of the likeliest tokens; 0: all." },
  { name: "min_p", label: "Min-p", min: 0, max: 1, step: 0.01, hint: "Nothing less likely than this share of the likeliest." },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.5, max: 2, step: 0.01, hint: "Above 1: less of what was there before." },
  { name: "max_tokens", label: "Most tokens", min: 1, step: 1, hint: "Length of an answer." },
  { name: "seed", label: "Seed", min: 0, max: Number.MAX_SAFE_INTEGER, step: 1, hint: "The same seed gives the same answer." },
];

/** What is set now. `thinking`: true, false, or null: as the model likes. */
export function settings() {
  const kept = remembered("sampling", {});
  const sampling = {};
  for (const { name, min, max } of FIELDS) {
    const value = kept[name];
    if (typeof value === "number" && value >= min && value <= (max ?? Infinity)) sampling[name] = value;
  }
  return { sampling, probabilities: remembered("probabilities", true) !== false, thinking: remembered("thinking") };
}

/** What differs from the model's defaults, in a few words. */
export function changes() {
  const { sampling, thinking } = settings();
  const parts = FIELDS.filter(({ name }) => name in sampling).map(({ name, label }) => `${label.toLowerCase()} ${sampling[name]}`);
  if (thinking !== null) parts.push(thinking ? "thinking on" : "thinking off");
  return parts.join(" · ");
}

/** A dialog's title bar. */
export function sheetHead(id, title, dialog) {
  return el(
    "div",
    { class: "sheet-head" },
    el("h2", { id, text: title }),
    iconButton("close", "Close", () => dialog.close()),
  );
}

/** A press beside a dialog closes it. */
export function closeByScrim(dialog) {
  dialog.addEventListener("pointerdown", ({ target, clientX: x, clientY: y }) => {
    const { left, right, top, bottom } = dialog.getBoundingClientRect();
    if (target === dialog && (x < left || x > right || y < top || y > bottom)) dialog.close();
  });
}

/**
 * Show the settings.
 * @param {object} context `served` (or null), `conversation`, and what to call: onSystem(text),
 *   onChange(), onKey(), exportAll(), chooseFile(), deleteAll().
 */
export function openSettings(context) {
  const dialog = byId("settings");
  const { served, conversation } = context;
  const defaults = served?.defaults ?? {};
  dialog.replaceChildren(
    sheetHead("settings-title", "Settings", dialog),
    el(
      "div",
      { class: "sheet-body" },
      ...(conversation.kind === "chat" ? [systemPart(conversation, context)] : []),
      samplingPart(defaults, served, conversation, context),
      looksPart(),
      keyPart(context),
      dataPart(dialog, context),
      keyboardPart(),
    ),
  );
  dialog.showModal();
}

function part(title, note, ...children) {
  return el("section", {}, el("h3", { text: title }), ...(note ? [el("p", { class: "note", text: note })] : []), ...children);
}

function systemPart(conversation, { onSystem }) {
  const area = el("textarea", {
    id: "system",
    rows: 4,
    "aria-label": "System prompt",
    placeholder: "What the model should know or be, in every answer of this conversation",
    on: { change: () => onSystem(area.value) },
  });
  area.value = conversation.system;
  return part("System prompt", "Of this conversation.", area);
}

function samplingPart(defaults, served, conversation, { onChange }) {
  const current = settings().sampling;
  const kept = (name, value) => {
    const all = { ...settings().sampling };
    if (value === null) delete all[name];
    else all[name] = value;
    remember("sampling", all);
    onChange();
  };
  const usual = (name) => {
    if (name === "seed") return "random";
    if (name === "max_tokens") return conversation.kind === "text" ? "256" : "no limit";
    return name in defaults ? String(defaults[name]) : "model's";
  };
  const inputs = [];
  const rows = FIELDS.map(({ name, label, min, max, step, hint }) => {
    const input = el("input", {
      type: "number",
      id: `set-${name}`,
      inputmode: step === 1 ? "numeric" : "decimal",
      min,
      max,
      step: step === 1 ? 1 : "any",
      placeholder: usual(name),
      "aria-describedby": `about-${name}`,
      on: {
        change: () => {
          if (input.checkValidity()) kept(name, input.value === "" ? null : Number(input.value));
          else input.reportValidity();
        },
      },
    });
    input.value = current[name] ?? "";
    inputs.push(input);
    return el(
      "div",
      { class: "field" },
      el("label", { for: `set-${name}`, text: label }),
      input,
      el("p", { class: "note", id: `about-${name}`, text: hint }),
    );
  });
  const reset = el("button", {
    type: "button",
    class: "link",
    text: "Back to the model's",
    on: {
      click: () => {
        remember("sampling", null);
        for (const input of inputs) input.value = "";
        onChange();
      },
    },
  });
  const extra = [];
  if (served?.thinks) {
    const choice = choose(
      "thinking",
      "Thinking",
      [["", "Model's way"], ["true", "On"], ["false", "Off"]],
      JSON.stringify(settings().thinking) === "null" ? "" : String(settings().thinking),
      (value) => {
        remember("thinking", value === "" ? null : value === "true");
        onChange();
      },
    );
    extra.push(choice);
  }
  extra.push(
    check("probabilities", "Keep token probabilities", settings().probabilities, (on) => remember("probabilities", on)),
  );
  return part("Sampling", "For all conversations. Empty fields are as the model's authors recommend.", ...rows, reset, ...extra);
}

function choose(id, label, options, value, onChange) {
  const select = el(
    "select",
    { id: `set-${id}`, on: { change: () => onChange(select.value) } },
    ...options.map(([key, text]) => el("option", { value: key, text })),
  );
  select.value = value;
  return el("div", { class: "field" }, el("label", { for: `set-${id}`, text: label }), select);
}

function check(id, label, value, onChange) {
  const box = el("input", { type: "checkbox", id: `set-${id}`, on: { change: () => onChange(box.checked) } });
  box.checked = value;
  return el("label", { class: "check" }, box, label);
}

function looksPart() {
  let theme = document.documentElement.dataset.theme ?? "";
  return part(
    "Looks",
    "",
    choose("theme", "Theme", [["", "As the system"], ["light", "Light"], ["dark", "Dark"]], theme, (value) => {
      theme = value;
      if (value) document.documentElement.dataset.theme = value;
      else delete document.documentElement.dataset.theme;
      try {
        if (value) localStorage.setItem("earnest.theme", value); // theme.js reads it as it is
        else localStorage.removeItem("earnest.theme");
      } catch {
        // Until the page is closed, then.
      }
    }),
  );
}

function keyPart({ onKey }) {
  const state = apiKey() ? (keyIsKept() ? "A key is kept on this device." : "A key is kept until this tab is closed.") : "None is sent.";
  return part("API key", state, el("button", { type: "button", class: "plain-button", text: apiKey() ? "Change the key" : "Enter a key", on: { click: onKey } }));
}

function dataPart(dialog, { exportAll, chooseFile, deleteAll }) {
  let sure = false;
  const remove = el("button", {
    type: "button",
    class: "plain-button danger",
    text: "Delete all conversations",
    on: {
      click: () => {
        if (!sure) {
          sure = true;
          remove.textContent = "Really delete all? This cannot be undone";
          return;
        }
        dialog.close();
        deleteAll();
      },
      blur: () => {
        sure = false;
        remove.textContent = "Delete all conversations";
      },
    },
  });
  return part(
    "Conversations",
    "They are in this browser only: the server keeps none.",
    el(
      "div",
      { class: "buttons left" },
      el("button", { type: "button", class: "plain-button", text: "Export all", on: { click: exportAll } }),
      el("button", {
        type: "button",
        class: "plain-button",
        text: "Import",
        on: {
          click: () => {
            dialog.close(); // it would cover what is said of the file
            chooseFile();
          },
        },
      }),
      remove,
    ),
  );
}

function keyboardPart() {
  const rows = [
    ["Enter", "send (Shift+Enter: new line)"],
    ["Ctrl+Enter", "send, or continue a text"],
    ["Esc", "stop the answer"],
    ["↑ in an empty box", "edit your last message"],
    ["Alt+N", "new conversation"],
    ["Alt+S", "settings"],
  ];
  return part(
    "Keyboard",
    "",
    el("dl", { class: "facts" }, ...rows.flatMap(([key, what]) => [el("dt", {}, el("kbd", { text: key })), el("dd", { text: what })])),
  );
}
