// The model in this browser: llama.cpp, compiled to WebAssembly, behind the few functions that answer.js needs.

export async function loadModel(facts, progress) {
  const { Wllama } = await import(facts.wllama.module);
  const logger = { debug() {}, log() {}, warn() {}, error: (...said) => console.info(...said) };
  const llama = new Wllama(
    { "single-thread/wllama.wasm": facts.wllama.single, "multi-thread/wllama.wasm": facts.wllama.multi },
    { logger, suppressNativeLog: true },
  );
  const file = await download(`./${facts.file}`, facts.bytes, progress);
  // Keys and values in float32, as in our engine: half as much memory would be other answers.
  await llama.loadModel([file], { n_ctx: facts.model.context_length, cache_type_k: "f32", cache_type_v: "f32", flash_attn: false });
  return new Model(llama, facts).readVocabulary();
}

async function download(path, bytes, progress) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path}: the host answered ${response.status}`);
  const parts = [];
  let size = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    size += value.length;
    progress(size);
  }
  if (size !== bytes) throw new Error(`${path} has ${size} bytes, not ${bytes}: reload the page, or upload the folder anew`);
  return new Blob(parts);
}

class Model {
  constructor(llama, { model, special }) {
    this.llama = llama;
    this.context = model.context_length;
    this.special = special;
    this.cached = []; // the ids whose keys and values llama.cpp holds
    this.settings = ""; // of the sampler
    this.last = Promise.resolve(); // the step that is being computed: there is one at a time
    const threads = llama.getNumThreads();
    this.device = threads === 1 ? "1 thread" : `${threads} threads`;
  }

  async readVocabulary() {
    const pieces = await this.llama.getVocab();
    this.pieces = pieces.slice(-this.llama.getLoadedContextInfo().n_vocab); // version 2.4 puts as many empty ones first
    return this;
  }

  // Special tokens that are written in a text are ordinary characters: nothing that a user writes can end a turn.
  async tokenize(text) {
    return text ? this.llama.tokenize(text, false) : [];
  }

  piece(id) {
    return this.pieces[id];
  }

  // The id that follows `tokens`. An answer that was stopped may still be at its last step when the next one begins.
  next(tokens, settings) {
    const step = this.last.then(() => this.compute([...tokens], settings));
    this.last = step.catch(() => (this.cached = []));
    return step;
  }

  async compute(tokens, { temperature, top_k, top_p }) {
    // Only what is new since the last step is computed; all of it when nothing is the same.
    let same = 0;
    while (same < tokens.length - 1 && this.cached[same] === tokens[same]) same += 1;
    if (same === 0) await this.llama.kvClear();
    else if (same < this.cached.length) await this.llama.kvRemove(same, -1);
    await this.llama.decode(tokens.slice(same), {});
    this.cached = tokens;
    // llama.cpp's own cuts (min_p, penalties) are off: our engine has none. One sampler draws for all answers: each new
    // one would begin with the same random numbers.
    const sampler = { temp: temperature, top_k, top_p: top_p || 1, min_p: 0, penalty_repeat: 1 };
    if (JSON.stringify(sampler) !== this.settings) await this.llama.samplingInit(sampler);
    this.settings = JSON.stringify(sampler);
    return (await this.llama.samplingSample()).token;
  }
}
