// Markdown inside a line, to DOM nodes: emphasis, code, formulas, links. One pass makes pieces of
// the text, one pairs the marks among them, one builds the nodes. None of them looks twice for what
// it did not find, so that all take linear time.

import { el } from "./dom.js";

const MOST_OPEN = 40; // elements inside each other, and marks that wait for their pair
const LONGEST_ADDRESS = 2000;
const SCHEMES = new Set(["http:", "https:", "mailto:"]);
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", "#39": "'", nbsp: "\u00a0" };

const SPECIAL = /[\\`*_~[\]!<&\n]|\$\$|https?:\/\//g;
const CJK = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Hangul}]/u;
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const BREAK = /<br ?\/?>/iy;
const ENTITY = /&([a-z]{2,4}|#39);/y;
const IN_ANGLES = /<((?:https?:\/\/|mailto:)[^\s<>]{0,2000})>/y;
// Chinese and Japanese set no space between an address and the full stop after it.
const ENDS_BARE = String.raw`\s<>"'${"`"}\\\u2018-\u201d\u3001\u3002\u3008-\u3011\uff01-\uff0f\uff1a-\uff20`;
const BARE = new RegExp(`[^${ENDS_BARE}]{0,2000}`, "y");
const BARE_IN_BRACKETS = new RegExp(`[^${ENDS_BARE}[\\]]{0,2000}`, "y");
const AFTER_BARE = new Set(".,:;!?*_~)]");

const isPunctuation = (character) => /[\p{P}\p{S}]/u.test(character);

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

/** An element with text in which emphasis, code and links are marked. */
export function filled(tag, text, options = {}) {
  const made = el(tag, options);
  build(made, piecesOf(text));
  return made;
}

/**
 * The pieces of a text, in order: a string; a node; `{bare, text}`, an address that stands alone; a
 * run of marks, `{mark, count, closes, opens}`; `{bracket, target}`, which begins a link or a
 * picture if it has a target; `{ends}`, where that one ends.
 */
function piecesOf(text) {
  const pieces = [];
  const runs = []; // of * _ ~ that may open or close emphasis
  const brackets = []; // [ that may begin a link
  const missing = new Set(); // closing marks that do not come any more
  let noAddressBefore = 0;
  let ticks = null;
  let parentheses = null;
  let at = 0;
  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const next = SPECIAL.exec(text);
    if (!next) break;
    if (next.index > at) pieces.push(text.slice(at, next.index));
    at = special(next.index, next[0]);
  }
  pieces.push(text.slice(at));
  pair(runs);
  return pieces;

  /** What begins at a special character; where it ends. */
  function special(from, mark) {
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
        return text[from + 1] === "[" ? opened("![", from) : said("!", from);
      case "[":
        return opened("[", from);
      case "]":
        return closed(from);
      case "<":
        return angle(from);
      case "&":
        return entity(from);
      case "\n":
        pieces.push(el("br"));
        return from + 1;
      default:
        return bare(from, mark);
    }
  }

  function said(part, from) {
    pieces.push(part);
    return from + part.length;
  }

  function escaped(from) {
    const next = text[from + 1] ?? "";
    if (next === "(") return verbatim(from, "\\(", "\\)");
    if (next === "[") return verbatim(from, "\\[", "\\]");
    return PUNCTUATION.test(next) ? said(next, from + 1) : said("\\", from);
  }

  function code(from) {
    ticks ??= tickRuns(text);
    const length = ticks.get(from);
    const end = ticks.closing(from);
    if (end === -1) return said("`".repeat(length), from);
    let inside = text.slice(from + length, end).replace(/\n/g, " ");
    if (inside.length > 2 && inside.startsWith(" ") && inside.endsWith(" ")) inside = inside.slice(1, -1);
    pieces.push(el("code", { text: inside }));
    return end + length;
  }

  /** Formulas stay as they are written: their stars and underscores mean something else. */
  function verbatim(from, opening, closing) {
    const end = missing.has(closing) ? -1 : text.indexOf(closing, from + opening.length);
    if (end === -1) {
      missing.add(closing);
      return said(opening, from);
    }
    pieces.push(el("span", { class: "math", text: text.slice(from + opening.length, end).trim() }));
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
    const open = mark === "_" ? left && (!right || isPunctuation(before)) : left;
    const close = mark === "_" ? right && (!left || isPunctuation(after)) : right;
    const fits = mark === "~" ? count === 2 : count <= 3;
    if (!fits || !(open || close)) return said(text.slice(from, end), from);
    const found = { mark, count, open, close, closes: 0, opens: [] };
    runs.push(found);
    pieces.push(found);
    return end;
  }

  function opened(bracket, from) {
    const found = { bracket, target: null, place: pieces.length, runs: runs.length };
    brackets.push(found);
    pieces.push(found);
    return from + bracket.length;
  }

  function closed(from) {
    const begin = brackets.pop();
    const target = begin && text[from + 1] === "(" ? destination(from + 1) : null;
    if (!target) return said("]", from);
    pair(runs.splice(begin.runs));
    begin.target = target;
    if (begin.bracket === "[") brackets.length = 0; // no link in a link
    else if (begin.place === pieces.length - 1) pieces.push(target.address ?? target.written.slice(0, 80));
    pieces.push({ ends: begin });
    return target.end;
  }

  /** `(address "title")` at a place; null where there is none. */
  function destination(from) {
    parentheses ??= pairsOf(text);
    const end = parentheses.get(from);
    if (end === undefined || end - from > LONGEST_ADDRESS) return null;
    const [, written] = /^\s*<?([^\s<>]*)/.exec(text.slice(from + 1, end));
    return { written, address: safeAddress(written), end: end + 1 };
  }

  function angle(from) {
    const breaks = foundAt(BREAK, text, from);
    if (breaks) {
      pieces.push(el("br"));
      return from + breaks[0].length;
    }
    const found = foundAt(IN_ANGLES, text, from);
    const address = found && safeAddress(found[1]);
    if (!address) return said("<", from);
    pieces.push({ bare: address, text: found[1] });
    return from + found[0].length;
  }

  function entity(from) {
    const found = foundAt(ENTITY, text, from);
    const meant = found && Object.hasOwn(ENTITIES, found[1]) ? ENTITIES[found[1]] : null;
    if (!meant) return said("&", from);
    pieces.push(meant);
    return from + found[0].length;
  }

  function bare(from, scheme) {
    if (from < noAddressBefore || /\w/.test(text[from - 1] ?? " ")) return said(scheme, from);
    const [run] = foundAt(brackets.length > 0 ? BARE_IN_BRACKETS : BARE, text, from);
    const found = withoutPunctuation(run);
    const address = safeAddress(found);
    if (!address) {
      noAddressBefore = from + run.length; // or each of many in a row would be read to the end
      return said(scheme, from);
    }
    pieces.push({ bare: address, text: found });
    return from + found.length;
  }
}

function foundAt(sticky, text, at) {
  sticky.lastIndex = at;
  return sticky.exec(text);
}

/** A bare address without what belongs to the sentence: `(see a.example/b_(c)).` ends at `(c)`. */
function withoutPunctuation(address) {
  let surplus = 0; // of closing parentheses
  for (const character of address) {
    if (character === "(") surplus--;
    else if (character === ")") surplus++;
  }
  let end = address.length;
  for (; AFTER_BARE.has(address[end - 1]); end--) {
    if (address[end - 1] !== ")") continue;
    if (surplus <= 0) break;
    surplus--;
  }
  return address.slice(0, end);
}

/** Of each "(" that is closed: where its ")" is. */
function pairsOf(text) {
  const found = new Map();
  const open = [];
  for (let i = 0; i < text.length; i++) {
    if (text[i] === "\\") i++;
    else if (text[i] === "(") open.push(i);
    else if (text[i] === ")" && open.length > 0) found.set(open.pop(), i);
  }
  return found;
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

/** Pair runs of emphasis marks, inner ones first. */
function pair(runs) {
  const open = [];
  for (const run of runs) {
    while (run.close && run.count > 0) {
      let i = open.length - 1;
      while (i >= 0 && (open[i].mark !== run.mark || !fits(open[i], run))) i--;
      if (i < 0) break;
      const width = run.mark === "~" || (open[i].count >= 2 && run.count >= 2) ? 2 : 1;
      open[i].opens.push(run.mark === "~" ? "del" : width === 2 ? "strong" : "em");
      open[i].count -= width;
      run.closes++;
      run.count -= width;
      open.length = open[i].count > 0 ? i + 1 : i;
    }
    if (run.open && run.count > 0) open.push(run);
    // Who has waited longest is the least likely to find its pair.
    if (open.length > MOST_OPEN) open.shift();
  }
}

// CommonMark's rule of three: in `*a**b*` the two in the middle are no pair of the outer ones.
const fits = (opener, closer) =>
  !((opener.close || closer.open) && (opener.count + closer.count) % 3 === 0 && opener.count % 3 !== 0);

/** Make nodes of pieces. */
function build(into, pieces) {
  const open = [into]; // innermost last
  const links = []; // of each link or picture that is open: whether it can be followed
  let followed = 0; // how many can
  let text = ""; // not yet in a node: one node for all that stands together

  const add = (node) => {
    if (text) open.at(-1).append(text);
    text = "";
    if (node) open.at(-1).append(node);
  };
  const begin = (node) => {
    // Deeper than anybody means: what is in it is shown in the one around.
    const shown = node && open.length <= MOST_OPEN ? node : null;
    add(shown);
    open.push(shown ?? open.at(-1));
  };
  const end = () => {
    add(null);
    open.pop();
  };

  for (const piece of pieces) {
    if (typeof piece === "string") text += piece;
    else if (piece instanceof Node) add(piece);
    else if (piece.bare) {
      if (followed) text += piece.text;
      else add(link(piece.bare, piece.text));
    } else if (piece.mark) {
      for (let i = 0; i < piece.closes; i++) end();
      text += piece.mark.repeat(piece.count);
      for (const tag of piece.opens.reverse()) begin(el(tag));
    } else if (piece.ends) {
      end();
      if (links.pop()) followed--;
    } else if (!piece.target) text += piece.bracket;
    else {
      const { address } = piece.target;
      const inside = followed > 0; // a picture in a link: the link is what is followed
      begin(inside ? null : address ? link(address) : refused());
      links.push(Boolean(address) && !inside);
      if (links.at(-1)) followed++;
      // Fetching it would tell its host that this was read.
      if (piece.bracket === "![") text += "Picture: ";
    }
  }
  add(null);
}

function link(address, text = null) {
  const made = el("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow", title: address });
  if (text !== null) made.textContent = text;
  return made;
}

const refused = () => el("span", { class: "refused", title: "This address is not shown as a link" });
