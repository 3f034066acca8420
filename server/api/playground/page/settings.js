// One of the two settings: its controls, the `reduction` that they stand for, and what the server says it does.

import { make, number, show } from "./dom.js";

const NONE = "none";
const SUMMARY_OF_NONE = "Keeps every vision token.";

export class Setting {
  constructor(fieldset, name, start, onChange) {
    Object.assign(this, { fieldset, name, onChange, start, map: null });
  }

  build(catalog) {
    this.catalog = catalog;
    this.methods = new Map(catalog.data.map((method) => [method.id, method]));
    this.method = make("select");
    this.ratio = make("input", { type: "range", min: "0", max: "0.95", step: "0.01", value: String(this.start.ratio) });
    this.ratio.ariaLabel = `share of tokens removed, setting ${this.name.toUpperCase()}`;
    this.shown = make("output");
    this.decoder = make("select");
    this.share = make("input", { type: "range", min: "0.05", max: "0.95", step: "0.05", value: "0.5" });
    this.options = make("div");
    this.summary = make("p", { className: "summary" });
    this.kept = make("p", { className: "kept", ariaLive: "polite" });
    this.strip = make("div", { className: "strip", role: "img" });
    this.stripText = make("p", { className: "strip-text" });
    this.error = make("p", { className: "error", role: "alert", hidden: true });
    this.ratioLine = make("label", {}, "remove", make("span", { className: "slider" }, this.ratio, this.shown));
    this.shownShare = make("output");
    this.shareLine = make("label", {}, "there remove", make("span", { className: "slider" }, this.share, this.shownShare));
    const decoderLine = make("label", {}, "in decoder", this.decoder);
    const why = catalog.withdraw_layer === null
      ? [make("p", { className: "hint" }, "for a server with ", make("code", {}, "--withdraw-layer K"))] : [];
    this.decoder.disabled = catalog.withdraw_layer === null;
    this.fieldset.append(
      make("label", {}, "method", this.method), this.ratioLine, this.options, decoderLine, this.shareLine, ...why,
      this.summary, this.kept, this.strip, this.stripText, this.error,
    );
    this.method.onchange = () => { this.buildOptions(); this.changed(); };
    for (const input of [this.ratio, this.decoder, this.share]) input.oninput = () => this.changed();
  }

  // The methods that work on images, or on videos.
  offer(kind) {
    const works = this.catalog.data.filter(({ modalities }) => modalities.includes(kind));
    const before = works.filter(({ stage }) => !["decoder", "projector"].includes(stage)), chosen = this.method.value;
    fill(this.method, [NONE, ...before.map(({ id }) => id)], this.start.method);
    fill(this.decoder, [NONE, ...works.filter(({ stage }) => stage === "decoder").map(({ id }) => id)], NONE);
    if (this.method.value !== chosen) this.buildOptions();
    this.refresh();
  }

  buildOptions() {
    const options = Object.entries(this.methods.get(this.method.value)?.options ?? {});
    this.own = options.filter(([, schema]) => schema.enum ?? schema.type === "boolean").map(([name, schema]) => {
      const values = schema.enum ?? [true, false], standard = schema.default ?? "as the model has it";
      const input = select([...new Set([standard, ...values])].map(String), String(standard));
      input.oninput = () => this.changed();
      return { name, input, standard, values };
    });
    this.options.replaceChildren(...this.own.map(({ name, input }) =>
      make("label", { title: this.methods.get(this.method.value).options[name].description ?? "" }, name, input)));
  }

  // Without the fields that say what the server takes anyway.
  get reduction() {
    const method = this.method.value, decoder = this.decoder.value, found = {};
    const names = method === NONE ? [] : [method];
    if (decoder !== NONE && decoder !== "withdraw") names.push(decoder);
    if (names.length) found.method = names.join("+");
    if (method !== NONE && method !== "base_only") found.ratio = Number(this.ratio.value);
    for (const { name, input, standard, values } of this.own) {
      if (input.value !== String(standard)) found[name] = values.find((value) => String(value) === input.value);
    }
    if (decoder === "withdraw") found.withdraw = true;
    else if (decoder !== NONE) found.decoder_ratio = Number(this.share.value);
    return found;
  }

  changed() {
    this.refresh();
    this.onChange(this);
  }

  refresh() {
    const method = this.methods.get(this.method.value);
    this.summary.textContent = method?.summary ?? SUMMARY_OF_NONE;
    this.summary.title = method?.paper ?? "";
    this.shown.textContent = `${number(this.ratio.value * 100)} %`;
    this.shownShare.textContent = `${number(this.share.value * 100)} %`;
    this.ratioLine.hidden = [NONE, "base_only"].includes(this.method.value);
    this.shareLine.hidden = [NONE, "withdraw"].includes(this.decoder.value);
  }

  // What the server says: an answer of /v1/reductions/map, or why there is none.
  take(map, error) {
    this.map = map;
    show(this.error, error?.message ?? "");
    this.kept.textContent = "";
    this.strip.replaceChildren();
    this.stripText.textContent = "";
    delete this.fieldset.dataset.kept;
    if (!map) return;
    this.fieldset.dataset.kept = String(tokens(map).kept);
    const { encoded, kept, withdrawn } = tokens(map);
    this.kept.textContent = `${number(kept)} of ${number(encoded)} vision tokens stay`;
    const end = map.withdraw_layer ?? map.layers;
    for (let layer = 0; layer < map.layers; layer += 1) {
      this.strip.append(make("i", { className: layer < end ? "full" : withdrawn < kept ? "part" : "" }));
    }
    const deep = withdrawn < kept ? `then ${number(kept - withdrawn)}` : "then none";
    this.stripText.textContent = map.withdraw_layer === null
      ? `in all ${map.layers} decoder layers`
      : `in decoder layers 0 to ${end - 1}, ${deep} (${map.decoder})`;
    this.strip.ariaLabel = this.stripText.textContent;
  }
}

export function tokens(map) {
  const sum = (name) => map.items.reduce((total, { vision_tokens: own }) => total + own[name], 0);
  return { encoded: sum("encoded"), kept: sum("kept"), withdrawn: sum("withdrawn") };
}

// Keeps what was chosen, where it is still among the values.
function fill(element, values, otherwise) {
  const chosen = [element.value, otherwise].find((value) => values.includes(value)) ?? values.at(-1);
  element.replaceChildren(...values.map((value) => make("option", { value, selected: value === chosen }, value)));
}

function select(values, chosen) {
  const element = make("select");
  fill(element, values, chosen);
  return element;
}
