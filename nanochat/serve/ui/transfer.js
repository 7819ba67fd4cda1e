// Chats as files: one {"messages": [...]} per line, which other programs and this project's training read as well.

const ROLES = { user: "user", assistant: "assistant", system: "system", developer: "system" };
const KINDS = ["text", "python", "python_output"];

// The chat in the form of OpenAI's messages; the answers with the calculator's work keep their parts.
export function record(chat) {
  const system = chat.system ? [{ role: "system", content: chat.system }] : [];
  const said = chat.messages.map(({ role, parts }) => {
    const plain = parts.every((part) => part.type === "text");
    return { role, content: plain ? parts.map((part) => part.text).join("") : parts.map(({ type, text }) => ({ type, text })) };
  });
  return { messages: [...system, ...said], title: chat.title, updated: chat.updated, id: chat.id };
}

export function download(name, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function toParts(content) {
  if (typeof content === "string") return [{ type: "text", text: content }];
  const known = Array.isArray(content) && content.every((p) => KINDS.includes(p?.type) && typeof p.text === "string");
  return known ? content.map(({ type, text }) => ({ type, text })) : null;
}

// A chat of what stands in a file, or null if that is none.
function toChat(value, newChat) {
  const messages = Array.isArray(value) ? value : value?.messages;
  if (!Array.isArray(messages)) return null;
  const chat = { ...newChat(), system: "" };
  for (const message of messages) {
    const role = Object.hasOwn(ROLES, String(message?.role)) ? ROLES[message.role] : null;
    const parts = role && toParts(message.content);
    if (!parts) return null;
    if (role === "system") chat.system += (chat.system && "\n") + parts.map((part) => part.text).join("");
    else chat.messages.push({ role, parts });
  }
  if (!chat.messages.length) return null;
  if (/^[0-9a-f]{24}$/.test(value.id)) chat.id = value.id;
  if (Number.isFinite(value.updated)) chat.updated = Math.min(value.updated, Date.now());
  const title = typeof value.title === "string" && value.title ? value.title : chat.messages[0].parts.map((p) => p.text).join("");
  chat.title = title.replace(/\s+/g, " ").slice(0, 60);
  return chat;
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

// {chats, unreadable}: what is in a file of one chat, a list of chats, or one chat per line.
export function readChats(text, newChat) {
  const whole = parsed(text);
  let values = [whole];
  if (whole === undefined) values = text.split("\n").filter((line) => line.trim()).map(parsed);
  else if (Array.isArray(whole) && typeof whole[0]?.role !== "string") values = whole;
  const chats = values.map((value) => toChat(value ?? null, newChat));
  return { chats: chats.filter(Boolean), unreadable: chats.filter((chat) => !chat).length };
}
