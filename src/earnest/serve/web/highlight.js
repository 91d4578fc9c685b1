// Colours for code: comments, texts, numbers, words of the language. One pass of one expression, for
// languages whose comments and texts are spelled alike; others stay plain.

const MOST = 20_000; // characters; longer code stays plain

const C_WORDS =
  "abstract async await auto bool boolean break byte case catch char class const constexpr continue debugger default delete do " +
  "double else enum export extends extern false final finally float fn for from func function go goto if impl implements import in " +
  "inline instanceof int interface let long loop match mod move mut namespace new nil null nullptr of operator override package " +
  "private protected pub public ref return self short signed sizeof static string struct super switch template this throw trait " +
  "true try type typedef typename typeof undefined union unsafe unsigned use using val var virtual void volatile where while yield";
const HASH_WORDS =
  "False None True and as assert async await begin break case class continue def del do done elif else end ensure esac except export " +
  "false fi finally for from function global if import in is lambda local match module next nil nonlocal not null or pass raise " +
  "require rescue return self then true try unless until while with yield";
const SQL_WORDS =
  "add all alter and any as asc between by case check column create cross default delete desc distinct drop else end exists foreign " +
  "from full group having in index inner insert into is join key left like limit not null offset on or order outer primary " +
  "references right select set table then union unique update values view when where with";

const TEXT = String.raw`"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?`;
const NUMBER = String.raw`\b(?:0[xXbBoO][\da-fA-F_]+|\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)\b`;
const WORD = String.raw`[\p{L}_$][\p{L}\p{N}_$]*`;

function language(comment, text, words, ignoresCase = false) {
  const parts = `(?<comment>${comment})|(?<text>${text})|(?<number>${NUMBER})|(?<word>${WORD})`;
  return { expression: new RegExp(parts, "gu"), words: new Set(words.split(" ")), ignoresCase };
}

const C = language(String.raw`\/\/[^\n]*|\/\*[^]*?(?:\*\/|$)`, String.raw`${TEXT}|${"`"}(?:\\.|[^${"`"}\\])*${"`"}?`, C_WORDS);
const HASH = language(String.raw`#[^\n]*`, String.raw`"""[^]*?(?:"""|$)|'''[^]*?(?:'''|$)|${TEXT}`, HASH_WORDS);
const SQL = language(String.raw`--[^\n]*|\/\*[^]*?(?:\*\/|$)`, TEXT, SQL_WORDS, true);

const LANGUAGES = {
  ...Object.fromEntries(
    "c cc cpp c++ cs csharp css dart go java javascript js json jsx kotlin kt php rs rust scala scss swift ts tsx typescript zig"
      .split(" ")
      .map((name) => [name, C]),
  ),
  ...Object.fromEntries("bash elixir julia perl py python r rb ruby sh shell toml yaml yml zsh".split(" ").map((name) => [name, HASH])),
  sql: SQL,
};

/** The code as nodes: plain text, and spans of class "comment", "text", "number" or "word". */
export function coloured(code, name) {
  const key = name.toLowerCase();
  const known = Object.hasOwn(LANGUAGES, key) && code.length <= MOST ? LANGUAGES[key] : null;
  if (!known) return [code];
  const nodes = [];
  let at = 0;
  for (const found of code.matchAll(known.expression)) {
    const [kind] = Object.entries(found.groups).find(([, part]) => part !== undefined);
    const word = known.ignoresCase ? found[0].toLowerCase() : found[0];
    if (kind === "word" && !known.words.has(word)) continue;
    const span = document.createElement("span");
    span.className = kind;
    span.textContent = found[0];
    nodes.push(code.slice(at, found.index), span);
    at = found.index + found[0].length;
  }
  return [...nodes, code.slice(at)];
}
