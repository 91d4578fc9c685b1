// The model card: what the server tells of the model.

import { byId, el } from "./dom.js";
import { sheetHead } from "./settings.js";

const number = (value) => Number(value).toLocaleString("en");

/** Rows of label and text; what is not known is left out. */
export function factsOf(served) {
  const { info, details, defaults } = served;
  const of = (ending) => Object.entries(info).find(([name]) => name.endsWith(`.${ending}`))?.[1];
  const rows = [
    ["Name", served.name],
    ["Architecture", info["general.architecture"] ?? details.family],
    ["Parameters", info["general.parameter_count"] && `${details.parameter_size} (${number(info["general.parameter_count"])})`],
    ["Stored as", details.quantization_level && `${details.quantization_level.toLowerCase()}, ${details.format}`],
    ["Context", served.context && `${number(served.context)} tokens`],
    ["Vocabulary", of("vocab_size") && `${number(of("vocab_size"))} tokens`],
    ["Layers", of("block_count")],
    ["Heads", of("attention.head_count") && `${of("attention.head_count")}, ${of("attention.head_count_kv")} for keys and values`],
    ["Chat template", served.chats ? "yes" : "no: a Base model, which continues text"],
    ["Thinks", served.thinks ? "yes" : "no"],
    ["Sampling", Object.entries(defaults).map(([name, value]) => `${name} ${value}`).join(", ")],
    ["Server", served.version && `Earnest ${served.version}`],
    ["Address", location.origin],
  ];
  return rows.filter(([, text]) => text !== undefined && text !== null && text !== "" && text !== 0);
}

/** Show it. */
export function openCard(served) {
  const dialog = byId("card");
  dialog.replaceChildren(
    sheetHead("card-title", "The model", dialog),
    el(
      "div",
      { class: "sheet-body" },
      el("dl", { class: "facts" }, ...factsOf(served).flatMap(([label, text]) => [el("dt", { text: label }), el("dd", { text })])),
      el(
        "p",
        { class: "note" },
        "Programs reach it by OpenAI's, Anthropic's and Ollama's interfaces at this address: ",
        el("a", { href: "docs", target: "_blank", rel: "noopener", text: "all endpoints" }),
        ".",
      ),
    ),
  );
  dialog.showModal();
}
