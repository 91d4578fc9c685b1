// A conversation is a tree: asking again or editing adds a sibling, and nothing that was written is
// lost. `leaf` says which branch is shown. All of it is plain data, as it is stored and exported.
//
//   conversation: id, title, named (by the reader), kind ("chat" or "text"), system, created, updated,
//                 nodes (id to node), leaf (id or null)
//   node:         id, parent, role ("user" or "assistant"), content, created; of an answer also state
//                 ("running", "done", "stopped", "failed"), reasoning, problem, finish, stats, tokens

export function freshId() {
  // crypto.randomUUID is missing where the page came over plain http from another machine.
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newConversation(kind) {
  const now = Date.now();
  return { id: freshId(), title: "", named: false, kind, system: "", created: now, updated: now, nodes: {}, leaf: null };
}

/** Add a node below `parent` (an id, or null) and show its branch. */
export function addNode(conversation, parent, role, content) {
  const node = { id: freshId(), parent, role, content, created: Date.now() };
  // Siblings are told apart by age: two of the same millisecond must not be.
  for (const other of childrenOf(conversation, parent)) node.created = Math.max(node.created, other.created + 1);
  if (role === "assistant") Object.assign(node, { state: "running", reasoning: "", tokens: [], stats: null });
  conversation.nodes[node.id] = node;
  conversation.leaf = node.id;
  conversation.updated = Date.now();
  if (!conversation.named && role === "user" && !conversation.title) conversation.title = titleOf(content);
  return node;
}

function titleOf(text) {
  const line = text.replace(/\s+/g, " ").trim();
  if (line.length <= 60) return line;
  const cut = line.slice(0, 60);
  return `${cut.includes(" ") ? cut.slice(0, cut.lastIndexOf(" ")) : cut}…`;
}

/** What is shown as its name. */
export const shownTitle = (conversation) => conversation.title || "New conversation";

/** From the first node to the leaf that is shown, or to the node given. */
export function pathOf(conversation, leaf = conversation.leaf) {
  const path = [];
  for (let node = conversation.nodes[leaf]; node; node = conversation.nodes[node.parent]) path.unshift(node);
  return path;
}

function childrenOf(conversation, parent) {
  return Object.values(conversation.nodes)
    .filter((node) => node.parent === parent)
    .sort((a, b) => a.created - b.created);
}

/** The node's versions, itself among them, oldest first. */
export const versionsOf = (conversation, node) => childrenOf(conversation, node.parent);

/** Show the branch that goes through a node, to its newest end. */
export function switchTo(conversation, node) {
  let leaf = node;
  for (let below = [node]; below.length > 0; below = childrenOf(conversation, leaf.id)) leaf = below.at(-1);
  conversation.leaf = leaf.id;
}

/** Answers that were being written when the page was closed are not any more. */
export function settle(conversation) {
  for (const node of Object.values(conversation.nodes)) if (node.state === "running") node.state = "stopped";
  return conversation;
}

/** The messages before a node, as /v1/chat/completions takes them. Thoughts are not sent again. */
export function messagesBefore(conversation, node) {
  const messages = pathOf(conversation, node.parent)
    .filter((before) => before.role === "user" || before.content !== "")
    .map(({ role, content }) => ({ role, content }));
  const system = conversation.system.trim();
  return system ? [{ role: "system", content: system }, ...messages] : messages;
}

/** The text before a node, as /v1/completions continues it. */
export const textBefore = (conversation, node) =>
  pathOf(conversation, node.parent)
    .map((before) => before.content)
    .join("");

/** The shown branch for people to read. */
export function asMarkdown(conversation) {
  const path = pathOf(conversation);
  if (conversation.kind === "text") return `${path.map((node) => node.content).join("")}\n`;
  const parts = [`# ${shownTitle(conversation)}`];
  if (conversation.system.trim()) parts.push(`## System\n\n${conversation.system.trim()}`);
  for (const node of path) {
    parts.push(`## ${node.role === "user" ? "You" : (node.model ?? "Model")}`);
    if (node.reasoning) parts.push(node.reasoning.trim().replace(/^/gm, "> "));
    parts.push(node.content.trim());
  }
  return `${parts.join("\n\n")}\n`;
}

/** A name for the file. */
export const fileName = (conversation, ending) =>
  `${shownTitle(conversation).replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) || "conversation"}.${ending}`;
