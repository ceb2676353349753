// The output over time as an area, the parts of a step as a stacked bar, the queue of each team as bars.

import { formatCount, get, make } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";

function makeShape(tag, attributes) {
  const shape = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) shape.setAttribute(name, value);
  return shape;
}

export function drawOutput(perSecond) {
  // Means over five seconds: streams come in bursts of one step.
  const values = [];
  for (let start = 0; start + 5 <= perSecond.length; start += 5) {
    values.push(perSecond.slice(start, start + 5).reduce((sum, value) => sum + value, 0) / 5);
  }
  const highest = Math.max(1, ...values);
  const points = values.map((value, index) => `${index},${(100 - (value / highest) * 96).toFixed(2)}`);
  const svg = makeShape("svg", {
    viewBox: `0 0 ${values.length - 1} 100`, preserveAspectRatio: "none", role: "img",
    "aria-label": `Tokens per second, at most ${formatCount(highest)}`,
  });
  for (const y of [4, 52, 100]) svg.append(makeShape("line", { class: "grid", x1: 0, x2: values.length - 1, y1: y, y2: y }));
  svg.append(makeShape("polygon", { class: "area", points: `0,100 ${points.join(" ")} ${values.length - 1},100` }));
  svg.append(makeShape("polyline", { class: "line", points: points.join(" ") }));
  get("output-chart").replaceChildren(
    svg,
    make("span", { class: "axis high" }, `${formatCount(Math.round(highest))} tokens/s`),
    make("span", { class: "axis low" }, "now"),
  );
}

let earlierSteps = null;

export function drawSteps(steps) {
  // Since the page last looked; before that, since the routers started.
  let parts = steps.parts_s;
  if (earlierSteps !== null && steps.num_steps > earlierSteps.num_steps) {
    parts = Object.fromEntries(
      Object.entries(parts).map(([name, value]) => [name, Math.max(0, value - earlierSteps.parts_s[name])]),
    );
  }
  const total = Object.values(parts).reduce((sum, value) => sum + value, 0);
  const numSteps = steps.num_steps;
  if (earlierSteps === null || numSteps !== earlierSteps.num_steps) earlierSteps = steps;
  else if (get("steps").childElementCount) return;
  if (total <= 0) {
    get("steps").replaceChildren(make("p", { class: "empty" }, "No step has run yet."));
    return;
  }
  const stack = make("div", { class: "stack" });
  const list = make("div", { class: "parts" });
  Object.entries(parts).forEach(([name, value], index) => {
    const slice = make("i", { title: name });
    slice.style.width = `${(value / total) * 100}%`;
    const key = make("i");
    for (const element of [slice, key]) element.style.background = `var(--part-${index})`;
    stack.append(slice);
    list.append(make("span", {}, key, name, make("b", {}, `${((value / total) * 100).toFixed(0)} %`)));
  });
  get("steps").replaceChildren(
    stack, list, make("p", { class: "muted" }, `${formatCount(numSteps)} steps since the routers started`),
  );
}

export function drawTeams(teams) {
  if (teams.length === 0) {
    get("teams").replaceChildren(make("p", { class: "empty" }, "Nobody is running or waiting."));
    return;
  }
  const most = Math.max(...teams.map((team) => team.num_running + team.num_waiting));
  const rows = teams.map((team) => {
    const track = make("div", { class: "track" });
    for (const [kind, count] of [["run", team.num_running], ["wait", team.num_waiting]]) {
      const part = make("i", { class: kind });
      part.style.width = `${(count / most) * 100}%`;
      track.append(part);
    }
    return make("div", { class: "bar" }, make("span", { title: team.team }, team.team), track,
      make("span", { class: "value" }, `${team.num_running} running, ${team.num_waiting} waiting`));
  });
  get("teams").replaceChildren(...rows);
}
