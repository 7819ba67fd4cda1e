// llama.cpp (the npm package node-llama-cpp) behind a pipe: dev/check_runtimes.py writes a request per line of JSON and
// reads a line of JSON for each.
//
//     node llama.mjs FOLDER CONTEXT CACHE    FOLDER holds node_modules; CACHE is F32 or F16

import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

const [folder, contextSize, cache] = process.argv.slice(2);
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(`${folder}/node_modules/node-llama-cpp/dist/index.js`));
const llama = await getLlama({ gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: 1 });
const opened = new Map(); // path -> {model, sequence}
const ALL = { temperature: 1, topK: 0, topP: 1, minP: 0 }; // a softmax over the whole vocabulary, nothing cut

async function open(modelPath) {
  if (!opened.has(modelPath)) {
    const model = await llama.loadModel({ modelPath });
    const types = { experimentalKvCacheKeyType: cache, experimentalKvCacheValueType: cache };
    const context = await model.createContext({ contextSize: Number(contextSize), threads: 1, flashAttention: false, ...types });
    opened.set(modelPath, { model, sequence: context.getSequence() });
  }
  return opened.get(modelPath);
}

const answers = {
  template: ({ model }) => model.fileInfo.metadata.tokenizer.chat_template,
  // Ids of texts; special: names of special tokens are read as such.
  tokenize: ({ model }, { texts, special }) => texts.map((text) => model.tokenize(text, special)),
  // The likeliest tokens after `tokens`, up to and with the first of `stops`.
  generate: async ({ sequence }, { tokens, limit, stops }) => {
    await sequence.clearHistory();
    const written = [];
    for await (const token of sequence.evaluate(tokens, { temperature: 0, yieldEogToken: true })) {
      written.push(token);
      if (written.length >= limit || stops.includes(token)) break;
    }
    return written;
  },
  // The probability of every token after `tokens`.
  probabilities: async ({ sequence }, { tokens }) => {
    await sequence.clearHistory();
    const last = [tokens.at(-1), { generateNext: { probabilities: true, options: ALL } }];
    const output = await sequence.controlledEvaluate([...tokens.slice(0, -1), last]);
    const pairs = [...output[tokens.length - 1].next.probabilities];
    return pairs.sort(([a], [b]) => a - b).map(([, probability]) => probability);
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const { op, path, ...request } = JSON.parse(line);
  process.stdout.write(`${JSON.stringify(await answers[op](await open(path), request))}\n`);
}
process.exit(0);
