// How one message looks, and how it grows.

import { byId, copyText, element, icon, iconButton, tellCuts, textButton } from "./dom.js";
import { renderBlock, renderMarkdown, splitBlocks } from "./markdown.js";
import { tokenView, tokensOf } from "./tokens.js";

// Characters of Unicode's private area stand for tool calls while a text is cut into blocks.
const FIRST_CHIP = 0xe000;
const PRIVATE = /[\ue000-\uf8ff]/g;

export function plainText(message) {
  return message.parts.map((part) => (part.type === "text" ? part.text : "")).join("");
}

// GSM8K and SpellingBee teach to write how, "####", and the result: the sign itself is for programs. A line that begins
// with four is a heading, unless a number is all that follows; other text must stand in the marker's own line.
const MARKER = /(?:\n\s*####[ \t]*([-+$€£]?\d[\d.,]*%?)|[^\S\n]+####[^\S\n]+(\S[^\n]*))\s*$/;
const HALF_MARKER = /\n\s*#{1,4}[ \t]*$/; // while it is being written
const CALLS_FIRST = /^(?:\s*[\ue000-\uf8ff])+\s*/;

// {work, answer}: what an answer was worked out with, "" if it says nothing of it, and what it says to people.
export function splitWork(text) {
  const found = MARKER.exec(text);
  if (found) return { work: text.slice(0, found.index), answer: found[1] ?? found[2] };
  const calls = CALLS_FIRST.exec(text)?.[0] ?? "";
  return { work: calls, answer: text.slice(calls.length).replace(HALF_MARKER, "") };
}

// What an answer says, without its work.
export const answerText = (message) => splitWork(plainText(message)).answer;

export function addPart(parts, type, text) {
  const last = parts[parts.length - 1];
  if (type === "text" && last?.type === "text") last.text += text;
  else parts.push({ type, text });
}

// The text with a private character in place of each tool call, and the calls.
function withChips(parts) {
  const chips = [];
  let text = "";
  for (const part of parts) {
    if (part.type === "text") text += part.text.replace(PRIVATE, "\ufffd");
    else if (part.type === "python_output" && chips.length && chips[chips.length - 1].output === null) {
      chips[chips.length - 1].output = part.text;
    } else if (chips.length < 6000) {
      const isCall = part.type === "python";
      text += String.fromCharCode(FIRST_CHIP + chips.length);
      chips.push({ call: isCall ? part.text : "", output: isCall ? null : part.text });
    }
  }
  return { text, chips };
}

function chipNode({ call, output }) {
  const node = element("span", "chip", icon("sum"), element("code", "", `${call} = ${output ?? "…"}`));
  node.title = "The calculator was asked";
  return node;
}

// Puts the calls where their private characters are.
function placeChips(root, chips) {
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) if (walker.currentNode.data.search(PRIVATE) >= 0) found.push(walker.currentNode);
  for (const node of found) {
    const pieces = node.data.split(/([\ue000-\uf8ff])/).map((piece) => {
      const chip = piece.length === 1 ? chips[piece.charCodeAt(0) - FIRST_CHIP] : undefined;
      return chip ? chipNode(chip) : piece;
    });
    node.replaceWith(...pieces);
  }
}

// The view of a message; `actions` are {edit(message, text), regenerate(message)}.
export class MessageView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.blocks = []; // what was drawn: {source, nodes}
    this.drawing = 0;
    this.root = element("article", `message ${message.role}`);
    this.root.setAttribute("aria-label", message.role === "user" ? "You" : "Assistant");
    this.content = this.root.appendChild(element("div", "content"));
    this.foot = this.root.appendChild(element("div", "foot"));
    this.inside = iconButton("tokens", "Look inside: the tokens and their probabilities", () => {
      this.asTokens = !this.asTokens;
      this.draw();
    });
    const said = () => (message.role === "user" ? plainText(message) : answerText(message));
    const copy = iconButton("copy", "Copy", () => copyText(said(), copy));
    if (message.role === "user") this.foot.append(iconButton("edit", "Edit", () => this.edit()), copy);
    else this.foot.append(copy, iconButton("redo", "Regenerate", () => actions.regenerate(message)), this.inside);
    this.stats = this.foot.appendChild(element("span", "stats"));
    this.draw();
  }

  set waiting(waiting) {
    this.root.classList.toggle("waiting", waiting);
    this.root.setAttribute("aria-busy", String(waiting));
  }

  // Draws at most once per frame, and only the blocks that have changed.
  drawSoon(after) {
    this.drawing ||= requestAnimationFrame(() => {
      this.draw();
      after();
    });
  }

  draw() {
    cancelAnimationFrame(this.drawing);
    this.drawing = 0;
    if (this.message.role === "user") this.content.replaceChildren(element("p", "", plainText(this.message)));
    else this.drawAnswer();
    this.stats.textContent = [this.message.note, this.message.stats].filter(Boolean).join(" · ");
  }

  drawAnswer() {
    this.inside.hidden = !tokensOf(this.message).length;
    this.asTokens ??= this.inside.hidden ? undefined : true;
    this.inside.setAttribute("aria-pressed", String(Boolean(this.asTokens)));
    if (!this.asTokens) {
      this.tokens?.remove();
      this.drawMarkdown();
      return;
    }
    const view = tokenView(this.message);
    this.blocks = [];
    this.content.replaceChildren(view);
    this.tokens = view;
  }

  drawMarkdown() {
    const { text, chips } = withChips(this.message.parts);
    const { work, answer } = splitWork(text);
    this.drawWork(work, chips);
    const keys = splitBlocks(answer).map((source) => {
      const inside = [...source.matchAll(PRIVATE)].map(([c]) => chips[c.charCodeAt(0) - FIRST_CHIP]);
      return { source, key: source + JSON.stringify(inside) };
    });
    let same = 0;
    while (same < this.blocks.length && same < keys.length && this.blocks[same].key === keys[same].key) same += 1;
    for (const { nodes } of this.blocks.splice(same)) for (const node of nodes) node.remove();
    for (const { source, key } of keys.slice(same)) {
      const fragment = renderBlock(source);
      placeChips(fragment, chips);
      const nodes = [...fragment.childNodes];
      this.content.append(...nodes);
      this.blocks.push({ key, nodes });
    }
    // For screen readers no level is left out, whatever the model did.
    let level = 2;
    for (const heading of this.content.querySelectorAll("h3, h4, h5, h6")) {
      level = Math.min(level + 1, Number(heading.tagName[1]));
      heading.setAttribute("aria-level", level);
    }
  }

  // What the answer was worked out with is folded; whoever has opened it keeps it open.
  drawWork(work, chips) {
    if (!work.trim()) {
      this.work?.remove();
      this.work = null;
      return;
    }
    this.work ??= element("details", "work", element("summary", "", chips.length ? "Worked out with the calculator" : "Worked out"), element("div"));
    const inside = renderMarkdown(work);
    placeChips(inside, chips);
    this.work.lastChild.replaceChildren(inside);
    if (this.content.firstChild !== this.work) this.content.prepend(this.work);
  }

  // Turns the message into a text box, in its place.
  edit() {
    const box = element("textarea");
    box.value = plainText(this.message);
    box.maxLength = byId("input").maxLength;
    tellCuts(box);
    box.setAttribute("aria-label", "Edit the message");
    const close = () => {
      this.root.classList.remove("editing");
      this.foot.hidden = false;
      this.draw();
    };
    const send = () => {
      const text = box.value.trim();
      if (text) this.actions.edit(this.message, text);
    };
    const buttons = element("div", "row", textButton("Cancel", "", close), textButton("Send", "primary", send));
    box.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      } else if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        send();
      }
    });
    const grow = () => {
      box.style.height = "auto";
      box.style.height = `${box.scrollHeight + 2}px`;
    };
    box.addEventListener("input", grow);
    this.root.classList.add("editing");
    this.foot.hidden = true;
    this.content.replaceChildren(box, buttons);
    grow();
    box.focus();
  }
}
