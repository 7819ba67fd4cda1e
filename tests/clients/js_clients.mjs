// OpenAI's JavaScript client and the AI SDK: whole, streamed, and with structured output. Prints {client: {check: result}}.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, Output, streamText, tool } from "ai";
import OpenAI from "openai";

const [baseURL, parameters] = [process.argv[2], JSON.parse(process.argv[3])];
const model = "any-name";
const talk = [
  { role: "system", content: "Be brief." },
  { role: "user", content: "The sky" },
  { role: "assistant", content: "is blue" },
  { role: "user", content: "And" },
  { role: "user", content: "sea" },
];

const client = new OpenAI({ baseURL, apiKey: "key", maxRetries: 0 });
const body = { model, messages: talk, temperature: 0, max_tokens: 12 };
const asked = { model, input: talk, temperature: 0, max_output_tokens: 12 };
const person = { type: "json_schema", json_schema: { name: "person", schema: parameters } };
const openaiChecks = {
  chat: async () => (await client.chat.completions.create(body)).choices[0].message.content,
  stream: async () => {
    let text = "";
    for await (const chunk of await client.chat.completions.create({ ...body, stream: true })) {
      text += chunk.choices[0].delta.content ?? "";
    }
    return text;
  },
  responses: async () => (await client.responses.create(asked)).output_text,
  "responses stream": async () => {
    let text = "";
    let last;
    for await (const event of await client.responses.create({ ...asked, stream: true })) {
      if (event.type === "response.output_text.delta") text += event.delta;
      last = event;
    }
    if (last.response.output[0].content[0].text !== text) throw new Error("the last event has another text");
    return text;
  },
  text: async () =>
    (await client.completions.create({ model, prompt: "The sky", temperature: 0, max_tokens: 5 })).choices[0].text,
  "json schema": async () =>
    JSON.parse(
      (
        await client.chat.completions.create({
          model,
          messages: [{ role: "user", content: "Who?" }],
          temperature: 0,
          max_tokens: 60,
          response_format: person,
        })
      ).choices[0].message.content,
    ),
  models: async () => (await client.models.list()).data.length,
};

function sdkChecks(model) {
  const [system, ...messages] = talk;
  const talking = { model, system: system.content, messages, temperature: 0, maxOutputTokens: 12 };
  const who = { model, prompt: "Who?", temperature: 0, maxOutputTokens: 60 };
  const schema = jsonSchema(parameters);
  return {
    chat: async () => (await generateText(talking)).text,
    stream: async () => {
      let text = "";
      for await (const piece of streamText(talking).textStream) text += piece;
      return text;
    },
    "json schema": async () => (await generateText({ ...who, output: Output.object({ schema }) })).output,
    tool: async () => {
      const tools = { person: tool({ description: "A person.", inputSchema: schema }) };
      return (await generateText({ ...who, tools, toolChoice: "required" })).toolCalls[0].input;
    },
    "tool stream": async () => {
      const tools = { person: tool({ description: "A person.", inputSchema: schema }) };
      return (await streamText({ ...who, tools, toolChoice: "required" }).toolCalls)[0].input;
    },
  };
}

const sdk = createOpenAI({ baseURL, apiKey: "key" });
const compatible = createOpenAICompatible({ baseURL, apiKey: "key", name: "local", supportsStructuredOutputs: true });
const clients = {
  openai: openaiChecks,
  "ai sdk, responses": sdkChecks(sdk(model)),
  "ai sdk, chat": sdkChecks(sdk.chat(model)),
  "ai sdk, compatible": sdkChecks(compatible(model)),
};
const results = {};
for (const [name, checks] of Object.entries(clients)) {
  results[name] = {};
  for (const [check, run] of Object.entries(checks)) {
    try {
      results[name][check] = await run();
    } catch (error) {
      results[name][check] = { failed: `${error.name}: ${error.message}`.slice(0, 500) };
    }
  }
}
console.log(JSON.stringify(results));
