// From a conversation to its answer, token by token: what the server does in nanochat/serve/chat.py, answer_events.py and
// generate/scheduler.py, for the one model that a page has loaded.
//
// The model is {context, special, tokenize(text), piece(id), next(tokens, settings)}: the most tokens it can see, the
// ids of its special tokens, the ids of a text, the bytes of an id, and the id that follows `tokens`.

import { useCalculator } from "./calculator.js";

const PARTS = {
  text: [],
  python: ["<|python_start|>", "<|python_end|>"],
  python_output: ["<|output_start|>", "<|output_end|>"],
};

// The ids of each message in turn, bos before the first; a system message is the beginning of the first question.
async function renderTurns(model, messages) {
  const { special } = model;
  let system = "";
  if (messages[0]?.role === "system") [system, messages] = [`${messages[0].content}\n\n`, messages.slice(1)];
  const turns = [];
  for (const [i, { role, content }] of messages.entries()) {
    const ids = i ? [] : [special["<|bos|>"]];
    if (role === "user") {
      ids.push(special["<|user_start|>"], ...(await model.tokenize(i ? content : system + content)), special["<|user_end|>"]);
    } else {
      ids.push(special["<|assistant_start|>"]);
      for (const { type, text } of typeof content === "string" ? [{ type: "text", text: content }] : content) {
        const [before, after] = PARTS[type];
        if (before) ids.push(special[before]);
        ids.push(...(await model.tokenize(text)));
        if (after) ids.push(special[after]);
      }
      ids.push(special["<|assistant_end|>"]);
    }
    turns.push(ids);
  }
  return turns;
}

// The prompt of a conversation in at most `room` tokens, and how many of the oldest messages were left out for it.
export async function fitContext(model, messages, room) {
  const system = messages[0]?.role === "system" ? messages.slice(0, 1) : [];
  const rest = messages.slice(system.length);
  for (let leftOut = 0; leftOut < rest.length; leftOut += 2) {
    const turns = await renderTurns(model, [...system, ...rest.slice(leftOut)]);
    const tokens = [...turns.flat(), model.special["<|assistant_start|>"]];
    if (tokens.length <= room) return { tokens, leftOut };
  }
  throw new Error(`The message is too long: it does not fit into the ${room} tokens that the model has for it. Shorten it.`);
}

// Turns ids into parts: text as its characters become whole, calls and results when they are complete.
class AnswerReader {
  constructor(model) {
    this.model = model;
    this.names = new Map(Object.entries(model.special).map(([name, id]) => [id, name]));
    this.decoder = new TextDecoder();
    this.inside = null; // "python" or "python_output"
    this.held = [];
  }

  read(id) {
    const name = this.names.get(id);
    if (name === undefined) {
      if (this.inside) {
        this.held.push(id);
        return null;
      }
      // Bytes that form no character are left out.
      const text = this.decoder.decode(this.model.piece(id), { stream: true }).replaceAll("\ufffd", "");
      return text ? { token: text } : null;
    }
    this.decoder = new TextDecoder();
    if (name === "<|python_start|>" || name === "<|output_start|>") {
      this.inside = name === "<|python_start|>" ? "python" : "python_output";
      this.held = [];
    } else if ((name === "<|python_end|>" || name === "<|output_end|>") && this.inside) {
      const part = { [this.inside]: decode(this.model, this.held) };
      this.inside = null;
      return part;
    }
    return null;
  }
}

function decode(model, ids) {
  return new TextDecoder().decode(new Uint8Array(ids.flatMap((id) => [...model.piece(id)])));
}

// What follows an id that was sampled: the calculator's result, when it closes an expression.
class ToolMachine {
  constructor(model) {
    this.model = model;
    this.expression = null; // ids since python_start; null: outside
  }

  async accept(id) {
    const { special } = this.model;
    if (id === special["<|python_start|>"]) this.expression = [];
    else if (id === special["<|python_end|>"] && this.expression) {
      const result = useCalculator(decode(this.model, this.expression));
      this.expression = null;
      // An expression that the calculator doesn't know gets no result, and the model goes on by itself.
      if (result !== null) {
        return [special["<|output_start|>"], ...(await this.model.tokenize(result)), special["<|output_end|>"]];
      }
    } else this.expression?.push(id);
    return [];
  }
}

// Writes the answer to a request of the page ({messages, temperature, top_k, top_p, max_tokens}); calls handle(event)
// for every part, as the server's stream has them.
export async function writeAnswer(model, request, defaults, signal, handle) {
  const settings = { ...defaults, ...request };
  const asked = Math.max(1, settings.max_tokens || model.context);
  const reserved = Math.max(1, Math.min(asked, Math.floor(model.context / 4)));
  const { tokens, leftOut } = await fitContext(model, request.messages, model.context - reserved);
  if (leftOut) handle({ left_out: leftOut });
  const { special } = model;
  const stops = [special["<|assistant_end|>"], special["<|bos|>"]];
  const [reader, tools] = [new AnswerReader(model), new ToolMachine(model)];
  const limit = Math.min(asked, model.context - tokens.length);
  const prompt = tokens.length;
  let [reason, began] = ["length", null];
  while (reason === "length" && tokens.length - prompt < limit) {
    const id = await model.next(tokens, settings);
    signal.throwIfAborted();
    began ??= performance.now();
    if (stops.includes(id)) reason = "stop";
    for (const next of [id, ...(await tools.accept(id))].slice(0, limit - (tokens.length - prompt))) {
      tokens.push(next);
      const event = reader.read(next);
      if (event) handle(event);
    }
  }
  const seconds = began === null ? 0 : (performance.now() - began) / 1000;
  handle({ finish_reason: reason, usage: { prompt, completion: tokens.length - prompt }, seconds });
}
