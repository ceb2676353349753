// Making elements and writing numbers. Text goes in as text only, so nothing that comes from a model or a log is markup.

export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") element.className = value;
    else if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

export function get(id) {
  return document.getElementById(id);
}

export function setText(id, text) {
  const element = get(id);
  if (element.textContent !== text) element.textContent = text;
}

export function formatCount(value) {
  if (value >= 1e9) return `${(value / 1e9).toFixed(1)} G`;
  if (value >= 1e6) return `${(value / 1e6).toFixed(1)} M`;
  if (value >= 1e4) return `${(value / 1e3).toFixed(1)} k`;
  return Number.isInteger(value) ? String(value) : value.toFixed(1);
}

export function formatMs(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 10000) return `${(value / 1000).toFixed(0)} s`;
  if (value >= 1000) return `${(value / 1000).toFixed(2)} s`;
  return value >= 100 ? `${value.toFixed(0)} ms` : `${value.toFixed(1)} ms`;
}

export function formatShare(value) {
  return `${Math.round(value * 100)} %`;
}

export function makeMeter(share) {
  const fill = make("i");
  fill.style.width = `${Math.min(100, Math.max(0, share * 100))}%`;
  return make("div", { class: share > 0.85 ? "meter hot" : "meter" }, fill);
}
