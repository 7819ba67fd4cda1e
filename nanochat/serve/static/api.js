// Stands in for the server's api.js: the model runs in this browser, and what the page asks is answered here.

import { writeAnswer } from "./answer.js";
import { byId, element } from "./dom.js";
import { loadModel } from "./model.js";

export class ServerError extends Error {}

const facts = getFacts();
let model = null; // a promise, as soon as somebody wants the model
let loadedAt = null;
let speed = null; // tokens per second of the last answer

async function getFacts() {
  try {
    return await (await fetch("./model.json")).json();
  } catch {
    // From a disk (file:) browsers read no other file.
    const how = location.protocol === "file:" ? "open this folder through a web server, as `python -m http.server` is" : "is the network there?";
    throw new ServerError(`The page's files can't be read: ${how}.`);
  }
}

export async function getStats() {
  const { model: about, defaults, limits } = await facts;
  const device = loadedAt === null ? "this browser, once it is loaded" : `this browser, ${(await model).device}`;
  return {
    model: about,
    defaults,
    limits,
    workers: [{ device, tokens_per_second: speed }],
    running: 0,
    waiting: 0,
    uptime_seconds: loadedAt === null ? 0 : (performance.now() - loadedAt) / 1000,
  };
}

// Asks for an answer and calls handle(event) for each of its parts; loads the model first, if nobody has yet.
export async function ask(body, signal, handle) {
  const { defaults } = await facts;
  if ((body.repetition_penalty ?? 1) !== 1) throw new ServerError("This page has no repetition penalty: /repetition_penalty 1");
  const loaded = await load();
  signal.throwIfAborted();
  await writeAnswer(loaded, body, defaults, signal, (event) => {
    if (event.usage && event.seconds > 0.05) speed = event.usage.completion / event.seconds;
    handle(event);
  });
}

// --- loading -------------------------------------------------------------------------------------------------------------

const megabytes = (bytes) => `${(bytes / 1e6).toLocaleString("en", { maximumFractionDigits: bytes < 1e7 ? 1 : 0 })} MB`;

function load() {
  model ??= showLoading().catch((error) => {
    model = null; // the next question tries again
    const failure = new ServerError(`The model can't be loaded: ${error.message}`);
    offerModel(failure.message);
    throw failure;
  });
  return model;
}

async function showLoading() {
  const about = await facts;
  const bar = element("progress");
  bar.max = about.bytes;
  bar.setAttribute("aria-label", "Loading the model");
  const text = element("p", "", "");
  place.replaceChildren(bar, text);
  const loaded = await loadModel(about, (bytes) => {
    bar.value = bytes;
    text.textContent = bytes < about.bytes ? `${megabytes(bytes)} of ${megabytes(about.bytes)}` : "starting …";
    byId("model").textContent = `${about.model.name} · loading ${Math.floor((100 * bytes) / about.bytes)} %`;
  });
  loadedAt = performance.now();
  place.replaceChildren();
  byId("model").textContent = `${about.model.name} · ${loaded.device}`;
  document.body.classList.add("loaded");
  return loaded;
}

async function offerModel(text) {
  try {
    const about = await facts;
    const program = about.program_bytes ? `, and ${megabytes(about.program_bytes)} of program` : "";
    const button = element("button", "primary", `Load the model (${megabytes(about.bytes)}${program})`);
    button.type = "button";
    button.addEventListener("click", () => load().catch(() => {})); // what went wrong is said where the button was
    place.replaceChildren(button, element("p", "", text));
  } catch (error) {
    place.replaceChildren(element("p", "", error.message));
  }
}

// A service worker keeps the files for times without a network and sends the headers under which threads are allowed.
// Both begin with the next visit: so the page is visited once more as soon as there is a worker, or a newer one, unless
// the model is here already.
async function serveMyself() {
  if (!navigator.serviceWorker || !isSecureContext) return;
  navigator.serviceWorker.addEventListener("controllerchange", () => model ?? location.reload());
  await navigator.serviceWorker.register("./sw.js");
}

const place = byId("suggestions").parentNode.insertBefore(element("div"), byId("suggestions"));
place.id = "load";
const kept = navigator.serviceWorker && isSecureContext ? "It comes once, stays in this browser, and" : "It";
offerModel(`${kept} runs here: nothing that you write leaves this device.`);
serveMyself().catch((error) => console.info(`Without a service worker: one thread, and no page without a network (${error.message})`));
