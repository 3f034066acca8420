// What docs/guides/clients.md says that goes wrong with openai-node and Vercel's ai.
import assert from "node:assert";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, streamText, type ModelMessage } from "ai";
import OpenAI, { BadRequestError } from "openai";
import { z } from "zod";

const scene = `data:image/png;base64,${readFileSync("docs/images/scene.png", "base64")}`;
const text = { type: "text" as const, text: "what is at the top right?" };
const image = { type: "file" as const, mediaType: "image/png", data: scene };
const plain = createOpenAICompatible({ name: "foldserve", baseURL: process.env.URL! })("demo");

async function kept(options: object, part: object = {}): Promise<unknown> {
  const messages: ModelMessage[] = [{ role: "user", content: [{ ...image, ...part }, text] }];
  const answer = await generateText({ model: plain, messages, maxOutputTokens: 2, ...options });
  return (answer.usage.raw?.vision_tokens as { kept: number }).kept;
}

test("extra_body is sent as it is, and refused", async () => {
  const client = new OpenAI({ baseURL: process.env.URL!, apiKey: "none" });
  const request = { model: "demo", messages: [{ role: "user" as const, content: "hello" }] };
  const answer = client.chat.completions.create({ ...request, ...{ extra_body: { reduction_ratio: 0.5 } } });
  await assert.rejects(answer, (error) => error instanceof BadRequestError && error.param === "extra_body");
});

test("options under the provider's name are sent", async () => {
  assert.equal(await kept({ providerOptions: { foldserve: { reduction_ratio: 0.5 } } }), 72);
});

test("options under another name, or beside messages, are dropped", async () => {
  assert.equal(await kept({ providerOptions: { openai: { reduction_ratio: 0.5 } } }), 144);
  assert.equal(await kept({ reduction_ratio: 0.5 }), 144);
});

test("detail is an option of the part", async () => {
  assert.equal(await kept({}, { providerOptions: { openaiCompatible: { detail: "low" } } }), 36);
});

test("a stream has no usage unless asked", async () => {
  const stream = streamText({ model: plain, prompt: "hello", maxOutputTokens: 2 });
  await stream.consumeStream();
  assert.equal((await stream.usage).totalTokens, undefined);
});

test("the schema is not sent unless told", async () => {
  const sent: any[] = [];
  const fetch: typeof globalThis.fetch = (url, request) => {
    sent.push(JSON.parse(String(request?.body)));
    return globalThis.fetch(url, request);
  };
  const output = Output.object({ schema: z.object({ answer: z.string() }) });
  for (const supportsStructuredOutputs of [false, true]) {
    const options = { name: "foldserve", baseURL: process.env.URL!, fetch, supportsStructuredOutputs };
    const model = createOpenAICompatible(options)("demo");
    await assert.rejects(generateText({ model, prompt: "hello", maxOutputTokens: 2, output }));
  }
  assert.deepEqual(sent.map((body) => body.response_format.type), ["json_object", "json_schema"]);
});
