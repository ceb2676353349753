// The playground: a conversation with the model by the same API that everybody uses.

import { call } from "./api.js";
import { formatMs, get, make, setText } from "./dom.js";

const messages = [];
let running = null;
let model = null;

export function setUpChat() {
  get("send").addEventListener("click", () => (running === null ? send() : running.abort()));
  get("clear").addEventListener("click", () => {
    messages.length = 0;
    running?.abort();
    setText("chat-note", "");
    get("messages").replaceChildren();
  });
  get("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (running === null) send();
    }
  });
}

export function setModel(name) {
  model = name;
}

function show(kind, text) {
  const element = make("div", { class: `bubble ${kind}` }, text);
  get("messages").append(element);
  element.scrollIntoView({ block: "nearest" });
  return element;
}

async function send() {
  const text = get("prompt").value.trim();
  if (!text) return;
  get("prompt").value = "";
  messages.push({ role: "user", content: text });
  show("user", text);
  running = new AbortController();
  get("send").textContent = "Stop";
  let answer = "";
  try {
    answer = await stream(running.signal);
  } catch (error) {
    if (error.name !== "AbortError") show("error", error.message);
  } finally {
    running = null;
    get("send").textContent = "Send";
  }
  if (answer) messages.push({ role: "assistant", content: answer });
}

async function stream(signal) {
  const startedMs = performance.now();
  const response = await call("v1/chat/completions", {
    method: "POST",
    signal,
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({
      model, messages, stream: true, stream_options: { include_usage: true },
      temperature: Number(get("temperature").value), max_tokens: Number(get("max-tokens").value),
    }),
  });
  let answer = "";
  let bubble = null;
  let thought = null;
  let firstMs = null;
  for await (const event of readEvents(response.body)) {
    if (event.error) throw new Error(event.error.message);
    const delta = event.choices[0]?.delta ?? {};
    if (firstMs === null && (delta.content || delta.reasoning_content)) firstMs = performance.now();
    if (delta.reasoning_content) {
      thought ??= show("thought", "");
      thought.textContent += delta.reasoning_content;
    }
    if (delta.content) {
      bubble ??= show("assistant", "");
      answer += delta.content;
      bubble.textContent = answer;
    }
    if (event.usage) describe(event.usage, startedMs, firstMs ?? performance.now());
    get("messages").scrollTop = get("messages").scrollHeight;
  }
  return answer;
}

function describe(usage, startedMs, firstMs) {
  const seconds = (performance.now() - firstMs) / 1000;
  const rate = usage.completion_tokens > 1 && seconds > 0 ? `, ${((usage.completion_tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
  setText("chat-note", `${usage.completion_tokens} tokens, first after ${formatMs(firstMs - startedMs)}${rate}`);
}

async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.startsWith("data: ") ? event.slice(6) : null;
      if (data === "[DONE]") return;
      if (data !== null) yield JSON.parse(data);
    }
  }
}
