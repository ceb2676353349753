// Looks at the cluster every two seconds while the page is visible, and draws what it finds.

import { fetchJson, getKey, Refused, setKey } from "./api.js";
import { drawOutput, drawSteps, drawTeams } from "./charts.js";
import { setModel, setUpChat } from "./chat.js";
import { drawCluster } from "./cluster_map.js";
import { formatCount, formatMs, formatShare, get, make, setText } from "./dom.js";
import { drawHeatmap, repaintHeatmap } from "./heatmap.js";

const STATE_MS = 2000;
const EXPERTS_MS = 10000;
const MOST_EVENTS = 200;

let lastSequence = 0;
let expertsDueMs = 0;
let shownMs = null;
let isKeyAsked = false;

async function look() {
  if (!document.hidden) {
    try {
      drawPage(await fetchJson("ui/state"));
      await Promise.all([lookAtEvents(), lookAtExperts()]);
      shownMs = performance.now();
      setNotice("");
    } catch (error) {
      showTrouble(error);
    }
    drawAge();
  }
  setTimeout(look, STATE_MS);
}

function drawPage(page) {
  setText("model", page.model);
  setModel(page.model);
  document.title = `${page.model} · Shoal`;
  setText("version", page.version);
  setState(page.state, { ready: "ready", draining: "draining" }[page.state] ?? "starting");
  const { activity } = page;
  const recent = activity.tokens_per_s.slice(-10);
  setText("tokens-per-s", formatCount(Math.round(recent.reduce((sum, value) => sum + value, 0) / recent.length)));
  const numRequests = activity.requests_per_s.reduce((sum, value) => sum + value, 0);
  setText("tokens-note", `${formatCount(numRequests)} sequences in ${activity.window_s / 60} min`);
  drawLatency("ttft", activity.ttft_ms);
  drawLatency("tpot", activity.tpot_ms);
  const routers = page.routers.filter((router) => router.num_running !== undefined);
  setText("running", String(routers.reduce((sum, router) => sum + router.num_running, 0)));
  setText("waiting", `${routers.reduce((sum, router) => sum + router.num_waiting, 0)} waiting`);
  const usage = Math.max(0, ...routers.map((router) => router.kv_usage));
  setText("kv", formatShare(usage));
  get("kv-meter").firstElementChild.style.width = `${usage * 100}%`;
  get("kv-meter").classList.toggle("hot", usage > 0.85);
  drawOutput(activity.tokens_per_s);
  drawCluster(page);
  drawSteps(page.steps);
  drawTeams(page.teams);
}

function drawLatency(id, latency) {
  setText(id, formatMs(latency.p50));
  setText(`${id}-note`, latency.num ? `p90 ${formatMs(latency.p90)} · p99 ${formatMs(latency.p99)}` : "no request yet");
}

async function lookAtEvents() {
  const list = get("event-list");
  let events;
  try {
    ({ events } = await fetchJson(`ui/events?after=${lastSequence}`));
  } catch (error) {
    if (error instanceof Refused && error.status === 503) {
      if (!list.childElementCount) list.append(make("li", { class: "empty" }, "Known where a controller runs."));
      return;
    }
    throw error;
  }
  if (events.length === 0) return;
  list.querySelector(".empty")?.remove();
  for (const event of events) {
    lastSequence = event.sequence;
    const when = new Date(event.time * 1000);
    list.prepend(make("li", {},
      make("time", { dateTime: when.toISOString(), title: when.toLocaleString() }, when.toLocaleTimeString("en-GB")),
      make("span", { class: "what" }, `${event.object} ${event.action}`),
      make("span", { class: "reason" }, event.reason)));
  }
  while (list.childElementCount > MOST_EVENTS) list.lastElementChild.remove();
}

async function lookAtExperts() {
  if (performance.now() < expertsDueMs) return;
  let load = null;
  try {
    load = await fetchJson("ui/experts");
  } catch (error) {
    if (!(error instanceof Refused && error.status === 503)) throw error;
  }
  drawHeatmap(load);
  expertsDueMs = performance.now() + (load?.layers.length ? EXPERTS_MS : STATE_MS);
}

function showTrouble(error) {
  if (error instanceof Refused && error.status === 401) {
    setState("key needed", "starting");
    setNotice("This cluster wants an API key before it shows anything.");
    if (!isKeyAsked) openKeyDialog();
    isKeyAsked = true;
  } else {
    setState("no answer", "dead");
    setNotice(error instanceof Refused ? error.message : "The server does not answer; what you see is what it said last.");
  }
}

function setState(text, kind) {
  setText("state", text);
  get("state").className = `pill ${kind}`;
}

function setNotice(text) {
  setText("notice", text);
  get("notice").hidden = text === "";
}

function drawAge() {
  setText("age", shownMs === null ? "nothing seen yet" : `seen ${Math.round((performance.now() - shownMs) / 1000)} s ago`);
}

function openKeyDialog() {
  const dialog = get("key-dialog");
  if (dialog.open) return;
  get("key").value = getKey();
  dialog.showModal();
}

function setUpKey() {
  const dialog = get("key-dialog");
  const save = () => {
    setKey(get("key").value.trim());
    dialog.close();
  };
  get("key-button").addEventListener("click", openKeyDialog);
  get("key-save").addEventListener("click", save);
  get("key-cancel").addEventListener("click", () => dialog.close());
  get("key").addEventListener("keydown", (event) => {
    if (event.key === "Enter") save();
  });
}

function setUpTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    const chosen = localStorage.getItem("shoal-theme");
    document.documentElement.dataset.theme = chosen ?? (system.matches ? "dark" : "light");
    repaintHeatmap();
  };
  system.addEventListener("change", apply);
  get("theme-button").addEventListener("click", () => {
    localStorage.setItem("shoal-theme", document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    apply();
  });
  apply();
}

setUpTheme();
setUpKey();
setUpChat();
setInterval(drawAge, 1000);
look();
