// Chats as files: one {"messages": [...]} per line, which other programs and this project's training read as well.

const ROLES = { user: "user", assistant: "assistant", system: "system", developer: "system", tool: "tool", function: "tool" };
const TEXTS = ["text", "input_text", "output_text", "refusal"];
const UNSAID = ["step-start", "reasoning"];
const CALCULATOR = ["python", "calculator", "calculate"]; // the names that nanochat.messages knows
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

// The parts of a message, or null where not all can be read; `bare`: whether it may have no content. The AI SDK's have
// `parts` instead, with marks of steps and hidden thoughts, which training leaves out too.
function toParts(message, bare) {
  const parts = message.parts?.filter?.((p) => !UNSAID.includes(p?.type));
  const content = message.content ?? parts ?? message.refusal ?? (bare ? "" : null);
  if (typeof content === "string") return [{ type: "text", text: content }];
  if (!Array.isArray(content)) return null;
  const plain = content.map((p) => (TEXTS.includes(p?.type) ? { type: "text", text: p.text ?? p.refusal } : p));
  const known = plain.every((p) => KINDS.includes(p?.type) && typeof p.text === "string");
  return known && (plain.length || bare) ? plain.map(({ type, text }) => ({ type, text })) : null;
}

// JSON as training writes it, but numbers as JavaScript does: 1, not 1.0.
function spaced(value) {
  if (Array.isArray(value)) return `[${value.map(spaced).join(", ")}]`;
  if (value === null || typeof value !== "object") return JSON.stringify(value ?? null);
  return `{${Object.entries(value).map(([key, each]) => `${JSON.stringify(key)}: ${spaced(each)}`).join(", ")}}`;
}

// What a call of a tool says, as training writes it: an expression for the calculator, else name(arguments).
function callText(call) {
  const { name, arguments: given } = call.function;
  const written = typeof given === "string" ? given : spaced(given);
  if (!CALCULATOR.includes(name)) return `${name}(${written})`;
  const texts = Object.values(parsed(written) ?? {}).filter((value) => typeof value === "string");
  return texts.length === 1 ? texts[0] : written;
}

// A chat of what stands in a file, or null if that is none.
function toChat(value, newChat) {
  const messages = Array.isArray(value) ? value : value?.messages;
  if (!Array.isArray(messages)) return null;
  const chat = { ...newChat(), system: "" };
  let calls = []; // that wait for their results: [id, part]
  let afterResult = false;
  for (const message of messages) {
    const role = Object.hasOwn(ROLES, String(message?.role)) ? ROLES[message.role] : null;
    const made = role === "assistant" && Array.isArray(message.tool_calls) ? [...message.tool_calls] : [];
    if (role === "assistant" && message.function_call) made.push({ function: message.function_call });
    const parts = role && toParts(message, role === "tool" || made.length > 0);
    if (!parts) return null;
    const last = chat.messages.at(-1);
    if (role === "tool") {
      const at = calls.findIndex(([id]) => message.tool_call_id == null || id == null || id === message.tool_call_id);
      if (at < 0 || last?.role !== "assistant") return null;
      const [[, call]] = calls.splice(at, 1);
      last.parts.splice(last.parts.indexOf(call) + 1, 0, { type: "python_output", text: parts.map((part) => part.text).join("") });
      afterResult = true;
      continue;
    }
    for (const call of made) {
      if (typeof call?.function?.name !== "string") return null;
      const part = { type: "python", text: callText(call) };
      parts.push(part);
      calls.push([call.id, part]);
    }
    if (role !== "assistant") calls = []; // a result can only follow the message that called
    if (role === "system") chat.system += (chat.system && "\n\n") + parts.map((part) => part.text).join("");
    else if (role === "assistant" && last?.role === "assistant") {
      const said = [last.parts, parts].every((each) => each.some((part) => part.text));
      const between = !afterResult && said ? [{ type: "text", text: "\n\n" }] : [];
      last.parts.push(...between, ...parts); // after a result it went on, else as training joins turns
    } else chat.messages.push({ role, parts });
    afterResult = false;
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
