// Measurements of the last answers, as bars.

import { bytes, make, number } from "./dom.js";

// A row of numbers for each measure; null where it is not known (yet).
export function draw(element, rows) {
  element.replaceChildren(...rows.map(({ title, values, text }) => {
    const most = Math.max(...Object.values(values).filter((value) => value !== null), 1e-9);
    const bars = Object.entries(values).map(([name, value]) => {
      const fill = make("div", { className: `fill ${name}` });
      fill.style.width = `${value === null ? 0 : Math.max(0, value) / most * 100}%`;
      const track = make("div", { className: "track" }, fill);
      return make("div", { className: "bar" }, make("b", {}, name.toUpperCase()), track, make("span", {}, value === null ? "-" : text(value)));
    });
    return make("div", { className: "chart" }, make("h3", {}, title), ...bars);
  }));
}

export function rows(results, catalog) {
  const of = (read) => Object.fromEntries(["a", "b"].map((name) => [name, results[name] ? read(results[name]) : null]));
  return [
    { title: "Time to first token", values: of(({ ttft }) => ttft), text: (s) => `${number(s * 1000)} ms` },
    { title: "Tokens per second, after the first", values: of(rate), text: (value) => number(value, 1) },
    { title: "Vision tokens kept", values: of(({ usage }) => usage?.vision_tokens?.kept ?? null), text: (value) => number(value) },
    { title: "KV cache saved, against no reduction", values: of(({ usage }) => saved(usage, catalog)), text: bytes },
  ];
}

function rate({ seconds, usage }) {
  const tokens = usage?.completion_tokens ?? 0;
  return tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : null;
}

function saved(usage, { decoder, withdraw_layer: layer }) {
  const vision = usage?.vision_tokens;
  if (!vision) return null;
  const deep = layer === null ? 0 : decoder.kv_layers - layer;
  return decoder.kv_bytes_per_token_and_layer * ((vision.encoded - vision.kept) * decoder.kv_layers + vision.withdrawn * deep);
}
