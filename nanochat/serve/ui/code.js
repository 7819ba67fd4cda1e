// Colours for code: comments, strings, numbers and the keywords most languages share. Nothing more is understood.

import { element } from "./dom.js";

const KEYWORDS = new Set(
  `and as assert async await auto bool break case catch char class const continue def del delete do double elif else end
  enum except export extends extern false finally float fn for from func function global go if impl import in include
  int interface is lambda let long loop match mod module mut new nil None nonlocal not null or package pass print pub
  public private protected raise return select self sizeof static string struct super switch template then this throw
  trait True False true try type typedef typeof union unsafe unsigned use using var virtual void where while with yield
  SELECT FROM WHERE INSERT UPDATE DELETE CREATE TABLE JOIN GROUP ORDER BY AND OR NOT NULL AS ON LIMIT echo fi done esac`.split(
    /\s+/,
  ),
);
const PLAIN = new Set(["text", "txt", "plain", "output", "console", "markdown", "md", "diff"]);
const HASH = new Set(["", "python", "py", "sh", "bash", "shell", "zsh", "ruby", "rb", "yaml", "yml", "toml", "r", "perl", "make"]);
const MAX_CHARS = 20000; // longer code is shown in one colour

// Nodes and strings that make up the code.
export function colored(text, language) {
  if (PLAIN.has(language) || text.length > MAX_CHARS) return [text];
  const comment = HASH.has(language) ? "#[^\\n]*" : language === "sql" || language === "lua" ? "--[^\\n]*" : "\\/\\/[^\\n]*|\\/\\*[^]*?(?:\\*\\/|$)";
  const token = new RegExp(
    `(${comment})|("""[^]*?(?:"""|$)|"(?:\\\\.|[^"\\\\\\n])*"?|'(?:\\\\.|[^'\\\\\\n])*'?)|(\\b\\d[\\w.]*)|([A-Za-z_]\\w*)`,
    "g",
  );
  const nodes = [];
  let at = 0;
  for (const match of text.matchAll(token)) {
    const [all, comments, strings, number, word] = match;
    const kind = comments ? "c" : strings ? "s" : number ? "n" : KEYWORDS.has(word) ? "k" : null;
    if (!kind) continue;
    nodes.push(text.slice(at, match.index), element("span", kind, all));
    at = match.index + all.length;
  }
  nodes.push(text.slice(at));
  return nodes;
}
