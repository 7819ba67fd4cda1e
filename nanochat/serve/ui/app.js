// The chat page: wires the message box, the keys and the commands to the conversation and to the panels.

import { announce, byId, tellCuts } from "./dom.js";
import { initHelp, obey } from "./commands.js";
import { Conversation, limits } from "./conversation.js";
import * as panels from "./panels.js";
import * as store from "./store.js";

const input = byId("input");

const conversation = new Conversation({
  changed: showChats,
  running: (running) => {
    byId("send").hidden = running;
    byId("stop").hidden = !running;
  },
  refused: panels.askKey,
});

// --- chats -------------------------------------------------------------------------------------------------------------

function showChats() {
  panels.showChats(conversation.chat.id, { open: openChat, remove: deleteChat, renamed });
}

function renamed(id, title) {
  if (title && id === conversation.chat.id) conversation.chat.title = title;
  showChats();
}

function openChat(id) {
  const chat = store.loadChat(id);
  if (chat) conversation.show(chat);
  panels.openSidebar(false);
  input.focus();
}

function newChat() {
  conversation.show(store.newChat());
  panels.openSidebar(false);
  input.focus();
}

function deleteChat(id) {
  store.deleteChat(id);
  announce("Chat deleted");
  if (id === conversation.chat.id) conversation.show(store.newChat());
  else showChats();
}

// --- the message box ---------------------------------------------------------------------------------------------------

function growInput() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
  byId("send").disabled = !input.value.trim();
}

function submit() {
  const text = input.value.trim();
  if (!text || conversation.running) return;
  input.value = "";
  byId("cut").hidden = true;
  growInput();
  const question = obey(text, { conversation, newChat });
  if (question !== null) conversation.say(question);
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
input.addEventListener("input", growInput);
tellCuts(input);
input.addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    submit();
  } else if (event.key === "ArrowUp" && !input.value) {
    event.preventDefault();
    conversation.lastQuestion?.edit();
  }
});
byId("stop").addEventListener("click", () => {
  conversation.stop();
  input.focus();
});

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, dialog");
  if (event.key === "Escape" && !event.target.closest("dialog")) conversation.stop();
  else if (event.altKey && event.code === "KeyN") {
    event.preventDefault();
    newChat();
  } else if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    input.focus();
  }
});

// --- the rest ----------------------------------------------------------------------------------------------------------

function nameTheme() {
  byId("theme").querySelector("span").textContent = document.documentElement.dataset.theme === "dark" ? "Light theme" : "Dark theme";
}

byId("theme").addEventListener("click", () => {
  const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  store.saveTheme(next);
  nameTheme();
});
new MutationObserver(nameTheme).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
nameTheme();

for (const id of ["new-chat", "new-chat-small"]) byId(id).addEventListener("click", newChat);
initHelp();
for (const dialog of document.querySelectorAll("dialog")) {
  // A click beside the box closes it.
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.querySelector(".close").addEventListener("click", () => dialog.close());
}
panels.initSidebar();
panels.initSettings(conversation, () => {
  store.deleteAllChats();
  newChat();
});
panels.initTransfer(limits, showChats);
panels.initCard();
panels.initKey(start);
window.addEventListener("storage", showChats);
byId("search").addEventListener("input", showChats);
window.addEventListener("pagehide", () => conversation.running && conversation.save());

async function start() {
  const stats = await panels.showModel((error) => error.status === 401 && panels.askKey());
  if (!stats?.limits) return;
  Object.assign(limits, { context: stats.model.context_length ?? 0 }, stats.limits);
  input.maxLength = limits.message_chars;
  byId("set-max_tokens").max = limits.max_tokens;
  store.capAnswers(limits.max_tokens);
  conversation.showRoom();
  panels.showWelcome(stats, (text) => !conversation.running && conversation.say(text));
}

conversation.show((store.currentId() && store.loadChat(store.currentId())) || store.newChat());
byId("unscripted").remove();
growInput();
input.focus();
start();
