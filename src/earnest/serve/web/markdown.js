// Markdown to DOM nodes. What a model writes is data: every piece of it becomes text of a text node
// or of an element made here; no markup is parsed, no address is followed but http, https and mailto,
// and pictures become links. All of it takes linear time and bounded depth, whatever the text is.

import { copyButton, el } from "./dom.js";
import { coloured } from "./highlight.js";

const DEEPEST = 10; // lists and quotes inside each other
const MOST_OPEN = 40; // emphasis inside each other
const LONGEST_ADDRESS = 2000;
const SCHEMES = new Set(["http:", "https:", "mailto:"]);
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", "#39": "'", nbsp: "\u00a0" };

/**
 * Show `text` in `into`. Shown again with a longer text, only the blocks that changed are made anew,
 * so that a stream is cheap and what is selected above stays so.
 * @param {HTMLElement} into
 * @param {string} text
 */
export function show(into, text) {
  const blocks = blocksOf(linesOf(text), 0);
  const before = into.markdownSources ?? [];
  let same = 0;
  while (same < before.length && same < blocks.length && before[same] === blocks[same].source) same++;
  while (into.childNodes.length > same) into.lastChild.remove();
  for (const block of blocks.slice(same)) into.append(block.make());
  into.markdownSources = blocks.map((block) => block.source);
}

/** An address that may be followed, or null. */
export function safeAddress(text) {
  if (text.length > LONGEST_ADDRESS) return null;
  try {
    const found = new URL(text); // relative ones throw: a model cannot know what is here
    return SCHEMES.has(found.protocol) ? found.href : null;
  } catch {
    return null;
  }
}

// --- blocks ---------------------------------------------------------------------------------------

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?=[ \t]|$)/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const MARKER = /^( {0,3})([-*+]|\d{1,9}[.)])(?=[ \t]|$)/;
const TABLE_RULE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

const linesOf = (text) => text.replace(/\r\n?/g, "\n").split("\n");
const blank = (line) => line.trim() === "";
const indentOf = (line) => line.length - line.trimStart().length;

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
    found.push({ source: lines.slice(at, end).join("\n"), apart, make });
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
  if (RULE.test(line)) return [at + 1, () => el("hr")];
  if (isTable(lines, at)) return table(lines, at);
  if (depth < DEEPEST && QUOTE.test(line)) return quote(lines, at, depth);
  if (depth < DEEPEST && MARKER.test(line)) return list(lines, at, depth);
  return paragraph(lines, at, depth);
}

function begins(line, depth) {
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line)) return true;
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
  const closing = new RegExp(`^ {0,3}${mark[0]}{${mark.length},}[ \\t]*$`);
  let end = at + 1;
  while (end < lines.length && !closing.test(lines[end])) end++;
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
    el("pre", { tabindex: "0" }, el("code", {}, ...coloured(text, language))),
  );
}

function quote(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end++;
  const blocks = blocksOf(
    lines.slice(at, end).map((line) => line.replace(QUOTE, "")),
    depth + 1,
  );
  return [end, () => el("blockquote", {}, ...blocks.map((block) => block.make()))];
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
    if (!marker || /\d/.test(marker[2]) !== ordered || RULE.test(lines[end])) break;
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
  return [end, () => el(ordered ? "ol" : "ul", { start }, ...items.map((item) => itemOf(...item, loose)))];
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
    if (!loose && node.tagName === "P") made.append(...node.childNodes);
    else made.append(node);
  }
  return made;
}

// --- tables ---------------------------------------------------------------------------------------

function isTable(lines, at) {
  const [head, rule] = [lines[at], lines[at + 1]];
  if (rule === undefined || !head.includes("|") || !rule.includes("-") || !TABLE_RULE.test(rule)) return false;
  return cells(head).length === cells(rule).length;
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
  const row = (tag, texts) =>
    el("tr", {}, ...head.map((_, i) => filled(tag, texts[i] ?? "", { class: alignments[i] })));
  return [
    end,
    () =>
      el(
        "div",
        { class: "table", tabindex: "0", role: "group", "aria-label": "Table" },
        el("table", {}, el("thead", {}, row("th", head)), el("tbody", {}, ...rows.map((texts) => row("td", texts)))),
      ),
  ];
}

// --- inside a line --------------------------------------------------------------------------------

/** An element with text in which emphasis, code and links are marked. */
function filled(tag, text, options = {}) {
  const made = el(tag, options);
  inline(made, text);
  return made;
}

const SPECIAL = /[\\`*_~[\]!<&\n]|\$\$|https?:\/\//g;
const CJK = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Hangul}]/u;
const PUNCTUATION = /[!-/:-@[-`{-~]/;

function inline(into, text) {
  const runs = []; // of * _ ~ that may open or close emphasis
  const brackets = []; // [ that may begin a link
  const ticks = tickRuns(text);
  const missing = new Set(); // closing marks that do not come any more
  let at = 0;
  const say = (part) => {
    const node = document.createTextNode(part);
    into.append(node);
    return node;
  };
  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const next = SPECIAL.exec(text);
    if (!next) {
      say(text.slice(at));
      break;
    }
    if (next.index > at) say(text.slice(at, next.index));
    at = next.index;
    at = special(text, at, next[0]);
  }
  emphasise(runs);
  into.normalize();

  /** What begins at a special character; where it ends. */
  function special(whole, from, mark) {
    switch (mark) {
      case "\\":
        return escaped(from);
      case "`":
        return code(from);
      case "*":
      case "_":
      case "~":
        return run(from, mark);
      case "$$":
        return verbatim(from, "$$", "$$");
      case "!":
        if (whole[from + 1] !== "[") break;
        brackets.push({ node: say("!["), image: true, runs: runs.length });
        return from + 2;
      case "[":
        brackets.push({ node: say("["), image: false, runs: runs.length });
        return from + 1;
      case "]":
        return closed(from);
      case "<":
        return angle(from);
      case "&":
        return entity(from);
      case "\n":
        into.append(el("br"));
        return from + 1;
      default:
        return bare(from, mark);
    }
    say(mark);
    return from + mark.length;
  }

  function escaped(from) {
    const next = text[from + 1] ?? "";
    if (next === "(") return verbatim(from, "\\(", "\\)");
    if (next === "[") return verbatim(from, "\\[", "\\]");
    if (!PUNCTUATION.test(next)) {
      say("\\");
      return from + 1;
    }
    say(next);
    return from + 2;
  }

  function code(from) {
    const length = ticks.get(from);
    const end = ticks.closing(from);
    if (end === -1) {
      say("`".repeat(length));
      return from + length;
    }
    let inside = text.slice(from + length, end).replace(/\n/g, " ");
    if (inside.length > 2 && inside.startsWith(" ") && inside.endsWith(" ")) inside = inside.slice(1, -1);
    into.append(el("code", { text: inside }));
    return end + length;
  }

  /** Formulas stay as they are written: their stars and underscores mean something else. */
  function verbatim(from, opening, closing) {
    const end = missing.has(closing) ? -1 : text.indexOf(closing, from + opening.length);
    if (end === -1) {
      missing.add(closing);
      say(opening);
      return from + opening.length;
    }
    into.append(el("span", { class: "math", text: text.slice(from + opening.length, end).trim() }));
    return end + closing.length;
  }

  function run(from, mark) {
    let end = from;
    while (text[end] === mark) end++;
    const count = end - from;
    const before = from === 0 ? " " : text[from - 1];
    const after = text[end] ?? " ";
    // Chinese and Japanese put no spaces around: there `**重点：**内容` is meant to be bold, too.
    const loose = (character) => /\s/.test(character) || isPunctuation(character) || CJK.test(character);
    const left = !/\s/.test(after) && (!isPunctuation(after) || loose(before));
    const right = !/\s/.test(before) && (!isPunctuation(before) || loose(after));
    const node = say(text.slice(from, end));
    const open = mark === "_" ? left && (!right || isPunctuation(before)) : left;
    const close = mark === "_" ? right && (!left || isPunctuation(after)) : right;
    const fits = mark === "~" ? count === 2 : count <= 3;
    if (fits && (open || close)) runs.push({ mark, count, node, open, close });
    return end;
  }

  function closed(from) {
    const bracket = brackets.pop();
    const target = bracket ? destination(text, from + 1) : null;
    if (!target) {
      say("]");
      return from + 1;
    }
    emphasise(runs.splice(bracket.runs));
    const address = safeAddress(target.address);
    const shown = address
      ? link(address)
      : el("span", { class: "refused", title: "This address is not shown as a link" });
    let node = bracket.node.nextSibling;
    bracket.node.replaceWith(shown);
    while (node) {
      const following = node.nextSibling;
      shown.append(node);
      node = following;
    }
    if (bracket.image) {
      // Fetching it would tell its host that this was read.
      shown.prepend("Picture: ");
      if (shown.childNodes.length === 1) shown.append(address ?? target.address.slice(0, 80));
    } else brackets.length = 0; // no link in a link
    return target.end;
  }

  function angle(from) {
    const rest = text.slice(from, from + LONGEST_ADDRESS);
    const breaks = /^<br ?\/?>/i.exec(rest);
    if (breaks) {
      into.append(el("br"));
      return from + breaks[0].length;
    }
    const found = /^<((?:https?:\/\/|mailto:)[^\s<>]*)>/.exec(rest);
    const address = found && safeAddress(found[1]);
    if (!address) {
      say("<");
      return from + 1;
    }
    into.append(link(address, found[1]));
    return from + found[0].length;
  }

  function entity(from) {
    const found = /^&([a-z]{2,4}|#39);/.exec(text.slice(from, from + 7));
    const meant = found && Object.hasOwn(ENTITIES, found[1]) ? ENTITIES[found[1]] : null;
    say(meant ?? "&");
    return from + (meant ? found[0].length : 1);
  }

  function bare(from, scheme) {
    const before = from === 0 ? " " : text[from - 1];
    let [found] = /^[^\s<>"'`\\]*/.exec(text.slice(from, from + LONGEST_ADDRESS));
    while (/[.,:;!?*_~)\]]$/.test(found)) {
      if (found.endsWith(")") && found.split("(").length >= found.split(")").length) break;
      found = found.slice(0, -1);
    }
    const address = /\w/.test(before) || brackets.length > 0 ? null : safeAddress(found);
    if (!address) {
      say(scheme);
      return from + scheme.length;
    }
    into.append(link(address, found));
    return from + found.length;
  }
}

const isPunctuation = (character) => /[\p{P}\p{S}]/u.test(character);

function link(address, text = null) {
  const made = el("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow", title: address });
  if (text !== null) made.textContent = text;
  return made;
}

/** `(address "title")` at a place; null where there is none. */
function destination(text, from) {
  if (text[from] !== "(") return null;
  const window = text.slice(from + 1, from + 1 + LONGEST_ADDRESS);
  let depth = 0;
  for (let i = 0; i < window.length; i++) {
    if (window[i] === "\\") i++;
    else if (window[i] === "(") depth++;
    else if (window[i] === ")" && depth-- === 0) {
      const [, address] = /^\s*<?([^\s<>]*)>?/.exec(window.slice(0, i));
      return { address, end: from + i + 2 };
    }
  }
  return null;
}

/** Runs of backticks: how long each is, and where the next of the same length begins. */
function tickRuns(text) {
  const lengths = new Map();
  const byLength = new Map();
  for (const found of text.matchAll(/`+/g)) {
    lengths.set(found.index, found[0].length);
    if (!byLength.has(found[0].length)) byLength.set(found[0].length, []);
    byLength.get(found[0].length).push(found.index);
  }
  const used = new Map();
  return {
    get: (at) => lengths.get(at) ?? 1,
    closing(at) {
      const length = lengths.get(at);
      const places = byLength.get(length) ?? [];
      let i = used.get(length) ?? 0;
      while (i < places.length && places[i] <= at) i++;
      used.set(length, i);
      return places[i] ?? -1;
    },
  };
}

/** Pair runs of emphasis marks, inner ones first, and move what lies between into elements. */
function emphasise(runs) {
  const open = [];
  for (const run of runs) {
    while (run.close && run.count > 0) {
      let i = open.length - 1;
      while (i >= 0 && (open[i].mark !== run.mark || !fits(open[i], run))) i--;
      if (i < 0) break;
      wrap(open[i], run);
      open.length = open[i].count > 0 ? i + 1 : i;
    }
    if (run.open && run.count > 0 && open.length < MOST_OPEN) open.push(run);
  }
}

// CommonMark's rule of three: in `*a**b*` the two in the middle are no pair of the outer ones.
const fits = (opener, closer) =>
  !((opener.close || closer.open) && (opener.count + closer.count) % 3 === 0 && opener.count % 3 !== 0);

function wrap(opener, closer) {
  const width = opener.mark === "~" || (opener.count >= 2 && closer.count >= 2) ? 2 : 1;
  const made = el(opener.mark === "~" ? "del" : width === 2 ? "strong" : "em");
  let node = opener.node.nextSibling;
  opener.node.after(made);
  while (node && node !== closer.node) {
    const following = node.nextSibling;
    made.append(node);
    node = following;
  }
  for (const run of [opener, closer]) {
    run.count -= width;
    run.node.data = run.node.data.slice(width);
  }
}
