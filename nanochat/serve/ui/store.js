// What the browser keeps: chats and settings in localStorage, the API key in sessionStorage. Where storage is forbidden
// or full everything works for as long as the page is open.
//
// A chat is {id, title, updated, system, messages: [{role, parts: [{type, text}], note, stats}]}, one entry per chat, so
// that a new message rewrites only its own; the newest are listed first.

const PREFIX = "nanochat.serve.chat.";
const MAX_CHATS = 200;
const memory = new Map();

function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key) ?? "null") ?? memory.get(key) ?? null;
  } catch {
    return memory.get(key) ?? null;
  }
}

// Returns false if there is no room.
function write(key, value) {
  memory.set(key, value);
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch (error) {
    return error.name !== "QuotaExceededError"; // where storage is forbidden, the memory has to do
  }
}

function remove(key) {
  memory.delete(key);
  try {
    localStorage.removeItem(key);
  } catch {
    // forbidden
  }
}

function chatKeys() {
  const keys = new Set([...memory.keys()].filter((key) => key.startsWith(PREFIX)));
  try {
    for (const key of Object.keys(localStorage)) if (key.startsWith(PREFIX)) keys.add(key);
  } catch {
    // forbidden
  }
  return [...keys];
}

function isChat(chat) {
  const isPart = (part) => typeof part?.type === "string" && typeof part.text === "string";
  const isMessage = (m) => ["user", "assistant"].includes(m?.role) && Array.isArray(m.parts) && m.parts.every(isPart);
  const known = typeof chat?.id === "string" && Array.isArray(chat.messages) && chat.messages.every(isMessage);
  return known && ["string", "undefined"].includes(typeof chat.title) && ["string", "undefined"].includes(typeof chat.system);
}

// The chats in which `words` occurs, in the title or in what was said; "" : all.
export function searchChats(words) {
  const wanted = words.trim().toLowerCase();
  const texts = (chat) => [chat.title ?? "", ...chat.messages.flatMap((m) => m.parts.map((part) => part.text))];
  return listChats().filter((chat) => !wanted || texts(chat).some((text) => text.toLowerCase().includes(wanted)));
}

export function listChats() {
  const chats = chatKeys().flatMap((key) => [read(key)].filter((chat) => isChat(chat) && key === PREFIX + chat.id));
  return chats.sort((a, b) => (b.updated || 0) - (a.updated || 0));
}

export function loadChat(id) {
  const chat = read(PREFIX + id);
  return isChat(chat) ? chat : null;
}

// Saves a chat; when there are too many, or the storage is full, the oldest ones make room. Returns how many did.
export function saveChat(chat) {
  const others = listChats().filter((other) => other.id !== chat.id);
  const before = others.length;
  for (const old of others.splice(MAX_CHATS - 1)) remove(PREFIX + old.id);
  while (!write(PREFIX + chat.id, chat) && others.length) remove(PREFIX + others.pop().id);
  return before - others.length;
}

// Adds a chat from a file: "added"; "known" if it is here already; "full" if there is no room. No other chat makes room.
export function addChat(chat) {
  const known = loadChat(chat.id);
  if (known && known.updated >= chat.updated) return "known";
  if (!known && chatKeys().length >= MAX_CHATS) return "full";
  if (write(PREFIX + chat.id, chat)) return "added";
  if (known) write(PREFIX + chat.id, known);
  else remove(PREFIX + chat.id);
  return "full";
}

export function deleteChat(id) {
  remove(PREFIX + id);
}

export function deleteAllChats() {
  for (const key of chatKeys()) remove(key);
}

export function newChat() {
  // randomUUID exists on https and localhost only.
  const id = [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return { id, title: "", updated: Date.now(), system: settings.system, messages: [] };
}

// What may be set, and between which values. The server may lower `high`.
export const RANGES = {
  temperature: { label: "Temperature", low: 0, high: 2 },
  top_k: { label: "Top-k", low: 0, high: 200, whole: true },
  top_p: { label: "Top-p", low: 0.01, high: 1 },
  repetition_penalty: { label: "Repetition penalty", low: 0.01, high: 2 },
  max_tokens: { label: "Longest answer", low: 1, high: 4096, whole: true },
};
export const MAX_SYSTEM = 2000;

export function inRange(name, value) {
  const { low, high, whole } = RANGES[name];
  return typeof value === "number" && value >= low && value <= high && (!whole || Number.isInteger(value));
}

// What another version, another program or a hand has left in the storage is taken where it makes sense.
function readSettings() {
  const kept = read("nanochat.settings");
  const result = { system: typeof kept?.system === "string" ? kept.system.slice(0, MAX_SYSTEM) : "" };
  result.tokens = kept?.tokens === true;
  for (const name of Object.keys(RANGES)) result[name] = inRange(name, kept?.[name]) ? kept[name] : null;
  return result;
}

// null: the server's value.
export const settings = readSettings();

// The longest answer there can be; a setting above it was made for another model.
export function capAnswers(most) {
  RANGES.max_tokens.high = most;
  if (settings.max_tokens > most) settings.max_tokens = null;
}

export function saveSettings() {
  write("nanochat.settings", settings);
}

export function saveTheme(theme) {
  try {
    localStorage.setItem("nanochat.theme", theme);
  } catch {
    // forbidden: it holds until the page is left
  }
}

// The chat that this tab shows survives a reload.
export function currentId(id) {
  try {
    if (id !== undefined) sessionStorage.setItem("nanochat.current", id);
    return sessionStorage.getItem("nanochat.current");
  } catch {
    return null;
  }
}

let keyInMemory = "";

export function apiKey(key) {
  if (key !== undefined) keyInMemory = key;
  try {
    if (key !== undefined) sessionStorage.setItem("nanochat.key", key);
    return sessionStorage.getItem("nanochat.key") ?? keyInMemory;
  } catch {
    return keyInMemory;
  }
}
