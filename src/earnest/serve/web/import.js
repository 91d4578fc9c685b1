// Conversations out of a file. Nothing in it is trusted: each is made anew out of the fields that
// conversation.js names, each field of its type, under fresh ids; whatever else is there stays there.

import { freshId, settle } from "./conversation.js";

const LARGEST = 100 * 2 ** 20; // bytes of a file: the page reads it at once
const MOST_MESSAGES = 5000; // of a conversation; with more of them, or more text, the page would
const MOST_TEXT = 2_000_000; // characters: stand still each time that it is opened
const LONGEST_TITLE = 1000;

/** Why a file is not taken, for people to read. */
export class Refused extends Error {}

/**
 * The conversations in a file that the page has exported: one, or all.
 * @param {File} file
 * @returns {Promise<object[]>} at least one; their ids are new
 * @throws {Refused}
 */
export async function readConversations(file) {
  if (file.size > LARGEST) throw new Refused(`It is larger than ${LARGEST / 2 ** 20} MB.`);
  let bytes;
  try {
    bytes = await file.arrayBuffer();
  } catch {
    throw new Refused("The browser cannot read it.");
  }
  let data;
  try {
    data = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch {
    throw new Refused("It is not JSON.");
  }
  const given = Array.isArray(data) ? data : [data];
  if (given.length === 0) throw new Refused("It holds no conversation.");
  return given.map(conversationFrom);
}

const isText = (value) => typeof value === "string" && value.length <= MOST_TEXT;
const isTitle = (value) => isText(value) && value.length <= LONGEST_TITLE;
const isNumber = (value) => typeof value === "number" && Number.isFinite(value); // 1e999 is JSON, too
const isNumberOrNull = (value) => value === null || isNumber(value);
const isFlag = (value) => typeof value === "boolean";
const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const oneOf =
  (...known) =>
  (value) =>
    known.includes(value);
const isChance = (value) => Array.isArray(value) && isText(value[0]) && isNumberOrNull(value[1]);
const isToken = (value) =>
  isChance(value) && value.length === 3 && Array.isArray(value[2]) && value[2].every((other) => isChance(other) && other.length === 2);
const isTokens = (value) => Array.isArray(value) && value.every(isToken);

/** The fields of `fields` ({name: what it must be}); one that is missing is left out. */
function fieldsOf(given, fields) {
  const found = {};
  for (const [name, isRight] of Object.entries(fields)) {
    if (!Object.hasOwn(given, name)) continue;
    if (!isRight(given[name])) throw new Refused(`A “${name}” in it is not what it should be.`);
    found[name] = given[name];
  }
  return found;
}

const CONVERSATION = { title: isTitle, named: isFlag, kind: oneOf("chat", "text"), system: isText, created: isNumber, updated: isNumber };
const MESSAGE = { content: isText, created: isNumber };
const ANSWER = {
  ...MESSAGE,
  state: oneOf("running", "done", "stopped", "failed"),
  reasoning: isText,
  thought: isNumber,
  finish: isText,
  model: isText,
  tokens: isTokens,
};
const STATS = { tokens: isNumber, first: isNumberOrNull, speed: isNumberOrNull, prompt: isNumberOrNull, cached: isNumberOrNull };
const PROBLEM = { kind: isText, title: isText, remedy: isText, said: isText };

function conversationFrom(given) {
  if (!isObject(given) || !isObject(given.nodes) || !given.kind) throw new Refused("It holds something that is not a conversation of this page.");
  const entries = Object.entries(given.nodes);
  if (entries.length === 0) throw new Refused("A conversation in it has no messages.");
  if (entries.length > MOST_MESSAGES) throw new Refused(`A conversation in it has more than ${MOST_MESSAGES.toLocaleString("en")} messages.`);
  const ids = new Map(entries.map(([id]) => [id, freshId()]));
  const nodes = Object.fromEntries(entries.map(([id, node]) => [ids.get(id), nodeFrom(node, ids.get(id), ids)]));
  const length = Object.values(nodes).reduce((sum, node) => sum + node.content.length + (node.reasoning?.length ?? 0), 0);
  if (length > MOST_TEXT) throw new Refused(`A conversation in it has more than ${MOST_TEXT.toLocaleString("en")} characters.`);
  if (!endsAtRoots(nodes)) throw new Refused("Messages in it follow each other in a circle.");
  if (!ids.has(given.leaf)) throw new Refused("It does not say which message is the last.");
  const now = Date.now();
  const made = {
    ...{ title: "", named: false, system: "", created: now, updated: now },
    ...fieldsOf(given, CONVERSATION),
    ...{ id: freshId(), nodes, leaf: ids.get(given.leaf) },
  };
  made.updated = Math.min(made.updated, now); // else it would lead the list for ever
  return settle(made);
}

function nodeFrom(given, id, ids) {
  if (!isObject(given) || !isText(given.content)) throw new Refused("A message in it has no text, or too much of it.");
  const { role, parent } = given;
  if (role !== "user" && role !== "assistant") {
    throw new Refused(`A message in it is by “${String(typeof role === "string" ? role : typeof role).slice(0, 40)}”, and the page knows only “user” and “assistant”.`);
  }
  if (parent !== null && !ids.has(parent)) throw new Refused("A message in it follows one that is not there.");
  const made = { id, parent: parent === null ? null : ids.get(parent), role, created: 0 };
  if (role === "user") return Object.assign(made, fieldsOf(given, MESSAGE));
  Object.assign(made, { state: "done", reasoning: "", tokens: [], stats: null }, fieldsOf(given, ANSWER));
  for (const [name, fields] of [["stats", STATS], ["problem", PROBLEM]]) {
    if (isObject(given[name])) made[name] = fieldsOf(given[name], fields);
    else if (given[name] !== null && given[name] !== undefined) throw new Refused(`A “${name}” in it is not what it should be.`);
  }
  return made;
}

/** Whether every node comes down from one without a parent. */
function endsAtRoots(nodes) {
  const sound = new Set([null]);
  for (const id of Object.keys(nodes)) {
    const way = new Set();
    for (let at = id; !sound.has(at); at = nodes[at].parent) {
      if (way.has(at)) return false;
      way.add(at);
    }
    for (const at of way) sound.add(at);
  }
  return true;
}
