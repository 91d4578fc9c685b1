// The endpoints: everything that /openapi.json says, to be read, searched and copied.

import { apiKey, description } from "./api.js";
import { askKey, showFailure } from "./banner.js";
import { byId, copyButton, download, el } from "./dom.js";
import { Schemas } from "./schema.js";
import { closeByScrim } from "./settings.js";

const GROUPS = { server: "Server", tokens: "Tokens" };
const search = byId("search");
const base = new URL(".", document.baseURI).href.replace(/\/$/, "");

let told = null; // the document
let schemas = null;
let entries = []; // of { element, group, text }

// --- what an endpoint takes and answers -----------------------------------------------------------

function rows(schema) {
  return el("ul", { class: "fields" }, ...schemas.fields(schema).map(row));
}

function row({ name, schema, required }) {
  const mark = "default" in schema && schema.default !== null ? `default ${JSON.stringify(schema.default)}` : "";
  const text = schemas.resolve(schema).description ?? "";
  const inner = schemas.objects(schema);
  return el(
    "li",
    {},
    el("code", { text: name }),
    " ",
    el("span", { class: "kind", text: schemas.words(schema) }),
    required ? el("span", { class: "required", text: " required" }) : null,
    mark ? el("span", { class: "kind", text: `, ${mark}` }) : null,
    text && inner.length === 0 ? el("p", { class: "note", text }) : null,
    ...inner.map((object) => folded(object, name)),
  );
}

/** An object's fields, made when they are first asked for: some lead back to themselves. */
function folded({ name, text, schema }, field) {
  const summary = el("summary", {}, el("span", { text: name || `Fields of ${field}` }), text ? el("span", { class: "note", text: ` ${text}` }) : null);
  return lazily(el("details", { class: "inner" }, summary), () => rows(schema));
}

function lazily(details, make) {
  details.addEventListener("toggle", () => details.append(make()), { once: true });
  return details;
}

function shown(schema) {
  const objects = schemas.objects(schema);
  if (objects.length === 1 && schemas.resolve(schema).properties) return [rows(objects[0].schema)];
  return [el("p", { class: "kind", text: schemas.words(schema) }), ...objects.map((object) => folded(object, "it"))];
}

function part(title, ...content) {
  return content.length > 0 ? el("section", {}, el("h3", { text: title }), ...content) : null;
}

function parametersOf({ parameters = [] }) {
  if (parameters.length === 0) return [];
  return [
    el(
      "ul",
      { class: "fields" },
      ...parameters.map((one) =>
        el(
          "li",
          {},
          el("code", { text: one.name }),
          " ",
          el("span", { class: "kind", text: `${schemas.words(one.schema ?? {})}, in the ${one.in}` }),
          one.required ? el("span", { class: "required", text: " required" }) : null,
          one.description ? el("p", { class: "note", text: one.description }) : null,
        ),
      ),
    ),
  ];
}

const bodyOf = (operation) => Object.entries(operation.requestBody?.content ?? {})[0] ?? [];

function answersOf({ responses }) {
  return Object.entries(responses).map(([status, { description: text, content = {} }]) => {
    const kinds = Object.entries(content);
    const summary = el("summary", {}, el("code", { text: status }), ` ${text} `, el("span", { class: "note", text: kinds.map(([kind]) => kind).join(", ") }));
    const details = el("details", { class: "inner" }, summary);
    return lazily(details, () =>
      el("div", {}, ...kinds.flatMap(([kind, { schema }]) => [kinds.length > 1 ? el("p", { class: "note", text: kind }) : null, ...(schema ? shown(schema) : [])])),
    );
  });
}

// --- an example -----------------------------------------------------------------------------------

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** The endpoint asked by curl. The key itself is left out, since examples are passed on. */
export function curl(method, path, operation) {
  const [kind, body] = bodyOf(operation);
  let address = base + path;
  for (const { in: where, name, example } of operation.parameters ?? []) {
    if (where === "path") address = address.replace(`{${name}}`, encodeURIComponent(example ?? name));
  }
  const lines = [`curl ${method === "get" || body ? "" : `-X ${method.toUpperCase()} `}${quoted(address)}`];
  if (apiKey() && "401" in operation.responses) lines.push('-H "Authorization: Bearer $EARNEST_API_KEY"');
  if (body) lines.push(`-H ${quoted(`Content-Type: ${kind}`)}`, `-d ${quoted(JSON.stringify(body.example ?? {}, null, 2))}`);
  return lines.join(" \\\n  ");
}

function example(text) {
  return el(
    "figure",
    { class: "code" },
    el("figcaption", {}, el("span", { text: "curl" }), copyButton("Copy the example", () => text)),
    el("pre", { tabindex: "0" }, el("code", { text })),
  );
}

// --- the list -------------------------------------------------------------------------------------

function entryOf(path, method, operation) {
  const [kind, body] = bodyOf(operation);
  const [first, ...rest] = (operation.description ?? operation.summary ?? "").split(/\n\n+/);
  const id = `${method}${path}`;
  const summary = el(
    "summary",
    {},
    el("span", { class: `method ${method}`, text: method.toUpperCase() }),
    el("code", { text: path }),
    el("span", { class: "note", text: first }),
  );
  const element = el("details", { class: "endpoint", id }, summary);
  lazily(element, () =>
    el(
      "div",
      { class: "inside" },
      ...rest.map((text) => el("p", { text: text.replaceAll("\n", " ") })),
      part("Example", example(curl(method, path, operation))),
      part("Parameters", ...parametersOf(operation)),
      body ? part("Body", el("p", { class: "note", text: kind }), ...shown(body.schema ?? {})) : null,
      part("Answers", ...answersOf(operation)),
    ),
  );
  element.addEventListener("toggle", () => {
    if (element.open) history.replaceState(null, "", `#${id}`);
  });
  const names = [...(operation.parameters ?? []).map(({ name }) => name), ...(body ? schemas.names(body.schema ?? {}) : [])];
  const text = [method, path, operation.description, ...(operation.tags ?? []), ...names].join(" ").toLowerCase();
  return { element, text };
}

function show() {
  schemas = new Schemas(told);
  entries = [];
  const groups = new Map();
  for (const [path, item] of Object.entries(told.paths)) {
    for (const [method, operation] of Object.entries(item)) {
      const tag = operation.tags?.[0] ?? "";
      if (!groups.has(tag)) {
        groups.set(tag, el("section", { class: "group" }, el("h2", { text: GROUPS[tag] ?? tag })));
      }
      const group = groups.get(tag);
      const entry = entryOf(path, method, operation);
      group.append(entry.element);
      entries.push({ ...entry, group });
    }
  }
  byId("endpoints").replaceChildren(...groups.values());
  byId("version").textContent = told.info?.version ?? "";
  byId("addresses").replaceChildren(
    "Base address for OpenAI’s clients: ",
    el("code", { text: `${base}/v1` }),
    "; for Anthropic’s and Ollama’s: ",
    el("code", { text: base }),
  );
  byId("download").disabled = search.disabled = false;
  find();
  openNamed();
}

/** Only the endpoints that have every word. */
function find() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const { element, text } of entries) element.hidden = !words.every((word) => text.includes(word));
  for (const group of new Set(entries.map((entry) => entry.group))) {
    group.hidden = entries.every((entry) => entry.group !== group || entry.element.hidden);
  }
  const found = entries.filter(({ element }) => !element.hidden).length;
  byId("found").textContent = words.length > 0 ? `${found} of ${entries.length} endpoints` : `${entries.length} endpoints`;
}

/** The endpoint that the address names. */
function openNamed() {
  const named = byId(decodeURIComponent(location.hash.slice(1)));
  if (!named?.classList.contains("endpoint")) return;
  named.open = true;
  named.scrollIntoView();
}

// --- the server -----------------------------------------------------------------------------------

async function connect() {
  byId("banner").replaceChildren();
  try {
    told = await description();
    show();
  } catch (error) {
    showFailure(error, { again: connect, enterKey });
  }
}

function enterKey(failure = null) {
  askKey(failure, connect);
}

search.addEventListener("input", find);
addEventListener("keydown", (event) => {
  const writes = event.target instanceof HTMLInputElement || document.querySelector("dialog[open]");
  if (event.key !== "/" || writes || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  search.focus();
});
addEventListener("hashchange", openNamed);
byId("open-key").addEventListener("click", () => enterKey());
byId("download").addEventListener("click", () => download("openapi.json", "application/json", JSON.stringify(told, null, 1)));
closeByScrim(byId("key"));
await connect();
document.documentElement.dataset.ready = "true";
