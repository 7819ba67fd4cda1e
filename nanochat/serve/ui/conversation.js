// The conversation on the screen: what was said, and the answer that is being written.

import { ask } from "./api.js";
import { announce, byId, element, textButton } from "./dom.js";
import { MessageView, addPart, answerText, plainText } from "./messages.js";
import * as store from "./store.js";
import { ALTERNATIVES, remember } from "./tokens.js";

const log = byId("log");
const welcome = byId("welcome");

// The server's limits (/stats); until it has said them, these.
export const limits = { context: 0, messages: 500, message_chars: 8000, conversation_chars: 32000, max_tokens: 4096 };

export class Conversation {
  // hooks: changed() when a chat was saved, running(bool), refused() when a key is asked for.
  constructor(hooks) {
    this.hooks = hooks;
    this.chat = store.newChat();
    this.views = new Map();
    this.controller = null; // of the answer being written
    this.horizon = null; // the line above which the model sees nothing
    this.actions = {
      edit: (message, text) => {
        this.forgetFrom(message);
        this.say(text);
      },
      regenerate: (message) => {
        this.forgetFrom(message);
        this.answer();
      },
    };
  }

  get running() {
    return this.controller !== null;
  }

  get lastQuestion() {
    return this.views.get(this.chat.messages.findLast((message) => message.role === "user"));
  }

  // What the model is told first: a chat keeps its own, and new ones begin with the last that was set.
  get system() {
    return this.chat.system ?? store.settings.system;
  }

  set system(text) {
    this.chat.system = store.settings.system = text;
    store.saveSettings();
    if (this.chat.messages.length) store.saveChat(this.chat);
  }

  show(chat) {
    this.stop();
    this.chat = chat;
    this.views.clear();
    this.horizon = null;
    log.replaceChildren(welcome);
    for (const message of chat.messages) this.addView(message);
    welcome.hidden = chat.messages.length > 0;
    this.showRoom();
    store.currentId(chat.id);
    this.hooks.changed();
    this.scrollDown();
  }

  save() {
    if (!this.chat.messages.length) return;
    this.chat.updated = Date.now();
    this.chat.title ||= plainText(this.chat.messages[0]).replace(/\s+/g, " ").slice(0, 60);
    const gone = store.saveChat(this.chat);
    if (gone) {
      const what = gone === 1 ? "The oldest chat was" : `The ${gone} oldest chats were`;
      this.note(`${what} deleted to make room: this browser keeps no more. Settings can export them all to a file.`);
    }
    this.hooks.changed();
  }

  addView(message) {
    const view = new MessageView(message, this.actions);
    this.views.set(message, view);
    log.append(view.root);
    return view;
  }

  add(message) {
    welcome.hidden = true;
    this.chat.messages.push(message);
    const view = this.addView(message);
    this.scrollDown();
    return view;
  }

  note(text, isError = false, ...buttons) {
    welcome.hidden = true;
    const note = element("div", isError ? "note error" : "note", element("p", "", text), ...buttons);
    note.setAttribute("role", isError ? "alert" : "status");
    log.append(note);
    this.scrollDown();
  }

  // Forget a message and everything after it.
  forgetFrom(message) {
    this.stop();
    const index = this.chat.messages.indexOf(message);
    const root = this.views.get(message)?.root;
    if (index < 0 || !root) return;
    while (root.nextSibling) root.nextSibling.remove();
    root.remove();
    for (const gone of this.chat.messages.splice(index)) this.views.delete(gone);
    this.showRoom();
  }

  stop() {
    this.controller?.abort();
  }

  // Forgets the last question and what followed; returns whether there was one.
  undo() {
    const question = this.chat.messages.findLast((message) => message.role === "user");
    if (!question) return false;
    this.forgetFrom(question);
    this.save();
    if (!this.chat.messages.length) {
      store.deleteChat(this.chat.id);
      welcome.hidden = false;
      this.hooks.changed();
    }
    return true;
  }

  // Answers the last question again; returns whether there was one.
  retry() {
    const index = this.chat.messages.findLastIndex((message) => message.role === "user");
    if (index < 0) return false;
    const next = this.chat.messages[index + 1];
    if (next) this.forgetFrom(next);
    this.answer();
    return true;
  }

  say(text) {
    const last = this.chat.messages.at(-1);
    if (last?.role === "user") this.forgetFrom(last); // it was never answered
    this.add({ role: "user", parts: [{ type: "text", text }] });
    this.save();
    return this.answer();
  }

  // What the server is sent: as many of the latest exchanges as it accepts (it drops more when the model's context is full).
  request() {
    const system = this.system.trim();
    const size = (content) => (typeof content === "string" ? content.length : content.reduce((n, p) => n + p.text.length, 0));
    let messages = this.chat.messages.map((m) => {
      const parts = m.parts.map(({ type, text }) => ({ type, text }));
      const whole = m.role === "assistant" && parts.length <= 200 && size(parts) <= limits.message_chars;
      return { role: m.role, content: whole ? parts : plainText(m).slice(0, limits.message_chars) };
    });
    const chars = () => messages.reduce((sum, m) => sum + size(m.content), system.length);
    while (messages.length > 2 && (messages.length + 1 > limits.messages || chars() > limits.conversation_chars)) {
      messages = messages.slice(2);
    }
    const dropped = this.chat.messages.length - messages.length;
    if (system) messages.unshift({ role: "system", content: system });
    const chosen = Object.keys(store.RANGES).map((name) => [name, store.settings[name]]);
    const extra = store.settings.tokens ? { logprobs: ALTERNATIVES } : {};
    return { dropped, body: { messages, ...extra, ...Object.fromEntries(chosen.filter(([, value]) => value !== null)) } };
  }

  async answer() {
    this.stop();
    const { dropped, body } = this.request();
    const controller = new AbortController();
    this.controller = controller;
    this.hooks.running(true);
    const { chat } = this;
    const message = { role: "assistant", parts: [] };
    const view = this.add(message);
    view.waiting = true;
    let first = true;
    try {
      await ask(body, controller.signal, (event) => {
        if (controller.signal.aborted) return;
        if (first) this.showHorizon(dropped + (event.left_out ?? 0));
        first = false;
        this.receive(event, message, view);
      });
      announce(`Assistant: ${answerText(message)}`);
    } catch (error) {
      if (controller.signal.aborted) message.note = "stopped";
      else this.failed(error, message);
    } finally {
      view.waiting = false;
      if (this.controller === controller) {
        this.controller = null;
        this.hooks.running(false);
      }
      this.settle(chat, message, view);
    }
  }

  receive(event, message, view) {
    for (const [key, type] of [["token", "text"], ["python", "python"], ["python_output", "python_output"]]) {
      if (event[key] !== undefined) addPart(message.parts, type, event[key]);
    }
    if (store.settings.tokens) remember(message, event);
    if (event.usage) {
      const { prompt, completion } = event.usage;
      message.tokens = prompt + completion;
      this.showRoom();
      const speed = event.seconds > 0.05 ? ` · ${Math.round(completion / event.seconds)} tokens/s` : "";
      message.stats = `${completion} ${completion === 1 ? "token" : "tokens"}${speed}`;
      if (event.finish_reason === "length") message.note = "longest answer reached";
    }
    const follow = this.endInSight();
    view.drawSoon(() => follow && this.scrollDown());
  }

  // How much of the model's context the chat takes, as of its last answer.
  showRoom() {
    const used = this.chat.messages.findLast((message) => message.tokens > 0)?.tokens;
    const room = byId("room");
    room.hidden = !used || !limits.context;
    if (room.hidden) return;
    const full = Math.min(used, limits.context);
    Object.assign(byId("meter"), { max: limits.context, high: 0.75 * limits.context, value: full });
    const left = used >= 0.75 * limits.context ? ": when it is full, the oldest messages are forgotten" : "";
    room.lastChild.textContent = `${full.toLocaleString("en")} of ${limits.context.toLocaleString("en")} tokens of context${left}`;
  }

  // The model does not see the first `count` messages: one line says so, and moves along.
  showHorizon(count) {
    const view = this.views.get(this.chat.messages[Math.min(count, this.chat.messages.length - 2)]);
    if (!count || !view) {
      this.horizon?.remove();
      return;
    }
    const text = "The model's context is full: it no longer sees what is above this line.";
    if (!this.horizon) announce(text);
    this.horizon ??= element("div", "note horizon", element("p", "", text));
    log.insertBefore(this.horizon, view.root);
  }

  failed(error, message) {
    message.note = "cut short";
    // The same again would be refused again: what can be changed is the message.
    const refused = error.status === 400;
    this.note(
      error.message,
      true,
      textButton(refused ? "Edit the message" : "Try again", "", (event) => {
        event.currentTarget.closest(".note").remove();
        if (message.parts.length) this.forgetFrom(message);
        if (refused) this.lastQuestion?.edit();
        else this.answer();
      }),
    );
    if (error.status === 401) this.hooks.refused();
  }

  // An answer has ended, somehow. One of which nothing came leaves no empty message behind.
  settle(chat, message, view) {
    const nothing = !message.parts.length;
    if (nothing && message.note) {
      view.root.remove();
      this.views.delete(message);
      chat.messages = chat.messages.filter((m) => m !== message);
    } else {
      if (nothing) message.note = "the model said nothing";
      const follow = this.endInSight();
      view.draw();
      if (follow) this.scrollDown();
    }
    if (!chat.messages.length || (chat !== this.chat && !store.loadChat(chat.id))) return; // deleted meanwhile
    if (chat.messages.includes(message) || nothing) {
      if (chat === this.chat) this.save();
      else store.saveChat(chat);
    }
  }

  // Whether the reader is at the end of the conversation; then the page stays there.
  endInSight() {
    return log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  }

  scrollDown() {
    log.scrollTop = log.scrollHeight;
  }
}
