// Routers and expert groups with their replicas: a card each, in the state that they are in.

import { formatCount, formatMs, formatShare, get, make, makeMeter, setText } from "./dom.js";

// By group: traffic and time of the look before, for rates.
const earlier = new Map();

export function drawCluster(page) {
  const numReplicas = page.groups.reduce((sum, group) => sum + group.replicas.length, 0);
  const numReady = page.groups.reduce((sum, group) => sum + group.replicas.filter((one) => one.state === "ready").length, 0);
  setText("cluster-note", `${numReady} of ${numReplicas} replicas ready · expert table ${page.table_version}`);
  get("routers").replaceChildren(...page.routers.map(makeRouter));
  get("groups").replaceChildren(...page.groups.map((group) => makeGroup(group, page.time_s)));
}

function makeState(state) {
  return make("i", { class: `dot ${state}`, title: state, role: "img", ariaLabel: state });
}

function makeFacts(facts) {
  return make("div", { class: "facts" }, ...facts.filter(Boolean).map((fact) => make("span", {}, fact)));
}

function makeRouter(router) {
  const card = make("article", { class: router.state === "dead" ? "card trouble" : "card" });
  card.dataset.router = router.id;
  card.dataset.state = router.state;
  card.append(make("header", {}, make("strong", {}, makeState(router.state), ` ${router.id}`),
    make("span", { class: "muted" }, router.state)));
  if (router.num_running !== undefined) {
    card.append(makeFacts([
      `${router.num_running} running`, `${router.num_waiting} waiting`, `KV ${formatShare(router.kv_usage)}`,
      router.resident_bytes ? `${(router.resident_bytes / 1e9).toFixed(1)} GB` : "",
      ...router.drafts.map((draft, index) => draft.drafted
        ? `draft ${index + 1}: ${formatShare(draft.accepted / draft.drafted)} hold` : ""),
    ]));
  }
  if (router.message) card.append(make("p", { class: "muted" }, router.message));
  card.append(makeFacts([router.endpoint ?? "", router.node ?? "", router.pid ? `pid ${router.pid}` : ""]));
  return card;
}

function describeRanges(group) {
  const ranges = group.experts.map(([start, end]) => (end - start === 1 ? `${start}` : `${start}–${end - 1}`));
  const distinct = [...new Set(ranges)];
  return distinct.length ? `experts ${distinct.slice(0, 3).join(", ")}${distinct.length > 3 ? " …" : ""}` : "";
}

function makeGroup(group, timeS) {
  const numReady = group.replicas.filter((replica) => replica.state === "ready").length;
  const card = make("article", { class: numReady === 0 ? "card trouble" : "card" });
  card.dataset.group = group.name;
  card.append(make("header", {}, make("strong", {}, group.name),
    make("span", { class: "muted" }, describeRanges(group))));
  for (const replica of group.replicas) card.append(makeReplica(replica));
  if (group.replicas.length === 0) card.append(make("p", { class: "muted" }, "no replica"));
  card.append(makeFacts(describeTraffic(group, timeS, numReady)));
  return card;
}

function makeReplica(replica) {
  const busy = replica.load === null ? null : replica.load.busy_share;
  const row = make("div", { class: "replica" }, makeState(replica.state), make("span", {}, replica.id),
    busy === null ? make("span", { class: "muted" }, replica.state) : makeMeter(busy),
    make("span", { class: "value" }, busy === null ? "" : formatShare(busy)));
  row.dataset.replica = replica.id;
  row.dataset.state = replica.state;
  row.title = [replica.node, replica.pid ? `pid ${replica.pid}` : "",
    replica.load ? `queue ${formatMs(replica.load.queue_ms)}` : ""].filter(Boolean).join(" · ");
  if (replica.message) row.append(make("span", { class: "message" }, replica.message));
  return row;
}

function describeTraffic(group, timeS, numReady) {
  const now = group.traffic;
  const before = earlier.get(group.name);
  if (before === undefined || timeS - before.timeS >= 1) earlier.set(group.name, { timeS, traffic: now });
  const facts = [`${numReady} of ${group.desired_replicas} ready`];
  if (now.num_frames === undefined) return facts;
  const isNew = before === undefined || now.num_frames < before.traffic.num_frames || timeS <= before.timeS;
  const base = isNew ? null : before.traffic;
  const numAnswers = now.num_answers - (base?.num_answers ?? 0);
  if (base !== null) {
    const spanS = timeS - before.timeS;
    facts.push(`${formatCount(Math.round((now.num_frames - base.num_frames) / spanS))} frames/s`);
    facts.push(`${formatCount(Math.round((now.bytes - base.bytes) / spanS))}B/s`);
  }
  if (numAnswers > 0) facts.push(`answers in ${formatMs((now.latency_us - (base?.latency_us ?? 0)) / numAnswers / 1000)}`);
  if (now.num_retries) facts.push(`${formatCount(now.num_retries)} retries`);
  if (now.num_hedges) facts.push(`${formatCount(now.num_hedges)} hedges`);
  return facts;
}
