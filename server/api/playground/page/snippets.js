// The request of a setting, as a program would send it; the image or video is a file there.

import { address } from "./api.js";

export function snippet(language, body, media, usesKey) {
  const shortened = shorten(body, media);
  if (language === "curl") return curl(shortened, media, usesKey);
  return language === "Python" ? python(shortened, media, usesKey) : javascript(shortened, media, usesKey);
}

const PLACE = "@@DATA@@";
const typeOf = (media) => media.url.slice(5, media.url.indexOf(";"));
const fileOf = (media) => `${media.kind}.${media.extension}`;

function shorten(body, media) {
  return JSON.parse(JSON.stringify(body), (name, value) => (name === "url" && value === media.url ? PLACE : value));
}

function curl(body, media, usesKey) {
  const json = JSON.stringify(body, null, 1).replaceAll("$", "\\$").replaceAll("`", "\\`");
  const data = `data:${typeOf(media)};base64,$(base64 -w0 ${fileOf(media)})`;
  const key = usesKey ? ` -H "Authorization: Bearer $KEY"` : "";
  return `curl -s ${address("v1/chat/completions")} -H 'Content-Type: application/json'${key} -d @- <<EOF\n${json.replace(PLACE, data)}\nEOF`;
}

function python(body, media, usesKey) {
  const { messages, model, reduction, ...others } = body;
  const lines = Object.entries(others).map(([name, value]) => `    ${name}=${literal(value)},`);
  if (reduction) lines.push(`    extra_body={"reduction": ${literal(reduction)}},`);
  const text = literal(messages, 1).replace(JSON.stringify(PLACE), "url");
  return `import base64
${usesKey ? "import os\n" : ""}from pathlib import Path

from openai import OpenAI

client = OpenAI(base_url="${address("v1")}", api_key=${usesKey ? 'os.environ["KEY"]' : '"none"'})
data = base64.b64encode(Path("${fileOf(media)}").read_bytes()).decode()
url = f"data:${typeOf(media)};base64,{data}"
answer = client.chat.completions.create(
    model=${literal(model)},
    messages=${text},
${lines.join("\n")}
)
print(answer.choices[0].message.content, answer.usage.vision_tokens)`;
}

function javascript(body, media, usesKey) {
  const json = JSON.stringify(body, null, 2).replace(JSON.stringify(PLACE), "url");
  const key = usesKey ? ", Authorization: `Bearer ${process.env.KEY}`" : "";
  return `import { readFile } from "node:fs/promises";

const data = await readFile("${fileOf(media)}", "base64");
const url = \`data:${typeOf(media)};base64,\${data}\`;
const body = ${json};
const response = await fetch("${address("v1/chat/completions")}", {
  method: "POST",
  headers: { "Content-Type": "application/json"${key} },
  body: JSON.stringify(body),
});
const answer = await response.json();
console.log(answer.choices[0].message.content, answer.usage.vision_tokens);`;
}

// JSON as Python writes it.
function literal(value, depth = 0) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  const inside = "    ".repeat(depth + 1), end = "    ".repeat(depth);
  if (Array.isArray(value)) return depth ? `[\n${value.map((one) => inside + literal(one, depth + 1)).join(",\n")},\n${end}]` : `[${value.map((one) => literal(one)).join(", ")}]`;
  if (typeof value === "object") return `{${Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${literal(one, depth && depth + 1)}`).join(", ")}}`;
  return JSON.stringify(value);
}
