// How often each expert of each layer was asked for: a row per layer, a column per expert, on a canvas.

import { formatCount, get, make, setText } from "./dom.js";

let drawn = null;

export function drawHeatmap(load) {
  drawn = load;
  if (load === null || load.layers.length === 0) {
    setText("experts-note", "");
    get("heatmap").replaceChildren(make("p", { class: "empty" },
      load === null ? "Known where a controller runs." : "No expert has been asked for yet."));
    return;
  }
  const layers = load.layers;
  const numExperts = load.num_experts;
  const worst = Math.max(...layers.map((layer) => {
    const sum = layer.pairs.reduce((total, value) => total + value, 0);
    return sum ? (Math.max(...layer.pairs) * layer.pairs.length) / sum : 0;
  }));
  setText("experts-note",
    `last ${Math.max(1, Math.round(load.window_s / 60))} min · hottest expert ${worst.toFixed(1)}× its layer's mean`);
  const canvas = make("canvas", { width: numExperts, height: layers.length, role: "img",
    ariaLabel: `Load of ${numExperts} experts in ${layers.length} layers` });
  canvas.style.height = `${Math.max(72, Math.min(26, 1100 / layers.length) * layers.length)}px`;
  paint(canvas, layers, numExperts);
  const probe = make("span", { class: "probe" }, "");
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const expert = Math.min(numExperts - 1, Math.floor(((event.clientX - box.left) / box.width) * numExperts));
    const row = Math.min(layers.length - 1, Math.floor(((event.clientY - box.top) / box.height) * layers.length));
    if (row < 0 || expert < 0) return;
    probe.textContent = `layer ${layers[row].layer}, expert ${expert}: ${formatCount(layers[row].pairs[expert])} rows`;
  });
  canvas.addEventListener("pointerleave", () => { probe.textContent = ""; });
  const labels = layers.length <= 16 ? layers.map((layer) => `layer ${layer.layer}`)
    : [`layer ${layers[0].layer}`, `layer ${layers.at(-1).layer}`];
  const rows = make("div", { class: "rows" }, ...labels.map((label) => make("span", {}, label)));
  if (layers.length > 16) rows.style.justifyContent = "space-between";
  get("heatmap").replaceChildren(
    make("div", { class: "plot" }, rows, canvas,
      make("div", { class: "columns" }, make("span", {}, "expert 0"), make("span", {}, `expert ${numExperts - 1}`))),
    make("div", { class: "scale" }, "never", make("i"), "as its layer's hottest", probe),
  );
}

export function repaintHeatmap() {
  if (drawn !== null) drawHeatmap(drawn);
}

function readColour(name) {
  const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

function paint(canvas, layers, numExperts) {
  const [cold, hot] = [readColour("--heat-0"), readColour("--heat-1")];
  const context = canvas.getContext("2d");
  const image = context.createImageData(numExperts, layers.length);
  layers.forEach((layer, row) => {
    const highest = Math.max(1, ...layer.pairs);
    for (let expert = 0; expert < numExperts; expert += 1) {
      const share = Math.sqrt((layer.pairs[expert] ?? 0) / highest);
      const at = (row * numExperts + expert) * 4;
      for (let part = 0; part < 3; part += 1) image.data[at + part] = cold[part] + (hot[part] - cold[part]) * share;
      image.data[at + 3] = 255;
    }
  });
  context.putImageData(image, 0, 0);
}
