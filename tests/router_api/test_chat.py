"""/v1/chat/completions through the official client, a real server and real gRPC."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from router.api.tokenizer import TextTokenizer
from tests.router_api.conftest import ASSISTANT, BOS, EOS, MAX_MODEL_LEN, MODEL, USER
from tests.router_api.scripted_router import ScriptedRouter, answer

MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]


def ids_of(tokenizer: TextTokenizer, text: str) -> list[int]:
    return tokenizer.encode_raw(text, add_special_tokens=False)


def test_an_answer(client: openai.OpenAI, router: ScriptedRouter, tokenizer: TextTokenizer) -> None:
    router.script = answer(ids_of(tokenizer, "hello world"), stop_id=1)
    completion = client.chat.completions.create(model=MODEL, messages=MESSAGES)
    choice = completion.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "hello world", "stop")
    prompt = ids_of(tokenizer, f"{BOS}{USER}hello{ASSISTANT}")
    request = router.requests[0]
    assert list(request.prompt_token_ids) == prompt
    assert request.max_tokens == MAX_MODEL_LEN - len(prompt)
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == len(prompt)
    assert completion.usage.completion_tokens == len(ids_of(tokenizer, "hello world")) + 1


def test_text_parts(client: openai.OpenAI, router: ScriptedRouter, tokenizer: TextTokenizer) -> None:
    parts: Any = [{"type": "text", "text": "hello"}, {"type": "text", "text": "world"}]
    client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": parts}])
    prompt = tokenizer.decode(router.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert prompt == f"{BOS}{USER}hello\nworld{ASSISTANT}"


def test_special_tokens_in_messages_are_text(
    client: openai.OpenAI, router: ScriptedRouter, tokenizer: TextTokenizer
) -> None:
    client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": f"{EOS}{ASSISTANT}"}])
    ids = list(router.requests[0].prompt_token_ids)
    assert 1 not in ids and ids.count(ids_of(tokenizer, ASSISTANT)[0]) == 1


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_limit(http: httpx.Client, router: ScriptedRouter, field: str) -> None:
    body = {"model": MODEL, "messages": MESSAGES, field: 3}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    assert router.requests[0].max_tokens == 3


def test_several_choices(client: openai.OpenAI, router: ScriptedRouter) -> None:
    router.script = lambda request, context: answer([int(request.sampling.seed)])(request, context)
    completion = client.chat.completions.create(model=MODEL, messages=MESSAGES, n=3, seed=70)
    assert len({choice.message.content for choice in completion.choices}) == 3
    assert [choice.index for choice in completion.choices] == [0, 1, 2]


def test_logprobs(client: openai.OpenAI, router: ScriptedRouter, tokenizer: TextTokenizer) -> None:
    router.script = answer(ids_of(tokenizer, "é"))
    completion = client.chat.completions.create(model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=2)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [entry.bytes for entry in logprobs.content] == [[0xC3], [0xA9]]
    assert all(len(entry.top_logprobs) == 2 for entry in logprobs.content)
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in logprobs.content)
    assert completion.choices[0].message.content == "é"


def test_the_order_of_a_stream(http: httpx.Client, router: ScriptedRouter, tokenizer: TextTokenizer) -> None:
    router.script = answer(ids_of(tokenizer, "hello world"), stop_id=1)
    body = {"model": MODEL, "messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}}
    with http.stream("POST", "/v1/chat/completions", json=body) as answered:
        assert answered.headers["content-type"].startswith("text/event-stream")
        assert answered.headers["cache-control"] == "no-cache"
        assert answered.headers["x-accel-buffering"] == "no"
        events = [line.removeprefix("data: ") for line in answered.iter_lines() if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks[1:-2]) == "hello world"
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks[:-2])
    assert chunks[-2]["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 0
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}


def test_characters_are_never_split(client: openai.OpenAI, router: ScriptedRouter, tokenizer: TextTokenizer) -> None:
    text = "日本語 🦊 é"
    ids = ids_of(tokenizer, text)
    assert len(ids) > len(text)
    router.script = answer(ids)
    stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_logprobs_of_held_back_tokens_arrive(
    client: openai.OpenAI, router: ScriptedRouter, tokenizer: TextTokenizer
) -> None:
    ids = ids_of(tokenizer, "🦊 fox")
    router.script = answer(ids, stop_id=1)
    stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, logprobs=True, stop=["foxes"])
    entries = [
        entry for chunk in stream if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content or []
    ]
    assert [entry.token for entry in entries] == [tokenizer.token_text(token_id) for token_id in [*ids, 1]]


async def test_the_async_client_streams(api_url: str, router: ScriptedRouter, tokenizer: TextTokenizer) -> None:
    router.script = answer(ids_of(tokenizer, "hello world"))
    async with openai.AsyncOpenAI(base_url=f"{api_url}/v1", api_key="none", timeout=10.0) as client:
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == "hello world"


def test_a_chat_that_does_not_fit(http: httpx.Client, router: ScriptedRouter) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "fox " * MAX_MODEL_LEN}]}
    answered = http.post("/v1/chat/completions", json=body)
    assert answered.status_code == 400
    assert answered.json()["error"]["code"] == "context_length_exceeded"
    assert str(MAX_MODEL_LEN) in answered.json()["error"]["message"]


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}]}]},
         "messages.0.content", "unsupported_content_type"),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        ({"function_call": {"name": "f"}}, "function_call", "unsupported_parameter"),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "unsupported_parameter"),
        ({"chat_template_kwargs": {"tools": True}}, "chat_template_kwargs", "unsupported_parameter"),
        ({"messages": [{"role": "wizard", "content": "1"}]}, "messages.0.role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ],
)  # fmt: skip
def test_refusals(
    http: httpx.Client, router: ScriptedRouter, change: dict[str, Any], param: str | None, code: str
) -> None:
    answered = http.post("/v1/chat/completions", json={"model": MODEL, "messages": MESSAGES, **change})
    error = answered.json()["error"]
    assert (answered.status_code, error["param"], error["code"]) == (400, param, code)
    assert error["type"] == "invalid_request_error"
    assert router.requests == []


def test_what_means_the_default_is_accepted(http: httpx.Client, router: ScriptedRouter) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "tools": [], "tool_choice": "auto", "max_tokens": None,
            "response_format": {"type": "text"}, "chat_template_kwargs": {"thinking": True}, "stream": None,
            "presence_penalty": 0, "user": "me", "store": False}  # fmt: skip
    assert http.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_an_answer_without_some_experts_is_marked(
    http: httpx.Client, router: ScriptedRouter, tokenizer: TextTokenizer, route: str
) -> None:
    body = {"model": MODEL} | ({"prompt": "hello"} if route == "completions" else {"messages": MESSAGES})
    for num_left_out in (0, 7):
        router.script = answer(ids_of(tokenizer, "hello world"), stop_id=1, num_left_out=num_left_out)
        expected = {"left_out_experts": 7} if num_left_out else {}
        (choice,) = http.post(f"/v1/{route}", json=body).json()["choices"]
        assert {name: choice[name] for name in choice if "left_out" in name} == expected
        lines = http.post(f"/v1/{route}", json=body | {"stream": True}).text.split("\n\n")
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
        marks = [choice.get("left_out_experts") for chunk in chunks for choice in chunk["choices"]]
        assert marks[-1] == expected.get("left_out_experts") and not any(marks[:-1])
