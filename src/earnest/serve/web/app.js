// The page: one conversation is open, answers come into it or into others, the rest is kept.

import { Answer } from "./answer.js";
import { served as askServed } from "./api.js";
import { askKey, showFailure, showProblem } from "./banner.js";
import { openCard } from "./card.js";
import {
  addNode,
  asMarkdown,
  fileName,
  newConversation,
  pathOf,
  settle,
  shownTitle,
  switchTo,
  versionsOf,
} from "./conversation.js";
import { announce, byId, download, el, toast } from "./dom.js";
import { readConversations, Refused } from "./import.js";
import { MessageView } from "./message.js";
import { changes, closeByScrim, openSettings, settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { openStore, remember, remembered } from "./store.js";

const SAVE_EVERY = 1000; // ms, while an answer grows
const NEAR = 80; // px from the end: then the page follows the answer

const store = await openStore();
const answers = new Map(); // id of the conversation to its answer under way
const saved = new Map(); // id to when it was saved
let served = null;
let conversation = newConversation("chat");
let views = [];
let follows = true;

const prompt = byId("prompt");
const scroll = byId("scroll");
const narrow = matchMedia("(max-width: 860px)");
const touch = matchMedia("(pointer: coarse)");

// --- the server -----------------------------------------------------------------------------------

async function connect() {
  byId("banner").replaceChildren();
  try {
    served = await askServed();
  } catch (error) {
    served = null;
    showState();
    showFailure(error, { again: connect, enterKey });
    return false;
  }
  if (!conversation.leaf) conversation.kind = served.chats ? "chat" : "text";
  showState();
  if (!conversation.leaf) showMessages();
  return true;
}

function enterKey(failure = null) {
  byId("settings").close();
  askKey(failure, connect);
}

// --- what is shown --------------------------------------------------------------------------------

function showState() {
  const running = answers.has(conversation.id);
  const text = conversation.kind === "text";
  byId("model-name").textContent = served ? served.name : "not connected";
  byId("model").classList.toggle("lost", !served);
  byId("title").textContent = conversation.leaf ? shownTitle(conversation) : "";
  document.title = conversation.leaf ? `${shownTitle(conversation)} – Earnest` : "Earnest";
  const label = running ? "Stop" : text ? "Continue" : "Send";
  const send = byId("send");
  send.setAttribute("aria-label", label);
  send.title = label;
  send.classList.toggle("stops", running);
  byId("send-icon").setAttribute("href", running ? "#i-stop" : "#i-send");
  send.disabled = !running && !prompt.value.trim() && !(text && conversation.leaf);
  const goesOn = conversation.leaf ? "Write on, or let the model continue" : "Write the beginning of a text";
  prompt.placeholder = text ? goesOn : "Write a message";
  byId("changed").textContent = changes();
  const last = pathOf(conversation).findLast((node) => node.stats?.prompt);
  const used = last ? last.stats.prompt + last.stats.tokens : 0;
  byId("used").textContent =
    used && served?.context ? `${used.toLocaleString("en")} of ${served.context.toLocaleString("en")} tokens` : "";
}

function showMessages() {
  const path = pathOf(conversation);
  const notes = [];
  if (served && !served.chats && (path.length === 0 || conversation.kind === "chat")) notes.push(baseNote());
  if (path.length === 0) notes.unshift(welcome());
  byId("welcome").replaceChildren(...notes);
  byId("welcome").hidden = notes.length === 0;
  byId("main").classList.toggle("empty", path.length === 0);
  views = path.map((node) => new MessageView(node, conversation.kind, acts));
  for (const view of views) view.update(versionsOf(conversation, view.node));
  const system = conversation.kind === "chat" && conversation.system.trim();
  const shown = system
    ? [el("li", { class: "system" }, el("details", {}, el("summary", { text: "System prompt" }), el("p", { text: system })))]
    : [];
  byId("messages").replaceChildren(...shown, ...views.map((view) => view.element));
  showState();
}

function welcome() {
  if (!served) return el("div", { class: "hello" }, el("h2", { text: "Earnest" }));
  const facts = [served.details.parameter_size && `${served.details.parameter_size} parameters`];
  if (served.context) facts.push(`${served.context.toLocaleString("en")} tokens of context`);
  return el(
    "div",
    { class: "hello" },
    el("h2", { text: served.name }),
    el("p", { class: "note", text: facts.filter(Boolean).join(" · ") }),
  );
}

function baseNote() {
  return el(
    "p",
    { class: "base-note" },
    el("strong", { text: "This is a Base model." }),
    " It has no chat template: it does not answer, it continues what you write. ",
    conversation.kind === "text"
      ? "Write the beginning of a text."
      : el("button", { type: "button", class: "link", text: "Begin a text", on: { click: startNew } }),
  );
}

async function showList() {
  new_.disabled = false;
  sidebar.update(await store.list(), conversation.id, new Set(answers.keys()));
}

function toEnd(smooth = false) {
  scroll.scrollTo({ top: scroll.scrollHeight, behavior: smooth ? "smooth" : "instant" });
}

// --- conversations --------------------------------------------------------------------------------

async function open(id) {
  const running = answers.get(id);
  const found = running ? running.conversation : await store.get(id);
  if (!found) return startNew();
  conversation = running ? found : settle(found);
  if (location.hash.slice(1) !== id) history.pushState(null, "", `#${id}`);
  if (narrow.matches) showSidebar(false);
  follows = true;
  showMessages();
  toEnd();
  await showList();
  if (!touch.matches) prompt.focus();
}

async function startNew() {
  conversation = newConversation(served && !served.chats ? "text" : "chat");
  if (location.hash) history.pushState(null, "", location.pathname + location.search);
  if (narrow.matches) showSidebar(false);
  showMessages();
  await showList();
  if (!touch.matches) prompt.focus();
}

async function save(changed) {
  saved.set(changed.id, performance.now());
  try {
    await store.put(changed);
  } catch {
    toast("This browser has no room to keep the conversation: export it.");
  }
}

const acts = {
  open,
  async regenerate(node) {
    if (!(await ready())) return;
    if (!node.content && !node.reasoning) delete conversation.nodes[node.id]; // nothing is lost
    answer(node.parent);
  },
  async edit(node, text) {
    if (!(await ready())) return;
    const made = addNode(conversation, node.parent, node.role, text);
    answer(made.id);
  },
  showVersion(node) {
    if (answers.has(conversation.id)) return;
    switchTo(conversation, node);
    showMessages();
    save(conversation);
    views.find((view) => view.node === node)?.actions.querySelector("button:enabled")?.focus();
  },
  enterKey,
  openSettings: showSettings,
  startNew,
  async rename(id, title) {
    const found = id === conversation.id ? conversation : (answers.get(id)?.conversation ?? (await store.get(id)));
    if (found && title !== null) {
      Object.assign(found, { title, named: true });
      await save(found);
    }
    showState();
    await showList();
  },
  async remove(id) {
    answers.get(id)?.stop();
    const found = id === conversation.id && conversation.leaf ? conversation : await store.get(id);
    await store.remove(id);
    if (id === conversation.id) await startNew();
    else await showList();
    toast("Conversation deleted.", {
      label: "Undo",
      run: async () => {
        await save(settle(found));
        await open(id);
      },
    });
  },
  async save(id, kind) {
    const found = id === conversation.id ? conversation : await store.get(id);
    if (kind === "md") download(fileName(found, "md"), "text/markdown", asMarkdown(found));
    else download(fileName(found, "json"), "application/json", JSON.stringify(found, null, 1));
  },
  chooseFile: () => byId("file").click(),
};

/** Add what a file holds to the conversations: all of it, or nothing. */
async function importFile(file) {
  let found;
  try {
    found = await readConversations(file);
    await store.put(...found);
  } catch (error) {
    const [why, remedy] =
      error instanceof Refused
        ? [error.message, "Choose a file that “Export as JSON” or “Export all” has written."]
        : ["This browser has no room for it.", "Delete conversations, or import fewer."];
    const close = () => (served ? byId("banner").replaceChildren() : connect());
    showProblem(`Nothing was imported from ${file.name}.`, `${why} ${remedy}`, { "Choose another file": acts.chooseFile, Close: close });
    return;
  }
  if (served) byId("banner").replaceChildren(); // what was said of another file
  if (found.length === 1) await open(found[0].id);
  else await showList();
  toast(found.length === 1 ? "Conversation imported." : `${found.length.toLocaleString("en")} conversations imported.`);
}

// --- answers --------------------------------------------------------------------------------------

/** Whether the open conversation can be answered now. */
async function ready() {
  return !answers.has(conversation.id) && (served !== null || (await connect()));
}

async function send() {
  const text = prompt.value;
  const continues = conversation.kind === "text" && conversation.leaf;
  if ((!text.trim() && !continues) || !(await ready())) return;
  const last = conversation.nodes[conversation.leaf];
  if (text.trim()) addNode(conversation, conversation.leaf, "user", conversation.kind === "text" ? text : text.trim());
  else if (last.state === "failed" && !last.content) return acts.regenerate(last);
  prompt.value = "";
  resize();
  if (location.hash.slice(1) !== conversation.id) history.replaceState(null, "", `#${conversation.id}`);
  await answer(conversation.leaf);
}

/** Have the node after `parent` written. */
async function answer(parent) {
  const mine = conversation;
  const node = addNode(mine, parent, "assistant", "");
  let planned = false;
  let rested = 0; // when the next painting may begin
  const running = new Answer(mine, node, () => {
    if (!planned) {
      planned = true;
      // Not more often than the screen is painted; a page in the background paints nothing.
      const rest = rested - performance.now();
      if (document.hidden || rest > 0) setTimeout(paint, Math.max(rest, document.hidden ? 200 : 0));
      else requestAnimationFrame(paint);
    }
    if (performance.now() - (saved.get(mine.id) ?? 0) > SAVE_EVERY && answers.get(mine.id) === running) save(mine);
  });
  const paint = () => {
    planned = false;
    if (mine !== conversation) return;
    const begun = performance.now();
    views.find((view) => view.node === node)?.update();
    if (follows) toEnd();
    // A long block is made anew each time: a fifth of the time at most goes into that.
    rested = performance.now() + 4 * (performance.now() - begun);
  };
  answers.set(mine.id, running);
  follows = true;
  showMessages();
  toEnd();
  // The button that was pressed is gone; let the keyboard go on somewhere.
  if (document.activeElement === document.body && !touch.matches) prompt.focus();
  await save(mine);
  await showList();
  announce(mine.kind === "text" ? "Writing" : "Answering");
  await running.run(served, settings());
  const kept = answers.get(mine.id) === running;
  answers.delete(mine.id);
  // A conversation that was deleted meanwhile stays so.
  if (kept && (mine === conversation || (await store.get(mine.id)))) await save(mine);
  if (mine === conversation) {
    paint();
    showState();
  }
  if (node.problem?.kind === "key" && mine === conversation) enterKey(node.problem);
  announce({ done: "The answer is complete", stopped: "Stopped", failed: "The answer failed" }[node.state]);
  await showList();
}

// --- the rest of the page -------------------------------------------------------------------------

const new_ = byId("new");
const sidebar = new Sidebar(acts);

function showSidebar(shown) {
  document.body.classList.toggle("sidebar-open", shown);
  document.body.classList.toggle("sidebar-closed", !shown);
  byId("sidebar").inert = !shown;
  byId("main").inert = shown && narrow.matches;
  byId("scrim").hidden = !(shown && narrow.matches);
  byId("toggle").setAttribute("aria-expanded", String(shown));
  if (!narrow.matches) remember("sidebar", shown);
}

function showSettings() {
  openSettings({
    served,
    conversation,
    onSystem: (text) => {
      conversation.system = text;
      if (conversation.leaf) save(conversation);
      if (!answers.has(conversation.id)) showMessages();
    },
    onChange: showState,
    onKey: () => enterKey(),
    chooseFile: acts.chooseFile,
    exportAll: async () =>
      download("earnest-conversations.json", "application/json", JSON.stringify(await store.all(), null, 1)),
    deleteAll: async () => {
      for (const running of answers.values()) running.stop();
      answers.clear();
      await store.clear();
      await startNew();
    },
  });
}

/** As high as its text, within bounds. */
function resize() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
  showState();
}

function onKey(event) {
  const inDialog = document.querySelector("dialog[open]");
  if (event.altKey && event.code === "KeyN" && !inDialog) {
    event.preventDefault();
    startNew();
  } else if (event.altKey && event.code === "KeyS" && !inDialog) {
    event.preventDefault();
    showSettings();
  } else if (event.key === "Escape" && !inDialog) {
    if (narrow.matches && document.body.classList.contains("sidebar-open")) {
      showSidebar(false);
      byId("toggle").focus();
    } else answers.get(conversation.id)?.stop();
  }
}

prompt.addEventListener("input", resize);
prompt.addEventListener("keydown", (event) => {
  if (event.isComposing || event.keyCode === 229) return; // an input method takes the key
  const enters = event.key === "Enter" && !event.shiftKey && !event.altKey;
  // On a phone, and in a text, Enter begins a line.
  const plain = !touch.matches && conversation.kind === "chat";
  if (enters && (plain || event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && prompt.value === "" && !answers.has(conversation.id)) {
    event.preventDefault();
    views.findLast((view) => view.node.role === "user")?.edit();
  }
});
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const running = answers.get(conversation.id);
  if (running) running.stop();
  else send();
});
new_.addEventListener("click", startNew);
byId("toggle").addEventListener("click", () => {
  const shown = byId("sidebar").inert;
  showSidebar(shown);
  if (shown && narrow.matches) new_.focus();
});
byId("scrim").addEventListener("click", () => showSidebar(false));
byId("open-settings").addEventListener("click", showSettings);
byId("model").addEventListener("click", () => (served ? openCard(served) : connect()));
byId("to-end").addEventListener("click", () => toEnd(!matchMedia("(prefers-reduced-motion: reduce)").matches));
scroll.addEventListener("scroll", () => {
  follows = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < NEAR;
  byId("to-end").hidden = follows;
});
byId("file").addEventListener("change", ({ target }) => {
  const [file] = target.files;
  if (file) importFile(file);
  target.value = ""; // the same one can be chosen again
});
for (const id of ["settings", "card", "key"]) closeByScrim(byId(id));
document.addEventListener("keydown", onKey);
narrow.addEventListener("change", () => showSidebar(!narrow.matches && remembered("sidebar", true)));
addEventListener("popstate", () => {
  const id = location.hash.slice(1);
  if (id !== conversation.id) (id ? open : startNew)(id);
});
addEventListener("pagehide", () => {
  // The database would not get to it any more; this is done at once.
  if (answers.size > 0) {
    remember("rescued", [...answers.values()].map(({ conversation: { id }, node }) => ({ id, node })));
  }
});
store.onChange(async (id) => {
  if (!answers.has(conversation.id) && conversation.leaf && (id === conversation.id || id === null)) {
    const found = await store.get(conversation.id);
    if (found && found.updated > conversation.updated) {
      conversation = found;
      showMessages();
    }
  }
  await showList();
});

/** Take up what had come of answers when the page was closed. */
async function rescue() {
  for (const { id, node } of remembered("rescued", [])) {
    const found = await store.get(id);
    if (found?.nodes[node.id]?.state !== "running") continue;
    found.nodes[node.id] = node;
    await save(settle(found));
  }
  remember("rescued", null);
}

await rescue();
showSidebar(!narrow.matches && remembered("sidebar", true));
if (!store.lasting) toast("This browser keeps nothing: conversations end with the page.");
if (location.hash.length > 1) await open(location.hash.slice(1));
else await startNew();
await connect();
document.documentElement.dataset.ready = "true";
