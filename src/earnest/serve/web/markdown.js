// Markdown to DOM nodes. What a model writes is data: every piece of it becomes text of a text node
// or of an element made here; no markup is parsed, no address is followed but http, https and mailto,
// and pictures become links. All of it takes linear time and bounded depth, whatever the text is
// (tests/serve/test_web_work.py counts it).

import { copyButton, el } from "./dom.js";
import { coloured } from "./highlight.js";
import { filled } from "./inline.js";

const DEEPEST = 10; // lists and quotes inside each other

const shown = new WeakMap(); // element -> the text shown in it, and where its blocks begin

/**
 * Show `text` in `into`. Shown again with a longer text, only its last blocks are read and made anew,
 * so that a stream is cheap and what is selected above stays so.
 * @param {HTMLElement} into
 * @param {string} text
 */
export function show(into, text) {
  const whole = text.includes("\r") ? text.replace(/\r\n?/g, "\n") : text;
  const before = shown.get(into);
  const grown = before !== undefined && whole.startsWith(before.text);
  if (!grown) into.replaceChildren();
  const known = grown ? before.blocks : [];
  const kept = grown ? settled(known, before.text) : 0;
  const from = known[kept]?.at ?? 0;
  const lines = whole.slice(from).split("\n");
  const found = blocksOf(lines, 0);
  let same = 0; // of those that are read again
  while (same < found.length && known[kept + same]?.source === found[same].source) same++;
  for (let count = known.length; count > kept + same; count--) into.lastChild.remove();
  for (const block of found.slice(same)) into.append(block.make());
  known.length = kept;
  let [line, at] = [0, from];
  for (const { first, source } of found) {
    while (line < first) at += lines[line++].length + 1;
    known.push({ at, source });
  }
  shown.set(into, { text: whole, blocks: known });
}

/**
 * How many blocks of a text stay as they are, whatever follows it. A block's end is known by the two
 * lines after it at most (a table's head and rule), if these are at an end themselves.
 */
function settled(blocks, text) {
  let count = blocks.length - 1;
  for (; count > 0; count--) {
    const line = text.indexOf("\n", blocks[count].at);
    if (line !== -1 && text.includes("\n", line + 1)) break;
  }
  return Math.max(0, count);
}

// --- blocks ---------------------------------------------------------------------------------------

const FENCE = /^ {0,3}(`{3,}(?!`)|~{3,}(?!~))([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?=[ \t]|$)/;
const QUOTE = /^ {0,3}> ?/;
const MARKER = /^( {0,3})([-*+]|\d{1,9}[.)])(?=[ \t]|$)/;

const blank = (line) => line.trim() === "";
const indentOf = (line) => line.length - line.trimStart().length;

/** An element around nodes, however many: more than a call takes arguments. */
function around(made, nodes) {
  for (const node of nodes) made.append(node);
  return made;
}

function isRule(line) {
  if (!/^ {0,3}[-*_]/.test(line)) return false;
  const marks = line.replace(/[ \t]/g, "");
  return marks.length >= 3 && marks === marks[0].repeat(marks.length);
}

function blocksOf(lines, depth) {
  const found = [];
  let at = 0;
  while (at < lines.length) {
    if (blank(lines[at])) {
      at++;
      continue;
    }
    const [end, make] = blockAt(lines, at, depth);
    const apart = found.length > 0 && blank(lines[at - 1]);
    found.push({ first: at, source: depth === 0 ? lines.slice(at, end).join("\n") : null, apart, make });
    at = end;
  }
  return found;
}

/** The block that begins at a line: the line after it, and how to make it. */
function blockAt(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return fenced(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) {
    const text = withoutClosing(line.slice(heading[0].length).trim());
    // The page has headings of its own above these.
    return [at + 1, () => filled(`h${Math.min(6, heading[1].length + 2)}`, text)];
  }
  if (isRule(line)) return [at + 1, () => el("hr")];
  if (isTable(lines, at)) return table(lines, at);
  if (depth < DEEPEST && QUOTE.test(line)) return quote(lines, at, depth);
  if (depth < DEEPEST && MARKER.test(line)) return list(lines, at, depth);
  return paragraph(lines, at, depth);
}

function begins(line, depth) {
  if (FENCE.test(line) || HEADING.test(line) || isRule(line)) return true;
  if (depth >= DEEPEST) return false;
  if (QUOTE.test(line)) return true;
  const marker = MARKER.exec(line);
  return Boolean(marker) && (!/\d/.test(marker[2]) || /^1[.)]$/.test(marker[2])) && !blank(line.slice(marker[0].length));
}

function withoutClosing(text) {
  let end = text.length;
  while (end > 0 && text[end - 1] === "#") end--;
  return end === 0 || /\s/.test(text[end - 1]) ? text.slice(0, end).trimEnd() : text;
}

function paragraph(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && !blank(lines[end]) && !begins(lines[end], depth) && !isTable(lines, end)) end++;
  const text = lines.slice(at, end).map((line) => line.trimStart()).join("\n").trimEnd();
  return [end, () => filled("p", text)];
}

function fenced(lines, at, [opening, mark, info]) {
  const indent = indentOf(opening);
  const closes = (line) => {
    const text = line.trim();
    return text.startsWith(mark) && indentOf(line) <= 3 && text === mark[0].repeat(text.length);
  };
  let end = at + 1;
  while (end < lines.length && !closes(lines[end])) end++;
  const inside = lines.slice(at + 1, end).map((line) => line.slice(Math.min(indent, indentOf(line))));
  const language = info.trim().split(/\s+/)[0].slice(0, 30);
  return [Math.min(end + 1, lines.length), () => codeBlock(inside.join("\n"), language)];
}

function codeBlock(text, language) {
  return el(
    "figure",
    { class: "code" },
    el(
      "figcaption",
      {},
      el("span", { text: language || "text" }),
      copyButton("Copy code", () => text),
    ),
    el("pre", { tabindex: "0" }, around(el("code"), coloured(text, language))),
  );
}

function quote(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end++;
  const blocks = blocksOf(
    lines.slice(at, end).map((line) => line.replace(QUOTE, "")),
    depth + 1,
  );
  return [end, () => around(el("blockquote"), blocks.map((block) => block.make()))];
}

// --- lists ----------------------------------------------------------------------------------------

function list(lines, at, depth) {
  const first = MARKER.exec(lines[at]);
  const ordered = /\d/.test(first[2]);
  const items = [];
  let loose = false;
  let end = at;
  while (end < lines.length) {
    const marker = MARKER.exec(lines[end]);
    if (!marker || /\d/.test(marker[2]) !== ordered || isRule(lines[end])) break;
    const [next, inside] = linesOfItem(lines, end, marker);
    const task = /^\[([ xX])\] /.exec(inside[0]);
    if (task) inside[0] = inside[0].slice(4);
    const blocks = blocksOf(inside, depth + 1);
    // With empty lines between them, items are paragraphs.
    loose ||= (items.length > 0 && blank(lines[end - 1])) || blocks.some((block) => block.apart);
    items.push([blocks, task]);
    end = next;
    while (end < lines.length && blank(lines[end])) end++;
  }
  while (end > at && blank(lines[end - 1])) end--;
  const start = ordered && parseInt(first[2], 10) !== 1 ? parseInt(first[2], 10) : null;
  return [end, () => around(el(ordered ? "ol" : "ul", { start }), items.map((item) => itemOf(...item, loose)))];
}

/** The lines of an item, without what indents them. Models indent what is nested by two or more. */
function linesOfItem(lines, at, marker) {
  const after = lines[at].slice(marker[0].length);
  const gap = Math.min(4, Math.max(1, indentOf(after)));
  const width = marker[0].length + (blank(after) ? 1 : gap);
  const least = Math.min(width, marker[1].length + 2);
  const inside = [lines[at].slice(width)];
  let end = at + 1;
  for (; end < lines.length; end++) {
    const line = lines[end];
    if (blank(line)) {
      let next = end;
      while (next < lines.length && blank(lines[next])) next++;
      if (next >= lines.length || indentOf(lines[next]) < least) break;
      while (end < next) {
        inside.push("");
        end++;
      }
      end--;
    } else if (indentOf(line) >= least) inside.push(line.slice(Math.min(width, indentOf(line))));
    else if (MARKER.test(line) || begins(line, 0)) break;
    else inside.push(line.trimStart());
  }
  return [end, inside];
}

function itemOf(blocks, task, loose) {
  const made = el("li", { class: task ? "task" : null });
  if (task) {
    const box = el("input", { type: "checkbox", disabled: true, "aria-label": task[1] === " " ? "to do" : "done" });
    box.checked = task[1] !== " ";
    made.append(box);
  }
  for (const block of blocks) {
    const node = block.make();
    if (!loose && node.tagName === "P") around(made, [...node.childNodes]);
    else made.append(node);
  }
  return made;
}

// --- tables ---------------------------------------------------------------------------------------

function isTable(lines, at) {
  const [head, rule] = [lines[at], lines[at + 1]];
  if (rule === undefined || !head.includes("|") || !/^ {0,3}[-:|][-:| \t]*$/.test(rule)) return false;
  const rules = cells(rule);
  return rules.length > 0 && rules.every((cell) => /^:?-+:?$/.test(cell)) && cells(head).length === rules.length;
}

function cells(line) {
  const found = [];
  let text = "";
  let row = line.trim();
  if (row.startsWith("|")) row = row.slice(1);
  for (let i = 0; i < row.length; i++) {
    if (row[i] === "\\" && row[i + 1] === "|") {
      text += "|";
      i++;
    } else if (row[i] === "|") {
      found.push(text.trim());
      text = "";
    } else text += row[i];
  }
  if (text.trim() !== "") found.push(text.trim());
  return found;
}

function table(lines, at) {
  const head = cells(lines[at]);
  const alignments = cells(lines[at + 1]).map((cell) =>
    cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : null,
  );
  let end = at + 2;
  while (end < lines.length && !blank(lines[end]) && lines[end].includes("|")) end++;
  const rows = lines.slice(at + 2, end).map(cells);
  const row = (tag, texts) => {
    const made = texts.slice(0, head.length).map((text, i) => filled(tag, text, { class: alignments[i] }));
    // One cell for all that a row lacks: columns times rows may be far more than was written.
    const lacking = head.length - made.length;
    if (lacking > 0) made.push(el(tag, { colspan: lacking > 1 ? lacking : null }));
    return around(el("tr"), made);
  };
  return [
    end,
    () =>
      el(
        "div",
        { class: "table", tabindex: "0", role: "group", "aria-label": "Table" },
        el("table", {}, el("thead", {}, row("th", head)), around(el("tbody"), rows.map((texts) => row("td", texts)))),
      ),
  ];
}
