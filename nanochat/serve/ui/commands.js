// The commands of the message box: the same words as in the terminal chat (nanochat/serve/chat_commands.py).

import { byId, element } from "./dom.js";
import { showSettings } from "./panels.js";
import * as store from "./store.js";
import { download, record } from "./transfer.js";

const HELP = {
  "/help": "this list",
  "/clear": "new chat",
  "/retry": "answer the last message again",
  "/undo": "take back the last message and its answer",
  "/system TEXT": "what the model is told first; without a text: nothing",
  "/settings": "how answers are chosen",
  "/temperature X": "0 takes the likeliest token every time; higher is more varied",
  "/top_k N": "choose among the N likeliest tokens; 0: among all",
  "/top_p X": "choose among the likeliest that together reach this probability; 1: among all",
  "/repetition_penalty X": "above 1 makes tokens that occurred already less likely",
  "/max_tokens N": "the longest answer, in tokens",
  "/save FILE": "write this chat to a file",
  "/quit": "end",
};
const ALIASES = { "/exit": "/quit", "/new": "/clear", "/topk": "/top_k", "/topp": "/top_p", "/regenerate": "/retry" };
const TAKES_TEXT = new Set(Object.keys(HELP).filter((usage) => usage.includes(" ")).map((usage) => usage.split(" ")[0]));
// A word alone, or with a number, was meant as a command; "/path what is this?" is a question.
const MISTYPED = /^\/[a-z_]+(\s+[-+]?[\d.]+)?$/i;

const ACTIONS = {
  "/help": () => byId("help").showModal(),
  "/clear": (_, page) => page.newChat(),
  "/retry": (_, { conversation }) => conversation.retry() || conversation.note("Nothing was said yet.", true),
  "/undo": (_, { conversation }) => conversation.undo() || conversation.note("Nothing was said yet.", true),
  "/system": (text, { conversation }) => {
    conversation.system = text.slice(0, store.MAX_SYSTEM);
    const cut = text.length > store.MAX_SYSTEM ? ` Only its first ${store.MAX_SYSTEM} characters are kept.` : "";
    conversation.note(text ? `The model is told this first.${cut}` : "The model is told nothing first.", Boolean(cut));
  },
  "/settings": (_, { conversation }) => showSettings(conversation),
  "/save": (name, { conversation }) => {
    if (!conversation.chat.messages.length) return conversation.note("Nothing was said yet.", true);
    return download(name || "chat.json", `${JSON.stringify(record(conversation.chat), null, 1)}\n`);
  },
  "/quit": (_, { conversation }) => conversation.note("Close this tab to end: the chats stay in this browser."),
};
for (const name of Object.keys(store.RANGES)) {
  ACTIONS[`/${name}`] = (text, { conversation }) => setNumber(conversation, name, text);
}

function setNumber(conversation, name, text) {
  const { label, low, high, whole } = store.RANGES[name];
  if (text === "") {
    conversation.note(`${label} is ${store.settings[name] ?? "the default"}.`);
  } else if (!store.inRange(name, Number(text))) {
    conversation.note(`${label} must be ${whole ? "a whole number" : "a number"} from ${low} to ${high}.`, true);
  } else {
    store.settings[name] = Number(text);
    store.saveSettings();
    conversation.note(`${label} is now ${store.settings[name]}.`);
  }
}

// Carries out a command and returns null, or returns the text that is meant for the model.
// `page` is {conversation, newChat()}.
export function obey(text, page) {
  if (/^\/\/\S/.test(text)) return text.slice(1);
  const [, word, value] = /^(\S*)\s*([^]*)$/.exec(text);
  const name = ALIASES[word.toLowerCase()] ?? word.toLowerCase();
  if (!ACTIONS[name]) {
    if (!MISTYPED.test(text)) return text;
    page.conversation.note(`There is no command ${word}: /help lists them. To say it to the model, write /${text}`, true);
  } else if (value && !TAKES_TEXT.has(name)) {
    page.conversation.note(`${name} stands alone. To say this to the model, write /${text}`, true);
  } else ACTIONS[name](value, page);
  return null;
}

export function initHelp() {
  const rows = Object.entries(HELP).map(([usage, meaning]) => [element("dt", "", element("code", "", usage)), element("dd", "", meaning)]);
  byId("commands").replaceChildren(...rows.flat());
  byId("open-help").addEventListener("click", () => byId("help").showModal());
}
