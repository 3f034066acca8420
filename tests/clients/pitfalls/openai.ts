// What docs/guides/clients.md says that openai-node's types refuse; compiled, never run.
import OpenAI from "openai";

const client = new OpenAI();
const messages: OpenAI.ChatCompletionMessageParam[] = [];

// @ts-expect-error: not one of OpenAI's fields
await client.chat.completions.create({ model: "demo", messages, reduction_ratio: 0.5 });

const answer = await client.chat.completions.create({ model: "demo", messages });
// @ts-expect-error: not one of OpenAI's fields
console.log(answer.usage?.vision_tokens);
