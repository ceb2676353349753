"""Requests for text that are broken in every way we could think of, from a seed: valid ones, changed at random places.

Bodies are bytes, since much of what is wrong with a body is not to be had from a JSON encoder.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any, NamedTuple

MESSAGES = [{"role": "user", "content": "def add(a, b):"}]
FUNCTION: dict[str, Any] = {
    "name": "f",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "string", "pattern": "[a-z]+", "maxLength": 3}, "b": {"enum": [1, 2]}},
    "required": ["a"],
}
BASES: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "/v1/completions",
        {
            "prompt": "import os",
            "max_tokens": 1,
            "logprobs": 1,
            "temperature": 1.0,
            "stop": ["\n"],
            "seed": 3,
            "n": 1,
            "logit_bias": {"5": 1},
            "stream_options": {"include_usage": True},
        },
    ),
    ("/v1/completions", {"prompt": [[5, 6], [7]], "max_tokens": 1, "echo": True, "logprobs": 1, "top_p": 0.5}),
    (
        "/v1/chat/completions",
        {"messages": MESSAGES, "max_tokens": 1, "top_logprobs": 2, "logprobs": True, "stream": True},
    ),
    (
        "/v1/chat/completions",
        {
            "messages": MESSAGES,
            "max_tokens": 2,
            "tools": [{"type": "function", "function": FUNCTION}],
            "tool_choice": "required",
            "parallel_tool_calls": False,
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": MESSAGES,
            "max_tokens": 2,
            "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
        },
    ),
    (
        "/v1/messages",
        {
            "messages": MESSAGES,
            "max_tokens": 1,
            "system": "x",
            "stop_sequences": ["a"],
            "tools": [{"name": "f", "input_schema": SCHEMA}],
            "tool_choice": {"type": "auto"},
        },
    ),
    ("/v1/messages/count_tokens", {"messages": MESSAGES, "system": [{"type": "text", "text": "x"}]}),
    (
        "/v1/responses",
        {
            "input": "x",
            "max_output_tokens": 1,
            "instructions": "y",
            "text": {"format": {"type": "text"}},
            "tools": [{"type": "function", **FUNCTION}],
        },
    ),
    ("/tokenize", {"prompt": "import os", "return_token_strs": True}),
    ("/tokenize", {"messages": MESSAGES}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
)


# What repetitions may come to: four of them, one in another, would come to terabytes. One in 50 may make a body that is
# larger than bodies may be.
MAX_REPEATED_BYTES = 200 * 1024
MAX_HUGE_BYTES = 10 * 1024 * 1024


class Raw(str):
    """JSON text as it is to stand in the body, well-formed or not."""


def _nest(opening: str, inner: str, closing: str, levels: int) -> Raw:
    return Raw(opening * levels + inner + closing * levels)


JUNK: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63) - 1,
    10**18,
    0.5,
    -0.0,
    1e308,
    "",
    "3",
    "true",
    "\0",
    "é" * 50,
    "<｜User｜>",
    "<think>",
    "<|im_end|>",
    "http://169.254.169.254/",
    "../../etc/passwd",
    "{{ 7*7 }}",
    "x" * 5000,
    [],
    {},
    [[]],
    [None],
    [1, "a"],
    [{}],
    {"type": "image_url", "image_url": {"url": "http://x/"}},
    {"": None},
    {"type": "function"},
    {"$ref": "#"},
    {"type": "string", "pattern": "(a{1,99}){1,99}"},
    {"type": "string", "pattern": "(?=a)"},
    {"type": "array", "items": {"$ref": "#"}, "minItems": 10**9},
    {"enum": ["x" * 100 for _ in range(200)]},
    {"anyOf": [{}] * 200},
    {"not": {}},
    {"type": "object", "required": ["a"] * 50},
    Raw("NaN"),
    Raw("Infinity"),
    Raw("-Infinity"),
    Raw("1e999"),
    Raw("9" * 3000),
    Raw('"\\ud800"'),
    Raw('"\\udc00\\ud800"'),
    Raw("01"),
    Raw("tru"),
    Raw("'a'"),
    Raw('{"a":1,"a":2}'),
    Raw(""),
    _nest("[", "", "]", 2000),
    _nest('{"a":', "1", "}", 2000),
    _nest('{"anyOf":[', "{}", "]}", 60),
)


class FuzzRequest(NamedTuple):
    """headers: besides the content type. leaves: the client goes away once it has sent it."""

    path: str
    body: bytes
    headers: dict[str, str]
    leaves: bool


def make_request(seed: int) -> FuzzRequest:
    """The same for the same seed."""
    random_ = random.Random(seed)
    path, base = random_.choice(BASES)
    value: Any = json.loads(json.dumps(base))
    for _ in range(random_.choice((0, 1, 1, 1, 2, 4))):
        value = random_.choice(_CHANGES)(value, random_)
    body = _encode(value).encode("utf-8", errors="surrogatepass")
    for _ in range(random_.choice((0, 0, 0, 0, 0, 1))):
        body = random_.choice(_DAMAGES)(body, random_)
    headers = {"Content-Type": "application/json", **(random_.choice(_HEADERS) if random_.random() < 0.1 else {})}
    return FuzzRequest(path, body, headers, leaves=random_.random() < 0.03)


def make_proper_request(seed: int) -> FuzzRequest:
    """The same mix of routes, and nothing wrong with it."""
    path, base = random.Random(seed).choice(BASES)
    return FuzzRequest(path, _encode(base).encode(), {"Content-Type": "application/json"}, leaves=False)


def make_costly_request(seed: int) -> FuzzRequest:
    """What costs a front most for one request: as large as bodies may be, of as many parts as they may have, or with as
    many log probabilities as may be asked for."""
    path, body = _COSTLY[seed % len(_COSTLY)]
    return FuzzRequest(path, body(), {"Content-Type": "application/json"}, leaves=False)


def _fill(path: str, head: str, part: str, tail: str, num_parts: int | None = None) -> tuple[str, Callable[[], bytes]]:
    """num_parts: None: as many as a body has room for."""
    room = (MAX_BODY_BYTES - len(head) - len(tail)) // (len(part) + 1)
    return path, lambda: (head + ",".join([part] * (num_parts or room)) + tail).encode()


MAX_BODY_BYTES = 8 * 1024 * 1024
_CHAT = "/v1/chat/completions"
_COSTLY: tuple[tuple[str, Callable[[], bytes]], ...] = (
    _fill("/v1/completions", '{"prompt":[', "300", "]}"),
    _fill("/v1/completions", '{"prompt":"', "def add(self, value): ", '"}'),
    _fill("/v1/completions", '{"max_tokens":1,"echo":true,"logprobs":20,"prompt":[', f"[{'7,' * 255}7]", "]}", 32),
    _fill("/v1/completions", '{"max_tokens":1,"n":128,"prompt":[', "7", "]}", 1),
    _fill(_CHAT, '{"messages":[', "{}", "]}"),
    _fill(_CHAT, '{"messages":[{"role":"user","content":"a"}],"unknown":[', "[]", "]}", 260_000),
    _fill(_CHAT, '{"messages":[', '{"role":"user","content":"a"}', "]}", 4096),
    _fill("/v1/messages", '{"max_tokens":1,"messages":[', "{}", "]}", 260_000),
    _fill("/v1/messages", '{"max_tokens":1,"messages":[{"role":"user","content":"', "é" * 1000, '"}]}', 4000),
    _fill("/tokenize", '{"prompt":"', "a" * 1000, '"}', 8000),
    _fill("/detokenize", '{"tokens":[', "300", "]}"),
)


def _encode(value: Any) -> str:
    if isinstance(value, Raw):
        return value
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(str(key))}:{_encode(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_encode, value)) + "]"
    return json.dumps(value)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside."""
    found: list[tuple[Any, Any]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found.append((value, key))
        found.extend(_places(inner))
    return found


def _junk(random_: random.Random) -> Any:
    """A copy: later changes go into it, and must not reach the next request."""
    return copy.deepcopy(random_.choice(JUNK))


def _replace(value: Any, random_: random.Random) -> Any:
    places = _places(value)
    if not places:
        return _junk(random_)
    container, key = random_.choice(places)
    container[key] = _junk(random_)
    return value


def _remove(value: Any, random_: random.Random) -> Any:
    places = _places(value)
    if places:
        container, key = random_.choice(places)
        del container[key]
    return value


def _add(value: Any, random_: random.Random) -> Any:
    if isinstance(value, dict):
        value[random_.choice(_NAMES)] = _junk(random_)
    return value


def _repeat(value: Any, random_: random.Random) -> Any:
    places = [place for place in _places(value) if isinstance(place[0][place[1]], list | str)]
    if places:
        container, key = random_.choice(places)
        # By the whole: what is repeated may stand in many places, since a repeated list has the same parts again.
        most = (MAX_HUGE_BYTES if random_.random() < 0.02 else MAX_REPEATED_BYTES) // len(_encode(value))
        container[key] = container[key] * max(1, min(most, random_.choice((2, 100, 2000))))
    return value


_CHANGES: tuple[Callable[[Any, random.Random], Any], ...] = (_replace, _replace, _replace, _remove, _add, _repeat)
_NAMES = (
    "model",
    "n",
    "best_of",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "stream",
    "tools",
    "tool_choice",
    "response_format",
    "structured_outputs",
    "chat_template",
    "chat_template_kwargs",
    "reasoning_effort",
    "store",
    "metadata",
    "unknown",
    "ignore_eos",
    "min_tokens",
    "frequency_penalty",
    "repetition_penalty",
    "echo",
    "suffix",
    "user",
    "thinking",
    "tokens",
)


def _cut(body: bytes, random_: random.Random) -> bytes:
    return body[: random_.randrange(len(body) + 1)]


def _flip(body: bytes, random_: random.Random) -> bytes:
    changed = bytearray(body)
    for _ in range(random_.choice((1, 3, 20))):
        if changed:
            changed[random_.randrange(len(changed))] = random_.randrange(256)
    return bytes(changed)


def _noise(body: bytes, random_: random.Random) -> bytes:
    return random_.randbytes(random_.choice((1, 100, len(body) + 1)))


_DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (_cut, _flip, _noise)
_HEADERS: tuple[dict[str, str], ...] = (
    {"Content-Type": "text/plain"},
    {"Content-Type": "multipart/form-data"},
    {"Content-Encoding": "gzip"},
    {"Authorization": "Bearer " + "x" * 3000},
    {"Authorization": "Basic !!"},
    {"X-Request-Id": "y" * 500},
    {"X-Request-Id": "ok-1"},
    {"X-Shoal-Priority": "batch"},
    {"X-Shoal-Priority": "urgent;"},
    {"Accept": "image/png"},
)
