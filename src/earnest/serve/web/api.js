// Calls of the server. Addresses are relative to the page, so that it also works below a path of
// a reverse proxy.

import { remember, remembered } from "./store.js";

let key = null;

function stored() {
  try {
    return sessionStorage.getItem("earnest.key");
  } catch {
    return null;
  }
}

/** The API key: of this tab, or remembered on this device. */
export const apiKey = () => key ?? stored() ?? remembered("key", "");
export const keyIsKept = () => Boolean(remembered("key"));

/** Use another key; an empty one sends none. */
export function setApiKey(value, keep) {
  key = value.trim();
  try {
    sessionStorage.setItem("earnest.key", key);
  } catch {
    // Only as long as the page is open, then.
  }
  remember("key", keep && key ? key : null);
}

/**
 * Something went wrong, in words for the reader.
 * `kind`: "key", "address", "unreachable", "broken", "busy", "long", "settings" or "other".
 */
export class Failure extends Error {
  constructor(kind, title, remedy = "", said = "") {
    super(title);
    Object.assign(this, { kind, title, remedy, said });
  }
}

async function call(path, { body, signal } = {}) {
  const headers = {};
  const given = apiKey();
  // A header holds nothing else; the server says that the key is wrong.
  if (given) headers.authorization = `Bearer ${/^[\x21-\x7e]+$/.test(given) ? given : "unprintable"}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      credentials: "same-origin",
      cache: "no-store",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Failure(
      "unreachable",
      "The server cannot be reached.",
      "Is earnest serve still running, and is this device still on its network? Then try again.",
    );
  }
  if (!response.ok) throw explained(response.status, await bodyOf(response), Boolean(given));
  return response;
}

async function bodyOf(response) {
  try {
    return JSON.parse((await response.text()).slice(0, 100_000));
  } catch {
    return {};
  }
}

/** What a refusal means, and what helps. */
export function explained(status, body, withKey = true) {
  const error = body?.error;
  const said = (typeof error === "string" ? error : error?.message) ?? body?.detail ?? "";
  const text = typeof said === "string" ? said : JSON.stringify(said);
  if (error?.code === "context_length_exceeded") {
    return new Failure(
      "long",
      "This conversation does not fit into the model's context any more.",
      "Begin a new one, or edit an earlier message: what comes after it is then left out.",
      text,
    );
  }
  switch (status) {
    case 401:
      return withKey
        ? new Failure("key", "The server does not accept this API key.", "Enter another one.")
        : new Failure("key", "This server asks for an API key.", "Whoever runs it can give you one.");
    case 403:
      return new Failure(
        "address",
        "The server takes no calls from a page of this address.",
        `Start it with --cors ${location.origin}, or open the page by the server's IP address or as localhost.`,
        text,
      );
    case 404:
      return new Failure("other", "The server does not know this.", "It may serve another model by now: reload the page.", text);
    case 408:
    case 504:
      return new Failure("busy", "It took too long.", "Try again, or ask for fewer tokens.", text);
    case 413:
      return new Failure("long", "The message is too large for this server.", "Shorten it.", text);
    case 400:
    case 422:
      return new Failure("settings", "The server refused the request.", "Check the settings.", text);
    case 429:
      return new Failure("busy", "Too many answers are waiting already.", "Try again in a moment.", text);
    case 503:
      return new Failure("busy", "The server takes no requests now: it is ending, or short of memory.", "Try again in a moment.", text);
    default:
      return new Failure("other", `The server failed (status ${status}).`, "Its log says why.", text);
  }
}

/**
 * What is served: name, context, facts of the model, version. What an older or a strange server does
 * not tell is null.
 */
export async function served() {
  const models = await (await call("v1/models")).json();
  const [model] = models.data ?? [];
  if (!model) throw new Failure("other", "The server serves no model.");
  const ask = async (path, body) => {
    try {
      return await (await call(path, { body })).json();
    } catch (error) {
      if (["unreachable", "address"].includes(error.kind)) throw error;
      return null;
    }
  };
  const [facts, version] = await Promise.all([ask("api/show", { model: model.id }), ask("version")]);
  return {
    name: model.id,
    context: model.max_model_len ?? null,
    // Without facts, the first answer shows whether it can chat.
    chats: facts === null || Boolean(facts.template),
    thinks: Boolean(facts?.capabilities?.includes("thinking")),
    defaults: parametersOf(facts?.parameters ?? ""),
    details: facts?.details ?? {},
    info: facts?.model_info ?? {},
    version: version?.version ?? null,
  };
}

/** The description of all endpoints, as OpenAPI writes it. */
export const description = async () => (await call("openapi.json")).json();

/** `name value` lines. */
function parametersOf(text) {
  const found = {};
  for (const line of text.split("\n")) {
    const [name, value] = line.trim().split(/\s+/);
    if (name && !Number.isNaN(Number(value))) found[name === "repeat_penalty" ? "repetition_penalty" : name] = Number(value);
  }
  return found;
}

/** The events of a streamed answer, as objects. Ends early only by throwing. */
export async function* stream(path, body, signal) {
  const response = await call(path, { body, signal });
  const broken = () =>
    new Failure("broken", "The connection broke off.", "What had come is kept. Ask again for a complete answer.");
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let held = "";
  try {
    for (;;) {
      let piece;
      try {
        piece = await reader.read();
      } catch (error) {
        if (signal.aborted) throw error;
        throw broken();
      }
      held += decoder.decode(piece.value, { stream: !piece.done }).replace(/\r/g, "");
      const events = held.split("\n\n");
      held = events.pop();
      for (const event of events) {
        const data = event
          .split("\n")
          .filter((line) => line.startsWith("data:"))
          .map((line) => line.slice(5).trimStart())
          .join("\n");
        if (data === "[DONE]") return;
        if (data === "") continue; // a sign of life
        const found = JSON.parse(data);
        if (found.error) throw explained(statusOf(found.error), found);
        yield found;
      }
      if (piece.done) throw broken();
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// A stream has no status any more when it fails.
const statusOf = ({ type }) =>
  ({ invalid_request_error: 400, overloaded_error: 503, rate_limit_error: 429 })[type] ?? 500;
