// Calls of the server that this page comes from; no other is ever asked.

import { $ } from "./dom.js";

let key = "";
let asking = null;

export class ApiError extends Error {
  constructor(message, param) {
    super(message);
    this.param = param;
  }
}

export const address = (path) => new URL(path, document.baseURI).href;

// Answers once the user has given a key; several calls wait for one dialog.
function askForKey() {
  asking ??= new Promise((resolve) => {
    const dialog = $("key-dialog");
    dialog.addEventListener("close", () => {
      key = $("key").value.trim();
      asking = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

async function send(path, body, signal) {
  const headers = { ...(body && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) };
  const options = { method: body ? "POST" : "GET", headers, signal, ...(body && { body: JSON.stringify(body) }) };
  const response = await fetch(address(path), options);
  if (response.status === 401) {
    await askForKey();
    return send(path, body, signal);
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  try {
    const { error } = await response.json();
    return new ApiError(error.message, error.param);
  } catch {
    return new ApiError(`the server answered ${response.status}`);
  }
}

export const usesKey = () => key !== "";
export const catalog = async () => (await send("v1/reducers")).json();
export const map = async (body, signal) => (await send("v1/reductions/map", body, signal)).json();

// Gives `onText` each piece of the answer, and returns {ttft, seconds, usage}; times in seconds.
export async function chat(body, signal, onText) {
  const began = performance.now();
  const streaming = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await send("v1/chat/completions", streaming, signal);
  let first = 0, last = began, usage = null;
  for await (const event of events(response.body)) {
    if (event.error) throw new ApiError(event.error.message, event.error.param);
    usage = event.usage ?? usage;
    const text = event.choices?.[0]?.delta?.content;
    if (!text) continue;
    last = performance.now();
    first ||= last;
    onText(text);
  }
  return { ttft: first ? (first - began) / 1000 : null, seconds: (last - (first || began)) / 1000, usage };
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const lines = buffer.split("\n");
    buffer = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}
