// What the browser keeps: chats and settings in localStorage, the API key in sessionStorage. Where storage is forbidden
// or full everything works for as long as the page is open.
//
// A chat is {id, title, updated, messages: [{role, parts: [{type, text}], note, stats}]}, one entry per chat, so that a
// new message rewrites only its own; the newest are listed first.

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

function write(key, value) {
  memory.set(key, value);
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
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
  return typeof chat?.id === "string" && Array.isArray(chat.messages) && chat.messages.every(isMessage);
}

export function listChats() {
  const chats = chatKeys().map(read).filter(isChat);
  return chats.sort((a, b) => (b.updated || 0) - (a.updated || 0));
}

export function loadChat(id) {
  const chat = read(PREFIX + id);
  return isChat(chat) ? chat : null;
}

// Saves a chat; when the storage is full the oldest ones make room.
export function saveChat(chat) {
  const others = listChats().filter((other) => other.id !== chat.id);
  for (const old of others.splice(MAX_CHATS - 1)) remove(PREFIX + old.id);
  while (!write(PREFIX + chat.id, chat) && others.length) remove(PREFIX + others.pop().id);
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
  return { id, title: "", updated: Date.now(), messages: [] };
}

export const settings = { temperature: null, top_k: null, top_p: null, max_tokens: null, system: "", ...read("nanochat.settings") };

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
