"""One request of `shoal bench` to an OpenAI endpoint: sent, streamed, timed.

Made to cost little beside the server that it measures: events are told apart by a search in their bytes, and only the
one with the usage and errors are parsed as JSON.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from cluster.bench_load import PlannedRequest
from cluster.bench_statistics import Outcome

Api = Literal["completions", "chat"]

# A piece of text that is not empty, in an event of either route.
_TEXT = re.compile(rb'"(?:text|content|reasoning_content)"\s*:\s*"[^"]')
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_ERROR = re.compile(rb'^\s*\{\s*"error"\s*:')
_FINISHED = re.compile(rb'"finish_reason"\s*:\s*"')


@dataclass(frozen=True)
class Target:
    """The endpoint and what every request to it says."""

    model: str
    api: Api
    stream: bool
    temperature: float
    ignore_eos: bool


class StreamFailed(Exception):
    """The answer began and did not end as it should. The message is the kind of failure."""


@dataclass
class Answer:
    """What is known of an answer so far. arrivals_s: of the events that brought text; clock of the caller."""

    arrivals_s: list[float] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_pieces: int = 0
    is_finished: bool = False

    def push(self, data: bytes, now_s: float) -> None:
        """One event's data. Raises StreamFailed for an error event."""
        if data == b"[DONE]":
            self.is_finished = True
            return
        if _ERROR.match(data):
            raise StreamFailed(f"error event: {read_error_code(data)}")
        if _TEXT.search(data):
            self.arrivals_s.append(now_s)
            self.num_pieces += 1
        elif not self.arrivals_s and _FINISHED.search(data):
            # Tokens without any text, such as an end of sequence at once.
            self.arrivals_s.append(now_s)
        if _USAGE.search(data):
            self.read_usage(json.loads(data))

    def read_usage(self, document: dict[str, Any]) -> None:
        usage = document.get("usage") or {}
        self.num_prompt_tokens = int(usage.get("prompt_tokens", 0))
        self.num_output_tokens = int(usage.get("completion_tokens", 0))


class EventReader:
    """Cuts a byte stream into the data of its server-sent events; comments and other fields are dropped."""

    def __init__(self) -> None:
        self._rest = b""

    def push(self, chunk: bytes) -> Iterator[bytes]:
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


async def send(
    client: httpx.AsyncClient,
    target: Target,
    planned: PlannedRequest,
    *,
    started_s: float,
    due_s: float,
    on_piece: Callable[[], None],
) -> Outcome:
    """started_s: time.perf_counter() at the start of the run; due_s: seconds after it. Never raises what the server or
    the network did: that is the outcome."""
    answer = Answer()
    error: str | None = None
    try:
        if target.stream:
            await _stream(client, target, planned, answer, on_piece)
        else:
            await _fetch(client, target, planned, answer)
    except StreamFailed as failure:
        error = str(failure)
    except httpx.TimeoutException as failure:
        error = f"timeout: {type(failure).__name__}"
    except httpx.ConnectError:
        error = "no connection"
    except httpx.HTTPError as failure:
        error = f"connection lost: {type(failure).__name__}"
    except ValueError:
        error = "answer is no JSON"
    ended_s = time.perf_counter() - started_s
    arrivals_s = answer.arrivals_s
    return Outcome(
        due_s=due_s,
        ended_s=ended_s,
        error=error,
        first_s=arrivals_s[0] - started_s if arrivals_s else None,
        last_s=arrivals_s[-1] - started_s if arrivals_s else None,
        gaps_s=tuple(later - earlier for earlier, later in itertools.pairwise(arrivals_s)),
        num_prompt_tokens=answer.num_prompt_tokens,
        # A server that tells no usage: one piece is about one token.
        num_output_tokens=answer.num_output_tokens or answer.num_pieces,
    )


def build_body(target: Target, planned: PlannedRequest) -> dict[str, Any]:
    """The JSON body of a request. Raises ValueError if the prompt does not fit the route."""
    prompt = planned.prompt
    is_messages = isinstance(prompt, list) and isinstance(prompt[0], dict)
    body: dict[str, Any] = {"model": target.model, "max_tokens": planned.max_tokens, "temperature": target.temperature}
    if target.api == "completions":
        if is_messages:
            raise ValueError("a prompt of messages needs --api chat")
        body["prompt"] = prompt
    else:
        body["messages"] = prompt if is_messages else [{"role": "user", "content": prompt}]
    body["seed"] = planned.seed
    if target.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if target.ignore_eos:
        body["ignore_eos"] = True
    return body


def read_error_code(data: bytes) -> str:
    """The most telling word of an OpenAI error body."""
    try:
        error = json.loads(data)["error"]
        return str(error.get("code") or error.get("type") or "unknown")
    except (ValueError, KeyError, TypeError, AttributeError):
        return "unknown"


async def _stream(
    client: httpx.AsyncClient,
    target: Target,
    planned: PlannedRequest,
    answer: Answer,
    on_piece: Callable[[], None],
) -> None:
    reader = EventReader()
    async with client.stream("POST", _path(target), json=build_body(target, planned)) as response:
        if not response.is_success:
            raise StreamFailed(f"HTTP {response.status_code}: {read_error_code(await response.aread())}")
        async for chunk in response.aiter_bytes():
            now_s = time.perf_counter()
            for data in reader.push(chunk):
                answer.push(data, now_s)
            on_piece()
    if not answer.is_finished:
        raise StreamFailed("stream ended without [DONE]")


async def _fetch(client: httpx.AsyncClient, target: Target, planned: PlannedRequest, answer: Answer) -> None:
    response = await client.post(_path(target), json=build_body(target, planned))
    if not response.is_success:
        raise StreamFailed(f"HTTP {response.status_code}: {read_error_code(response.content)}")
    answer.read_usage(response.json())


def _path(target: Target) -> str:
    return "/v1/completions" if target.api == "completions" else "/v1/chat/completions"
