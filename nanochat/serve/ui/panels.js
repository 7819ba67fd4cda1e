// What stands beside the conversation: the list of chats, the settings, the model card, the key.

import { getStats } from "./api.js";
import { byId, element, iconButton, textButton } from "./dom.js";
import * as store from "./store.js";
import { download, readChats, record } from "./transfer.js";

// --- chats -------------------------------------------------------------------------------------------------------------

const DAY = 24 * 3600 * 1000;

function age(updated) {
  const today = new Date().setHours(0, 0, 0, 0);
  if (updated >= today) return "Today";
  if (updated >= today - DAY) return "Yesterday";
  return updated >= today - 7 * DAY ? "Last week" : "Earlier";
}

const MAX_TITLE = 60;

// Turns a chat's entry into a text box for its name.
function rename(row, chat, renamed) {
  const box = element("input");
  box.value = chat.title ?? "";
  box.maxLength = MAX_TITLE;
  box.setAttribute("aria-label", "New name of the chat");
  let open = true;
  const close = (title) => {
    if (!open) return; // taking the box away takes its focus too
    open = false;
    if (title && title !== chat.title) {
      const newest = store.loadChat(chat.id) ?? chat; // an answer may have come meanwhile
      store.saveChat({ ...newest, title });
    }
    renamed(chat.id, title);
  };
  box.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.key === "Enter") close(box.value.trim());
    else if (event.key === "Escape") close("");
  });
  box.addEventListener("blur", () => close(box.value.trim()));
  row.replaceChildren(box);
  box.select();
  box.focus();
}

// Lists the chats in which the words of the search box occur; `actions` are {open(id), remove(id), renamed(id, title)}.
export function showChats(currentId, actions) {
  const nav = byId("chats");
  const focused = nav.contains(document.activeElement);
  nav.replaceChildren();
  let group = "";
  let list = null;
  const words = byId("search").value;
  for (const chat of store.searchChats(words)) {
    const title = chat.title || "Untitled";
    if (age(chat.updated) !== group) {
      group = age(chat.updated);
      const heading = element("h2", "", group);
      list = element("ul");
      nav.append(heading, list);
    }
    const link = element("button", "chat", title);
    link.type = "button";
    link.title = title;
    if (chat.id === currentId) link.setAttribute("aria-current", "true");
    link.addEventListener("click", () => actions.open(chat.id));
    const row = element("li", "", link);
    row.append(
      iconButton("edit", `Rename the chat ${title}`, () => rename(row, chat, actions.renamed)),
      iconButton("trash", `Delete the chat ${title}`, () => actions.remove(chat.id)),
    );
    list.append(row);
  }
  if (!list) nav.append(element("p", "none", words.trim() ? "No chat has these words." : "Your chats will be listed here."));
  if (focused) nav.focus();
}

const veil = byId("veil");
const sidebar = byId("sidebar");

// On a phone the chats slide in over the conversation.
export function openSidebar(open) {
  document.body.classList.toggle("sidebar-open", open);
  byId("open-sidebar").setAttribute("aria-expanded", String(open));
  veil.hidden = !open;
  if (open) byId("close-sidebar").focus();
}

export function initSidebar() {
  byId("open-sidebar").addEventListener("click", () => openSidebar(true));
  for (const node of [byId("close-sidebar"), veil]) {
    node.addEventListener("click", () => {
      openSidebar(false);
      byId("open-sidebar").focus();
    });
  }
  sidebar.addEventListener("keydown", (event) => {
    if (event.key === "Escape") openSidebar(false);
  });
}

// --- settings ----------------------------------------------------------------------------------------------------------

const NAMES = Object.keys(store.RANGES);
const defaults = { temperature: 0.8, top_k: 50, top_p: 1, repetition_penalty: 1, max_tokens: 512 };

function fillSettings(conversation) {
  for (const name of NAMES) {
    const value = store.settings[name] ?? defaults[name];
    byId(`set-${name}`).value = value;
    byId(`out-${name}`).textContent = value;
  }
  byId("set-system").value = conversation.system;
  byId("set-tokens").checked = store.settings.tokens;
  byId("chats-moved").textContent = "";
}

export function showSettings(conversation) {
  fillSettings(conversation);
  byId("settings").showModal();
}

export function initSettings(conversation, forgetAll) {
  for (const name of NAMES) {
    byId(`set-${name}`).addEventListener("input", (event) => {
      store.settings[name] = Number(event.target.value);
      byId(`out-${name}`).textContent = event.target.value;
      store.saveSettings();
    });
  }
  byId("set-system").addEventListener("input", (event) => (conversation.system = event.target.value));
  byId("set-tokens").addEventListener("change", (event) => {
    store.settings.tokens = event.target.checked;
    store.saveSettings();
  });
  byId("reset-settings").addEventListener("click", () => {
    for (const name of NAMES) store.settings[name] = null;
    conversation.system = "";
    fillSettings(conversation);
  });
  const forget = byId("forget-all");
  const label = forget.textContent;
  forget.addEventListener("click", () => {
    // The first click asks, the second does it.
    if (forget.textContent === label) forget.textContent = "Really delete all?";
    else {
      forgetAll();
      byId("settings").close();
    }
  });
  byId("settings").addEventListener("close", () => (forget.textContent = label));
  byId("open-settings").addEventListener("click", () => showSettings(conversation));
}

// --- chats as files ----------------------------------------------------------------------------------------------------

const count = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

async function importFiles(files, longest) {
  const counts = { added: 0, known: 0, full: 0, unreadable: 0, long: 0 };
  for (const file of files) {
    const { chats, unreadable } = readChats(await file.text(), store.newChat);
    counts.unreadable += unreadable;
    for (const chat of chats) {
      counts[store.addChat(chat)] += 1;
      counts.long += chat.messages.filter((m) => m.parts.reduce((n, part) => n + part.text.length, 0) > longest).length;
    }
  }
  return [
    `${count(counts.added, "chat")} imported.`,
    counts.known && `${count(counts.known, "chat")} left out: here already.`,
    counts.full && `${count(counts.full, "chat")} left out: no room. Delete some first.`,
    counts.unreadable && `${count(counts.unreadable, "line")} left out: no chat in the form {"messages": [{"role", "content"}, …]}.`,
    counts.long && `${count(counts.long, "message")} longer than ${longest} characters: the model sees the beginning only.`,
  ].filter(Boolean).join(" ");
}

// `changed()` hears that there are more chats; limits.message_chars is how much of a message the server takes.
export function initTransfer(limits, changed) {
  const said = byId("chats-moved");
  byId("export-chats").addEventListener("click", () => {
    const chats = store.listChats();
    if (chats.length) download("nanochat-chats.jsonl", chats.map((chat) => `${JSON.stringify(record(chat))}\n`).join(""));
    said.textContent = chats.length ? `${count(chats.length, "chat")} written to nanochat-chats.jsonl.` : "There is no chat yet.";
    said.scrollIntoView({ block: "nearest" });
  });
  byId("import-chats").addEventListener("click", () => byId("import-file").click());
  byId("import-file").addEventListener("change", async (event) => {
    said.textContent = await importFiles([...event.target.files], limits.message_chars);
    event.target.value = "";
    said.scrollIntoView({ block: "nearest" }); // it stands at the end of a dialog that scrolls
    changed();
  });
}

// --- the model ---------------------------------------------------------------------------------------------------------

const GENERAL = ["Why is the sky blue?", "What is 24 * 17?", "Who are you?"]; // for a model that was not evaluated
const number = (value, unit = "") => (value === null || value === undefined ? null : `${value.toLocaleString("en")}${unit}`);

export function describeParams(params) {
  if (!params) return null;
  if (params < 1e6) return `${(params / 1e3).toFixed(0)}K`;
  return params >= 1e9 ? `${(params / 1e9).toFixed(2)}B` : `${(params / 1e6).toFixed(1)}M`;
}

function facts({ model, workers, running, waiting, uptime_seconds: uptime }) {
  const speeds = workers.map((worker) => worker.tokens_per_second).filter(Boolean);
  return [
    ["Name", model.name],
    ["Parameters", model.params && `${describeParams(model.params)} (${number(model.params)})`],
    ["Shape", model.n_layer && `${model.n_layer} layers, ${model.n_embd} wide`],
    ["Vocabulary", number(model.vocab_size, " tokens")],
    ["Context", number(model.context_length, " tokens")],
    ["Training steps", number(model.step)],
    ["Bits per byte", model.bpb ? `${model.bpb.toFixed(3)} on held-out text` : null],
    ["Validation loss", model.val_loss ? `${model.val_loss.toFixed(3)} nats per token of held-out answers` : null],
    ["Problems solved", typeof model.pass_at_1 === "number" ? `${Math.round(100 * model.pass_at_1)} % of held-out ones, in one try` : null],
    ["Number format", model.dtype],
    ["Runs on", workers.map((worker) => worker.device).join(", ")],
    ["Speed", speeds.length ? `${Math.round(speeds.reduce((a, b) => a + b, 0)).toLocaleString("en")} tokens/s` : "not measured yet"],
    ["Now", `${running} ${running === 1 ? "answer" : "answers"} being written, ${waiting} waiting`],
    ["Up for", uptime < 120 ? `${Math.round(uptime)} s` : uptime < 7200 ? `${Math.round(uptime / 60)} min` : `${Math.round(uptime / 3600)} h`],
  ].filter(([, value]) => value);
}

// What the name, the number and the format in the page's head mean: "d4 sft · 5.2M · float32".
function aboutModel({ name, n_layer: layers, params, dtype }) {
  const depth = /^d\d+\b/.test(name ?? "") && layers ? `${name}: a model of ${layers} layers` : name;
  const stage = { base: "which continues texts", mid: "which knows conversations", sft: "finetuned to answer", rl: "rewarded for right answers" }[(name ?? "").split(" ").at(-1)];
  const size = params ? `${describeParams(params)}: it has ${number(params)} parameters, the numbers it has learned` : null;
  return `${[[depth, stage].filter(Boolean).join(", "), size, dtype && `${dtype}: the format of its numbers`].filter(Boolean).join(". ")}. Click for more.`;
}

// The welcome: what the model has shown that it can do, and questions that it answers well.
export function showWelcome({ model }, ask) {
  const scores = model.scores ?? [];
  const named = (kept) => scores.filter(([, right]) => kept(right)).map(([task, right]) => `${task} (${Math.round(100 * right)}\u00a0%)`).join(", ");
  const good = named((right) => right >= 0.8);
  const poor = named((right) => right < 0.8);
  const said = [good && `In its evaluation it was good at ${good}.`, poor && `It often fails at ${poor}.`];
  if (scores.length) byId("knows").textContent = ["It was trained from scratch, and it is small.", ...said, "What it has not learned it may make up."].filter(Boolean).join(" ");
  const buttons = (model.suggestions ?? GENERAL).map((text) => textButton(text, "", () => ask(text)));
  byId("suggestions").replaceChildren(...buttons);
}

// Shows the model's name; returns what the server said. `failed(error)` hears when it can't be asked.
export async function showModel(failed) {
  try {
    const stats = await getStats();
    const { model } = stats;
    for (const name of NAMES) defaults[name] = stats.defaults[name] ?? defaults[name];
    const params = describeParams(model.params);
    byId("model").textContent = [model.name || "model", params, model.dtype].filter(Boolean).join(" · ");
    byId("open-model").title = byId("model-about").textContent = aboutModel(model);
    byId("dot").className = "ready";
    byId("facts").replaceChildren(...facts(stats).map(([name, value]) => element("div", "", element("dt", "", name), element("dd", "", value))));
    return stats;
  } catch (error) {
    byId("model").textContent = error.status === 401 ? "API key needed" : "no connection";
    byId("dot").className = "away";
    failed(error);
    return null;
  }
}

export function initCard() {
  byId("open-model").addEventListener("click", async () => {
    if (await showModel((error) => error.status === 401 && askKey())) byId("card").showModal();
  });
}

// --- the key -----------------------------------------------------------------------------------------------------------

export function askKey() {
  const dialog = byId("key");
  if (!dialog.open) dialog.showModal();
}

export function initKey(accepted) {
  const dialog = byId("key");
  dialog.addEventListener("close", () => {
    const typed = byId("key-input").value.trim();
    if (dialog.returnValue === "save" && typed) {
      store.apiKey(typed);
      accepted();
    }
    byId("key-input").value = "";
    dialog.returnValue = "";
  });
}
