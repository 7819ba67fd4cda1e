// Markdown to document nodes. No HTML is ever parsed: whatever is not Markdown stays visible text. Only http, https and
// mailto links become links; pictures become links too, so that reading an answer fetches nothing.
//
// Known: paragraphs, # headings, lists (nested), > quotes, fenced code, tables, rules, **bold**, *italic*, ~~struck~~,
// `code`, [links](https://...), bare addresses and backslash escapes.

import { copyText, element, iconButton } from "./dom.js";
import { colored } from "./code.js";

const MAX_DEPTH = 8; // of quotes and lists in each other

// Cuts a text into the sources of its top-level blocks. While an answer grows only its last block changes.
export function splitBlocks(text) {
  const blocks = [];
  let lines = [];
  let fence = null;
  const flush = () => {
    if (lines.length) blocks.push(lines.join("\n"));
    lines = [];
  };
  for (const line of text.split("\n")) {
    const mark = /^ {0,3}(`{3,}|~{3,})/.exec(line);
    if (fence) {
      lines.push(line);
      if (mark && mark[1][0] === fence[0] && mark[1].length >= fence.length && !line.trim().slice(mark[1].length)) {
        fence = null;
        flush();
      }
    } else if (mark) {
      flush();
      lines.push(line);
      fence = mark[1];
    } else if (!line.trim()) {
      // A list goes on after an empty line when what follows is indented; blocks are joined again below.
      flush();
    } else {
      lines.push(line);
    }
  }
  flush();
  return joinLists(blocks);
}

const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(?:\s+|$)/;

// Items of one list that are separated by empty lines belong together.
function joinLists(blocks) {
  const joined = [];
  for (const block of blocks) {
    const last = joined[joined.length - 1];
    const mark = ITEM.exec(block);
    const lastMark = last !== undefined && ITEM.exec(last);
    const sameKind = mark && lastMark && /\d/.test(mark[2]) === /\d/.test(lastMark[2]);
    if (lastMark && !isRule(last) && !isRule(block) && (sameKind || /^(\s{2,}|\t)\S/.test(block))) {
      joined[joined.length - 1] = `${last}\n${block}`;
    } else joined.push(block);
  }
  return joined;
}

export function renderMarkdown(text) {
  const nodes = document.createDocumentFragment();
  for (const block of splitBlocks(text)) nodes.append(renderBlock(block));
  return nodes;
}

// The nodes of one block.
export function renderBlock(source, depth = 0) {
  const nodes = document.createDocumentFragment();
  const lines = source.split("\n");
  const fence = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/.exec(lines[0]);
  if (fence) nodes.append(codeBlock(lines, fence));
  else for (const group of groups(lines)) nodes.append(renderGroup(group, depth));
  return nodes;
}

const isRule = (line) => /^ {0,3}([-*_])\s*(?:\1\s*){2,}$/.test(line);

function kindOf(line) {
  if (isRule(line)) return "rule";
  if (/^ {0,3}#{1,6}(\s|$)/.test(line)) return "heading";
  if (/^ {0,3}>/.test(line)) return "quote";
  if (ITEM.test(line)) return "list";
  if (/^\s*\|/.test(line)) return "table";
  return "text";
}

// Lines of one kind that follow each other. Indented or plain lines after a list item belong to it.
function groups(lines) {
  const found = [];
  for (const line of lines) {
    const last = found[found.length - 1];
    let kind = kindOf(line);
    if (last?.kind === "list" && kind !== "rule" && (kind === "text" || /^\s{2,}/.test(line))) kind = "list";
    if (last?.kind === "quote" && kind === "text") kind = "quote";
    if (last && last.kind === kind && kind !== "heading" && kind !== "rule") last.lines.push(line);
    else found.push({ kind, lines: [line] });
  }
  return found;
}

function renderGroup({ kind, lines }, depth) {
  if (kind === "rule") return element("hr");
  if (kind === "heading") {
    const [, marks, title] = /^\s*(#+)\s*(.*?)\s*#*$/.exec(lines[0]);
    // The page has h1 and h2 itself.
    return inline(element(`h${Math.min(6, marks.length + 2)}`), title);
  }
  if (kind === "quote" && depth < MAX_DEPTH) {
    const quote = element("blockquote");
    const inside = lines.map((line) => line.replace(/^ {0,3}> ?/, "")).join("\n");
    for (const block of splitBlocks(inside)) quote.append(renderBlock(block, depth + 1));
    return quote;
  }
  if (kind === "list" && depth < MAX_DEPTH) return list(lines, depth);
  if (kind === "table" && lines.length > 1 && /^[\s|:-]*-[\s|:-]*$/.test(lines[1])) return table(lines);
  return inline(element("p"), lines.map((line) => line.replace(/^\s+/, "")).join("\n"));
}

function list(lines, depth) {
  const [, indent, mark] = ITEM.exec(lines[0]);
  const node = element(/\d/.test(mark) ? "ol" : "ul");
  if (node.tagName === "OL") node.start = parseInt(mark, 10);
  const items = [];
  for (const line of lines) {
    const found = ITEM.exec(line);
    if (found && found[1].length <= indent.length + 1) items.push([line.slice(found[0].length)]);
    else items[items.length - 1].push(line);
  }
  for (const [first, ...rest] of items) {
    const item = inline(element("li"), first);
    if (rest.length) {
      const shift = Math.min(...rest.map((line) => line.length - line.trimStart().length));
      const inner = rest.map((line) => line.slice(shift));
      if (ITEM.test(inner[0])) item.append(renderBlock(inner.join("\n"), depth + 1));
      else {
        const nested = inner.findIndex((line) => ITEM.test(line));
        const text = nested < 0 ? inner : inner.slice(0, nested);
        inline(item, `\n${text.join("\n")}`);
        if (nested >= 0) item.append(renderBlock(inner.slice(nested).join("\n"), depth + 1));
      }
    }
    node.append(item);
  }
  return node;
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const aligns = cells(lines[1]).map((mark) => (/^:-+:$/.test(mark) ? "center" : /-:$/.test(mark) ? "end" : "start"));
  const row = (line, tag) => {
    const node = element("tr");
    cells(line).slice(0, 50).forEach((cell, i) => {
      const box = inline(element(tag), cell);
      if (aligns[i] && aligns[i] !== "start") box.className = aligns[i];
      node.append(box);
    });
    return node;
  };
  const body = element("tbody", "", ...lines.slice(2).map((line) => row(line, "td")));
  const frame = element("div", "table", element("table", "", element("thead", "", row(lines[0], "th")), body));
  frame.tabIndex = 0;
  frame.setAttribute("role", "group");
  frame.setAttribute("aria-label", "Table");
  return frame;
}

function codeBlock(lines, fence) {
  const last = lines[lines.length - 1].trim();
  const closed = lines.length > 1 && last.length >= fence[1].length && /^(`+|~+)$/.test(last) && last[0] === fence[1][0];
  const text = lines.slice(1, closed ? -1 : undefined).join("\n");
  const pre = element("pre", "", element("code", "", ...colored(text, fence[2].toLowerCase())));
  pre.tabIndex = 0;
  pre.setAttribute("role", "group");
  pre.setAttribute("aria-label", "Code");
  const copy = iconButton("copy", "Copy the code", () => copyText(text, copy));
  return element("div", "code", element("div", "bar", element("span", "", fence[2] || "code"), copy), pre);
}

// --- inside a line -----------------------------------------------------------------------------------------------------

const PAIRS = [
  ["**", "strong"],
  ["__", "strong"],
  ["~~", "del"],
  ["*", "em"],
  ["_", "em"],
];

// Appends a text with its inline marks. One pass; a mark without its partner stays as it is.
function inline(parent, text, depth = 0) {
  const missing = new Set(); // marks that have no partner further on: looked for once, so the time stays linear
  let plain = "";
  let at = 0;
  const flush = () => {
    if (plain) parent.append(document.createTextNode(plain));
    plain = "";
  };
  const add = (node, length) => {
    flush();
    parent.append(node);
    at += length;
  };
  while (at < text.length) {
    const rest = text[at];
    if (rest === "\\" && /[\\`*_~[\](){}#+.!<>|-]/.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
    } else if (rest === "`" && addCode(text, at, missing, add)) continue;
    else if ((rest === "[" || (rest === "!" && text[at + 1] === "[")) && addLink(text, at, depth, add)) continue;
    else if (rest === "h" && addAddress(text, at, add)) continue;
    else if ("*_~".includes(rest) && depth < MAX_DEPTH && addPair(text, at, depth, missing, add)) continue;
    else {
      plain += rest;
      at += 1;
    }
  }
  flush();
  return parent;
}

function addCode(text, at, missing, add) {
  const mark = /`+/y;
  mark.lastIndex = at;
  const ticks = mark.exec(text)[0];
  if (missing.has(ticks)) return false;
  const end = text.indexOf(ticks, at + ticks.length);
  if (end < 0) {
    missing.add(ticks);
    return false;
  }
  add(element("code", "", text.slice(at + ticks.length, end).replace(/^ (.+) $/, "$1")), end + ticks.length - at);
  return true;
}

function addPair(text, at, depth, missing, add) {
  for (const [mark, tag] of PAIRS) {
    if (!text.startsWith(mark, at) || missing.has(mark)) continue;
    const begin = at + mark.length;
    if (!text[begin] || /\s/.test(text[begin])) continue;
    if (mark[0] === "_" && /\w/.test(text[at - 1] ?? "")) continue; // snake_case
    let end = text.indexOf(mark, begin + 1);
    while (end >= 0 && (/\s/.test(text[end - 1]) || (mark.length === 1 && text[end + 1] === mark))) {
      end = text.indexOf(mark, end + mark.length + (text[end + 1] === mark ? 1 : 0));
    }
    if (end < 0) {
      missing.add(mark);
      continue;
    }
    if (mark[0] === "_" && /\w/.test(text[end + mark.length] ?? "")) continue;
    add(inline(element(tag), text.slice(begin, end), depth + 1), end + mark.length - at);
    return true;
  }
  return false;
}

const SAFE_ADDRESS = /^(https?:\/\/|mailto:)[^\s<>"'`\\]+$/i;

function anchor(address, content) {
  const node = element("a", "", content);
  node.href = address;
  node.target = "_blank";
  node.rel = "noopener noreferrer nofollow";
  return node;
}

function addLink(text, at, depth, add) {
  const found = /!?\[([^\[\]\n]{0,300})\]\(([^()\s]{1,1000})(?:\s+"[^"\n]{0,200}")?\)/y;
  found.lastIndex = at;
  const match = found.exec(text);
  if (!match || !SAFE_ADDRESS.test(match[2])) return false;
  add(anchor(match[2], match[1] || match[2]), match[0].length);
  return true;
}

function addAddress(text, at, add) {
  const found = /https?:\/\/[^\s<>"'`\\()[\]]{1,1000}/y;
  found.lastIndex = at;
  const match = /\w/.test(text[at - 1] ?? "") ? null : found.exec(text);
  const address = match?.[0].replace(/[.,;:!?*_~]+$/, "");
  if (!address || !SAFE_ADDRESS.test(address)) return false;
  add(anchor(address, address), address.length);
  return true;
}
