// The page: two settings asked about one image or video, side by side.

import * as api from "./api.js";
import * as charts from "./charts.js";
import { $, make, number, show } from "./dom.js";
import * as tokenMap from "./map.js";
import * as mediaFiles from "./media.js";
import { Setting } from "./settings.js";
import { snippet } from "./snippets.js";

const WAIT_MS = 250; // for a slider to come to rest
const SMALL_SIDE = 240; // of a part's picture, in pixels
const EXAMPLE = "what number is shown?";
const state = { catalog: null, media: null, view: "a", part: 0, turns: [], results: {}, running: null, waiting: {}, lit: null, cursor: null,
  loads: 0, drawings: 0 };
const settings = {
  a: new Setting($("setting-a"), "a", { method: "folder", ratio: 0.5 }, changed),
  b: new Setting($("setting-b"), "b", { method: "none", ratio: 0.5 }, changed),
};

const text = (content) => ({ type: "text", text: content });

// The chat of a setting, up to a question; its own answers are part of it.
function bodyOf(name, question) {
  const messages = [];
  const questions = [...state.turns.map((turn) => turn.question), question];
  questions.forEach((content, i) => {
    messages.push({ role: "user", content: i ? content : [mediaFiles.part(state.media), text(content)] });
    if (i < state.turns.length) messages.push({ role: "assistant", content: state.turns[i].answers[name] || " " });
  });
  const { reduction } = settings[name];
  const asked = Object.keys(reduction).length ? reduction : { ratio: 0 }; // not the server's default
  return { model: state.catalog.model, messages, max_tokens: Number($("max-tokens").value) || 64, temperature: 0, reduction: asked };
}

// --- maps -------------------------------------------------------------------------------------------------------

function changed(setting, wait = WAIT_MS) {
  clearTimeout(state.waiting[setting.name]?.timer);
  state.waiting[setting.name]?.abort?.abort();
  const abort = new AbortController();
  const timer = setTimeout(() => fetchMap(setting, abort.signal), wait);
  state.waiting[setting.name] = { timer, abort };
  writeSnippet();
}

async function fetchMap(setting, signal) {
  if (!state.media) return;
  const { model, reduction } = bodyOf(setting.name, "");
  const content = [mediaFiles.part(state.media), text($("question").value || EXAMPLE)];
  try {
    setting.take(await api.map({ model, reduction, messages: [{ role: "user", content }] }, signal), null);
    show($("media-error"), state.media.note ?? "");
  } catch (error) {
    if (error.name === "AbortError") return;
    const isOfMedia = String(error.param ?? "").startsWith("messages");
    setting.take(null, isOfMedia ? null : error);
    if (isOfMedia) show($("media-error"), error.message);
  }
  await drawImage();
}

const shownMap = () => (state.view === "image" ? null : settings[state.view].map);

// A video without a map over it is shown frame by frame too.
function shownParts() {
  const map = shownMap() ?? (state.media.kind === "video" ? settings.a.map ?? settings.b.map : null);
  return map ? tokenMap.parts(map) : [];
}

async function drawImage() {
  if (!state.media) return;
  const { media } = state, parts = shownParts(), drawing = ++state.drawings;
  const isLate = () => drawing !== state.drawings;
  state.part = Math.min(state.part, Math.max(0, parts.length - 1));
  const gridsOf = (part) => (shownMap() ? part.grids : null);
  const picture = await media.frame(parts[state.part]?.seconds ?? 0);
  if (isLate()) return;
  const grids = parts.length ? gridsOf(parts[state.part]) : null;
  Object.assign(state, { shown: { picture, grids }, lit: null, cursor: null });
  redraw();
  const strip = partButtons(parts.length > 1 ? parts.map((part) => partText(part, gridsOf(part))) : []);
  for (const [i, button] of strip.entries()) {
    const small = await media.frame(parts[i].seconds ?? 0);
    if (isLate()) return;
    tokenMap.draw(button.firstChild, small, gridsOf(parts[i]), null, SMALL_SIDE);
  }
}

function partText({ name, seconds }, grids) {
  const when = seconds === undefined ? name : `${name} · ${number(seconds, 1)}\u00a0s`;
  if (!grids) return [when];
  const { encoded, kept } = tokenMap.counts(grids);
  return [when, `${number(kept)} of ${number(encoded)}`];
}

function partButtons(texts) {
  const strip = $("parts");
  strip.hidden = !texts.length;
  while (strip.childElementCount > texts.length) strip.lastChild.remove();
  while (strip.childElementCount < texts.length) {
    const place = strip.childElementCount;
    const button = make("button", { type: "button" }, make("canvas", { width: 0, height: 0 }), make("span"), make("b"));
    button.addEventListener("click", () => {
      state.part = place;
      drawImage();
    });
    strip.append(button);
  }
  for (const [i, [name, count = ""]] of texts.entries()) {
    const button = strip.children[i];
    button.setAttribute("aria-pressed", String(i === state.part));
    button.children[1].textContent = name;
    button.children[2].textContent = count;
  }
  return [...strip.children];
}

function redraw() {
  const { picture, grids } = state.shown;
  tokenMap.draw($("canvas"), picture, grids, state.lit);
  $("canvas").ariaLabel = grids
    ? `token map of setting ${state.view.toUpperCase()}: ${settings[state.view].kept.textContent}; arrow keys go from token to token`
    : `the ${state.media.kind}`;
}

function light(token) {
  state.lit = token && token.group >= 0 ? { grid: token.grid, group: token.group } : null;
  redraw();
}

$("canvas").addEventListener("pointermove", (event) => {
  if (!state.shown?.grids) return;
  const { left, top, width, height } = $("canvas").getBoundingClientRect();
  const token = tokenMap.tokenAt(state.shown.grids, (event.clientX - left) / width, (event.clientY - top) / height);
  $("tip").textContent = tokenMap.describe(token);
  if (token?.grid !== state.lit?.grid || token?.group !== state.lit?.group) light(token);
});
$("canvas").addEventListener("pointerleave", () => {
  $("tip").textContent = "";
  if (state.shown) light(null);
});
$("canvas").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  const grids = state.shown?.grids;
  if (!step || !grids) return;
  event.preventDefault();
  state.cursor = state.cursor ? tokenMap.beside(grids, state.cursor, step) ?? state.cursor : tokenMap.first(grids);
  $("tip").textContent = tokenMap.describe(state.cursor);
  light(state.cursor);
});
for (const button of document.querySelectorAll(".view")) {
  button.addEventListener("click", () => {
    state.view = button.dataset.view;
    for (const other of document.querySelectorAll(".view")) other.setAttribute("aria-pressed", String(other === button));
    drawImage();
  });
}

// --- image or video ----------------------------------------------------------------------------------------------

async function use(load) {
  const turn = ++state.loads;
  let media = null;
  try {
    media = await load();
  } catch (error) {
    show($("media-error"), error.message);
    return;
  }
  if (turn !== state.loads) return; // another was chosen meanwhile
  show($("media-error"), media.note ?? "");
  Object.assign(state, { media, part: 0 });
  clear();
  $("media-title").textContent = media.kind === "video" ? "Video" : "Image";
  document.querySelector(".view[data-view=image]").textContent = media.kind;
  for (const setting of Object.values(settings)) {
    setting.take(null, null);
    setting.offer(media.kind);
    changed(setting, 0);
  }
  await drawImage();
}

const useFile = (file) => file && use(() => mediaFiles.fromFile(file));
$("file").addEventListener("change", () => useFile($("file").files[0]));
$("scene").addEventListener("click", () => use(mediaFiles.scene));
document.addEventListener("paste", (event) => useFile([...event.clipboardData.files][0]));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").classList.add("over");
});
document.addEventListener("dragleave", () => $("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  useFile(event.dataTransfer.files[0]);
});

// --- chat -------------------------------------------------------------------------------------------------------

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || !state.media || state.running) return;
  const bodies = { a: bodyOf("a", question), b: bodyOf("b", question) };
  const turn = { question, answers: {} }, abort = new AbortController();
  const boxes = addTurn(question);
  state.running = abort;
  buttons();
  state.results = {};
  const ask = (name) => answer(name, bodies[name], turn, boxes[name], abort.signal);
  if ($("in-turn").checked) {
    await ask("a");
    await ask("b");
  } else {
    await Promise.all([ask("a"), ask("b")]);
  }
  state.running = null;
  if (Object.keys(turn.answers).length === 2) {
    state.turns.push(turn);
    $("question").value = "";
  }
  buttons();
  writeSnippet(question);
});

async function answer(name, body, turn, box, signal) {
  const shown = box.querySelector(".text"), stats = box.querySelector(".stats");
  box.classList.add("waiting");
  try {
    const result = await api.chat(body, signal, (piece) => { shown.textContent += piece; });
    turn.answers[name] = shown.textContent;
    state.results[name] = result;
    const vision = result.usage?.vision_tokens;
    stats.textContent = [
      result.ttft === null ? "no token" : `first token after ${number(result.ttft * 1000)} ms`,
      `${result.usage?.completion_tokens ?? "?"} tokens`,
      vision ? `${vision.kept} of ${vision.encoded} vision tokens` : "",
    ].filter(Boolean).join(" · ");
  } catch (error) {
    const message = error.name === "AbortError" ? "stopped" : error.message;
    box.append(make("p", { className: "error", role: "alert" }, message));
  }
  box.classList.remove("waiting");
  charts.draw($("charts"), charts.rows(state.results, state.catalog));
}

function addTurn(question) {
  const boxes = Object.fromEntries(["a", "b"].map((name) => [name, make("div", { className: `answer ${name}` },
    make("p", { className: "text" }), make("p", { className: "stats" }))]));
  const label = make("p", { className: "asked" }, question);
  $("turns").prepend(make("li", {}, label, make("div", { className: "answers" }, boxes.a, boxes.b)));
  return boxes;
}

function clear() {
  state.running?.abort();
  Object.assign(state, { turns: [], results: {} });
  $("turns").replaceChildren();
  charts.draw($("charts"), charts.rows({}, state.catalog));
  buttons();
}

function buttons() {
  $("send").disabled = Boolean(state.running);
  $("stop").hidden = !state.running;
  $("clear").hidden = Boolean(state.running) || !$("turns").childElementCount;
}

$("stop").addEventListener("click", () => state.running?.abort());
$("clear").addEventListener("click", () => { clear(); writeSnippet(); });

// --- code -------------------------------------------------------------------------------------------------------

let lastAsked = "";
function writeSnippet(asked = $("question").value.trim() || lastAsked) {
  if (!state.media || !state.catalog) return;
  lastAsked = asked;
  const { turns } = state;
  state.turns = []; // the first question alone: later ones repeat it all
  const body = bodyOf($("code-setting").value, asked || EXAMPLE);
  state.turns = turns;
  $("snippet").textContent = snippet($("code-language").value, body, state.media, api.usesKey());
}
for (const id of ["code-setting", "code-language", "question", "max-tokens"]) $(id).addEventListener("input", () => writeSnippet());
$("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("snippet").textContent);
    $("copied").textContent = "copied";
  } catch { // browsers give pages without TLS no clipboard
    getSelection().selectAllChildren($("snippet"));
    $("copied").textContent = "selected: press Ctrl+C";
  }
});

// --- start ------------------------------------------------------------------------------------------------------

async function start() {
  try {
    state.catalog = await api.catalog();
  } catch (error) {
    $("model").textContent = `the server does not answer: ${error.message}`;
    return;
  }
  const { catalog } = state, takes = Object.keys(catalog.limits);
  $("model").textContent = catalog.model;
  $("file").accept = takes.map((kind) => `${kind}/*`).join(",") || "image/*";
  if (takes.includes("video")) $("paste").textContent = "or drop, or paste an image or a video";
  for (const setting of Object.values(settings)) setting.build(catalog);
  clear();
  $("question").value = EXAMPLE;
  await use(mediaFiles.scene);
}

start();
