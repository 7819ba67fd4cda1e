// The chat page. Everything a model or a person wrote goes into the document as text, never as HTML.
"use strict";

const byId = (id) => document.getElementById(id);
const log = byId("log");
const welcome = byId("welcome");
const input = byId("input");

// The server's limits (nanochat/web.py).
const MAX_MESSAGES = 500;
const MAX_MESSAGE_CHARS = 8000;
const MAX_CONVERSATION_CHARS = 32000;
const HELP = `/temperature 0.8: how varied the answers are, 0 to 2 (0: always the likeliest token)
/topk 50: choose among so many likeliest tokens, 0 to 200 (0: among all)
/clear: start a new chat
/help: this list
Enter sends, Shift+Enter starts a new line, Escape stops an answer.`;

const settings = { temperature: null, top_k: null }; // null: the server's default
let conversation = []; // {role, parts: [{type, text}], view}
let running = null; // the AbortController of the answer being written

// --- drawing ---------------------------------------------------------------------------------------------------------

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

// Text between backticks as code, the rest as it is.
function appendInline(parent, text) {
  for (const piece of text.split(/(`[^`\n]+`)/)) {
    if (/^`[^`\n]+`$/.test(piece)) parent.append(element("code", "", piece.slice(1, -1)));
    else if (piece) parent.append(document.createTextNode(piece));
  }
}

// Fenced blocks become <pre>; a block that is still being written counts as open to the end.
function appendText(parent, text) {
  text.split(/^```[^\n]*(?:\n|$)/m).forEach((block, i) => {
    if (i % 2) {
      const pre = element("pre");
      pre.tabIndex = 0;
      pre.append(element("code", "", block.replace(/\n$/, "")));
      parent.append(pre);
    } else if (block.trim()) {
      // Text goes on in the same paragraph after a tool call.
      const last = parent.lastElementChild;
      const paragraph = last && last.tagName === "P" ? last : parent.appendChild(element("p"));
      appendInline(paragraph, block);
    }
  });
}

function drawParts(content, parts) {
  content.replaceChildren();
  for (const part of parts) {
    if (part.type === "text") {
      appendText(content, part.text);
      continue;
    }
    const last = content.lastElementChild;
    const paragraph = last && last.tagName === "P" ? last : content.appendChild(element("p"));
    paragraph.append(element("span", "tool", part.type === "python" ? part.text : `= ${part.text}`), " ");
  }
}

function scrollDown() {
  log.scrollTop = log.scrollHeight;
}

function atBottom() {
  return log.scrollHeight - log.scrollTop - log.clientHeight < 60;
}

function button(label, action) {
  const node = element("button", "", label);
  node.type = "button";
  node.addEventListener("click", action);
  return node;
}

function addMessage(role, parts) {
  welcome.hidden = true;
  const view = element("article", `message ${role}`);
  view.setAttribute("aria-label", role === "user" ? "You" : "Assistant");
  const content = view.appendChild(element("div", "content"));
  const actions = view.appendChild(element("div", "actions"));
  const message = { role, parts, view, content };
  if (role === "user") {
    actions.append(button("Edit", () => edit(message)));
  } else {
    actions.append(button("Copy", () => copy(message)), button("Regenerate", () => regenerate(message)));
  }
  drawParts(content, parts);
  conversation.push(message);
  log.append(view);
  scrollDown();
  return message;
}

function addNote(text, isError = false) {
  welcome.hidden = true;
  const note = element("p", isError ? "note error" : "note", text);
  note.setAttribute("role", isError ? "alert" : "status");
  log.append(note);
  scrollDown();
}

function plainText(message) {
  return message.parts
    .filter((part) => part.type === "text")
    .map((part) => part.text)
    .join("");
}

// --- the conversation --------------------------------------------------------------------------------------------------

// Forget a message and everything after it.
function forgetFrom(message) {
  stop();
  const index = conversation.indexOf(message);
  if (index < 0) return;
  while (message.view.nextSibling) message.view.nextSibling.remove();
  message.view.remove();
  conversation = conversation.slice(0, index);
}

function edit(message) {
  forgetFrom(message);
  input.value = plainText(message);
  growInput();
  input.focus();
}

function regenerate(message) {
  forgetFrom(message);
  answer();
}

async function copy(message) {
  try {
    await navigator.clipboard.writeText(plainText(message));
    byId("status").textContent = "Copied";
  } catch {
    addNote("The browser does not allow copying here: select the text instead.", true);
  }
}

function newChat() {
  stop();
  conversation = [];
  log.replaceChildren(welcome);
  welcome.hidden = false;
  input.focus();
}

function stop() {
  if (running) running.abort();
}

// Calls handle(object) for every event of a server-sent stream, however its bytes are cut into chunks.
async function readEvents(response, handle) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  let data = [];
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const lines = buffer.split("\n");
    buffer = lines.pop();
    for (const rawLine of lines) {
      const line = rawLine.replace(/\r$/, "");
      if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
      else if (line === "" && data.length) {
        handle(JSON.parse(data.join("\n")));
        data = [];
      }
    }
  }
}

async function explainFailure(response) {
  let detail = `The server answered ${response.status}.`;
  try {
    detail = (await response.json()).detail || detail;
  } catch {
    // not JSON: the status has to do
  }
  return detail;
}

function addPart(parts, type, text) {
  const last = parts[parts.length - 1];
  if (type === "text" && last && last.type === "text") last.text += text;
  else parts.push({ type, text });
}

// What the server is sent: as many of the latest exchanges as it accepts (it drops more when the model's context is full).
function recentMessages() {
  let messages = conversation.map((m) => ({ role: m.role, content: plainText(m).slice(0, MAX_MESSAGE_CHARS) }));
  const chars = () => messages.reduce((sum, m) => sum + m.content.length, 0);
  while (messages.length > MAX_MESSAGES || (chars() > MAX_CONVERSATION_CHARS && messages.length > 2)) {
    messages = messages.slice(2);
  }
  return messages;
}

async function answer() {
  const body = { messages: recentMessages() };
  for (const [name, value] of Object.entries(settings)) if (value !== null) body[name] = value;
  const controller = new AbortController();
  running = controller;
  showRunning();
  const message = addMessage("assistant", []);
  message.view.classList.add("waiting");
  let finished = false;
  try {
    const response = await fetch("/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal: controller.signal,
    });
    if (!response.ok) throw new Error(await explainFailure(response));
    await readEvents(response, (event) => {
      if (controller.signal.aborted) return;
      if (event.done) finished = true;
      if (event.error) throw new Error(event.error);
      if (event.left_out) log.insertBefore(element("p", "note", "The oldest messages no longer fit and are left out."), message.view);
      for (const [key, type] of [["token", "text"], ["python", "python"], ["python_output", "python_output"]]) {
        if (event[key] !== undefined) addPart(message.parts, type, event[key]);
      }
      const follow = atBottom();
      drawParts(message.content, message.parts);
      if (follow) scrollDown();
    });
    if (!finished) throw new Error("The connection ended before the answer did.");
    byId("status").textContent = `Assistant: ${plainText(message)}`;
  } catch (error) {
    if (!controller.signal.aborted) {
      addNote(error instanceof TypeError ? "The server can't be reached: is it still running?" : error.message, true);
    }
  } finally {
    message.view.classList.remove("waiting");
    // An answer of which nothing came leaves no empty message behind; asking again is then one click on Edit.
    if (!message.parts.length && !finished && conversation.includes(message)) {
      message.view.remove();
      conversation = conversation.filter((m) => m !== message);
    }
    if (running === controller) running = null;
    showRunning();
  }
}

// --- input -------------------------------------------------------------------------------------------------------------

function showRunning() {
  byId("send").hidden = running !== null;
  byId("stop").hidden = running === null;
}

function setNumber(name, label, text, low, high, whole) {
  if (text === "") {
    addNote(`${label} is ${settings[name] === null ? "the server's default" : settings[name]}.`);
    return;
  }
  const value = Number(text);
  if (!Number.isFinite(value) || value < low || value > high || (whole && !Number.isInteger(value))) {
    addNote(`${label} must be ${whole ? "a whole number" : "a number"} from ${low} to ${high}.`, true);
    return;
  }
  settings[name] = value;
  addNote(`${label} is now ${value}.`);
}

// Returns whether `text` was a command.
function command(text) {
  const match = /^\/(\w+)\s*(.*)$/.exec(text);
  if (!match) return false;
  const [, name, rest] = match;
  if (name === "temperature") setNumber("temperature", "Temperature", rest, 0, 2, false);
  else if (name === "topk") setNumber("top_k", "Top-k", rest, 0, 200, true);
  else if (name === "clear") newChat();
  else if (name === "help") addNote(HELP);
  else addNote(`There is no command /${name}: /help lists them.`, true);
  return true;
}

function growInput() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

function submit() {
  const text = input.value.trim();
  if (!text || running) return;
  input.value = "";
  growInput();
  if (command(text)) return;
  const last = conversation[conversation.length - 1];
  if (last && last.role === "user") forgetFrom(last); // it was never answered
  addMessage("user", [{ type: "text", text }]);
  answer();
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
input.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  }
});
input.addEventListener("input", growInput);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
byId("stop").addEventListener("click", () => {
  stop();
  input.focus();
});
byId("new-chat").addEventListener("click", newChat);

// --- theme and model card ----------------------------------------------------------------------------------------------

const systemDark = window.matchMedia("(prefers-color-scheme: dark)");

function stored() {
  try {
    return localStorage.getItem("theme");
  } catch {
    return null; // storage may be forbidden
  }
}

function showTheme() {
  document.documentElement.dataset.theme = stored() || (systemDark.matches ? "dark" : "light");
}

byId("theme").addEventListener("click", () => {
  const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  try {
    localStorage.setItem("theme", next);
    showTheme();
  } catch {
    document.documentElement.dataset.theme = next;
  }
});
systemDark.addEventListener("change", showTheme);
showTheme();

async function showModel() {
  try {
    const { model } = await (await fetch("/stats")).json();
    const params = model.params ? `${(model.params / 1e6).toFixed(1)}M parameters` : "";
    byId("model").textContent = [model.name, params, model.dtype].filter(Boolean).join(" · ");
  } catch {
    byId("model").textContent = "";
  }
}

showModel();
growInput();
input.focus();
