// Talking to the server.

import { apiKey } from "./store.js";

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function request(path, options = {}) {
  const key = apiKey();
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers }) // relative to the page, wherever a proxy has put it;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server can't be reached: is it still running?", 0);
  }
  if (response.ok) return response;
  let message = `The server answered ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // not our JSON: the status has to do
  }
  if (response.status === 429) message = `Many people are asking. ${message[0].toUpperCase()}${message.slice(1)}.`;
  throw new ServerError(message, response.status);
}

export async function getStats() {
  return (await request("stats")).json();
}

// Asks for an answer and calls handle(event) for each event of the stream.
export async function ask(body, signal, handle) {
  const response = await request("chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  let finished = false;
  await readEvents(response.body, (event) => {
    if (event.error) throw new ServerError(`The answer was cut short: ${event.error}.`, 500);
    if (event.done) finished = true;
    else handle(event);
  });
  if (!finished) throw new ServerError("The connection ended before the answer did.", 0);
}

// Calls handle(object) for every event of a server-sent stream, however its bytes are cut into chunks.
export async function readEvents(stream, handle) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
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
