"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API, for the tools that speak it (Claude Code).

Errors have this server's one shape, as on every route; Anthropic's clients go by the status.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from router.api.answer_parser import CallArguments, CallStart, Content, Event, Reasoning
from router.api.chat_job import (
    ChatAnswer,
    ChatDelta,
    ChatJob,
    ChatUsage,
    collect_chat,
    encode_chat,
    prepare_chat,
    run_chat,
)
from router.api.connection import NAMED, encode_event, encode_json, open_stream, until_gone
from router.api.context import ApiContext, get_context
from router.api.generation import mark_left_out
from router.api.messages_types import CountTokensRequest, MessagesRequest

routes = APIRouter()

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


@routes.post("/v1/messages")
async def create_message(request: Request) -> Response:
    context = get_context(request)
    body = await context.parse(MessagesRequest, request)
    job = await until_gone(request, prepare_chat(context, body.to_full_chat(), request.state.request_id))
    if body.stream:
        return await open_stream(request, _stream(context, job), context.settings, NAMED)
    return await until_gone(request, _collect(context, job))


@routes.post("/v1/messages/count_tokens")
async def count_tokens(request: Request) -> dict[str, int]:
    context = get_context(request)
    chat = (await context.parse(CountTokensRequest, request)).to_chat()
    context.resolve_model(chat.model)
    token_ids = await encode_chat(
        context,
        chat.messages,
        add_generation_prompt=True,
        switches=chat.template_switches,
        tools=chat.usable_tools,
    )
    return {"input_tokens": len(token_ids)}


async def _collect(context: ApiContext, job: ChatJob) -> Response:
    answers, usage = await collect_chat(context, job)
    answer = answers[0]
    message = {
        **_make_message(job),
        "content": _format_blocks(answer),
        "stop_reason": _stop_reason(answer.finish_reason, answer.stopped_by),
        "stop_sequence": answer.stopped_by,
        "usage": _make_usage(job, usage),
    }
    return Response(encode_json(message), media_type="application/json")


def _make_message(job: ChatJob) -> dict[str, Any]:
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": job.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def _format_blocks(answer: ChatAnswer) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if answer.reasoning:
        blocks.append({"type": "thinking", "thinking": answer.reasoning, "signature": ""})
    if answer.content:
        blocks.append({"type": "text", "text": answer.content})
    for call in answer.calls:
        blocks.append(
            {"type": "tool_use", "id": call.call_id, "name": call.name, "input": _parse_input(call.arguments)}
        )
    return blocks


def _parse_input(arguments: str) -> dict[str, Any]:
    """Empty where an answer was cut off within them."""
    try:
        value = json.loads(arguments)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _stop_reason(finish_reason: str | None, stopped_by: str | None) -> str | None:
    return "stop_sequence" if stopped_by is not None else _STOP_REASONS.get(finish_reason or "")


def _make_usage(job: ChatJob, usage: ChatUsage) -> dict[str, int]:
    """Anthropic counts cached tokens apart."""
    return {
        "input_tokens": job.num_prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
        **mark_left_out(usage.num_left_out),
    }


async def _stream(context: ApiContext, job: ChatJob) -> AsyncGenerator[bytes, None]:
    usage = ChatUsage(context, job)
    blocks = _BlockWriter()
    last: ChatDelta | None = None
    async with aclosing(run_chat(context, job)) as deltas:
        async for delta in deltas:
            if last is None:
                first_usage = ChatUsage(context, job)
                first_usage.add(delta._replace(tokens=()))
                message = {**_make_message(job), "usage": _make_usage(job, first_usage)}
                yield encode_event({"type": "message_start", "message": message})
            last = delta
            usage.add(delta)
            for event in delta.events:
                for written in blocks.write(event):
                    yield encode_event(written)
    for written in blocks.close():
        yield encode_event(written)
    if last is not None:
        stopped = {
            "stop_reason": _stop_reason(last.finish_reason, last.stopped_by),
            "stop_sequence": last.stopped_by,
        }
        yield encode_event({"type": "message_delta", "delta": stopped, "usage": _make_usage(job, usage)})
    yield encode_event({"type": "message_stop"})


class _BlockWriter:
    """Events as the deltas of content blocks, one of which is open at a time."""

    def __init__(self) -> None:
        self._index = -1
        self._open: str | None = None

    def write(self, event: Event) -> Iterator[dict[str, Any]]:
        match event:
            case Reasoning(text):
                yield from self._turn_to("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                yield self._delta({"type": "thinking_delta", "thinking": text})
            case Content(text):
                yield from self._turn_to("text", {"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": text})
            case CallStart(_, call_id, name):
                block = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
                yield from self._turn_to(call_id, block)
            case CallArguments(_, text):
                yield self._delta({"type": "input_json_delta", "partial_json": text})

    def close(self) -> Iterator[dict[str, Any]]:
        if self._open is not None:
            yield {"type": "content_block_stop", "index": self._index}
            self._open = None

    def _turn_to(self, name: str, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if self._open == name:
            return
        yield from self.close()
        self._open = name
        self._index += 1
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}
