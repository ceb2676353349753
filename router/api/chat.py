"""POST /v1/chat/completions."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from router.api.answer_parser import CallArguments, CallStart, Content, Event, Reasoning
from router.api.chat_job import ChatAnswer, ChatJob, ChatUsage, collect_chat, prepare_chat, run_chat
from router.api.chat_types import ChatRequest
from router.api.connection import encode_json, encode_with_items, open_stream, until_gone
from router.api.context import ApiContext, get_context
from router.api.generation import FinishReason, mark_left_out
from router.api.logprobs import chat_logprobs
from router.api.settings import ReasoningField
from router.api.usage import make_usage

routes = APIRouter()


@routes.post("/v1/chat/completions")
async def create_chat_completion(request: Request) -> Response:
    context = get_context(request)
    body = await context.parse(ChatRequest, request)
    job = await until_gone(request, prepare_chat(context, body, request.state.request_id))
    if body.stream:
        return await open_stream(request, _stream(context, job), context.settings)
    return await until_gone(request, _collect(context, job))


def _make_envelope(job: ChatJob, object_name: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": object_name,
        "created": job.created,
        "model": job.model,
    }


def _make_usage(job: ChatJob, usage: ChatUsage) -> dict[str, Any]:
    return make_usage(job.num_prompt_tokens, usage.completion_tokens, usage.cached_tokens, usage.reasoning_tokens)


async def _collect(context: ApiContext, job: ChatJob) -> Response:
    answers, usage = await collect_chat(context, job)

    def encode_choices() -> Iterator[bytes]:
        for index, answer in enumerate(answers):
            yield encode_json(
                {
                    "index": index,
                    "message": _format_message(answer, context.settings.reasoning_field),
                    "logprobs": chat_logprobs(answer.tokens, context.tokenizer) if job.body.logprobs else None,
                    "finish_reason": answer.finish_reason,
                    **mark_left_out(answer.num_left_out),
                }
            )

    def build() -> bytes:
        envelope = _make_envelope(job, "chat.completion")
        return encode_with_items(envelope, "choices", encode_choices(), {"usage": _make_usage(job, usage)})

    num_logprobs = usage.completion_tokens if job.body.logprobs else 0
    return Response(await context.build_body(build, num_tokens=num_logprobs), media_type="application/json")


def _format_message(answer: ChatAnswer, reasoning_field: ReasoningField) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.content}
    if answer.reasoning:
        message |= _format_reasoning(answer.reasoning, reasoning_field)
    if answer.calls:
        message["content"] = answer.content or None
        message["tool_calls"] = [
            {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in answer.calls
        ]
    return message


async def _stream(context: ApiContext, job: ChatJob) -> AsyncGenerator[bytes, None]:
    envelope = _make_envelope(job, "chat.completion.chunk")
    usage = ChatUsage(context, job)
    started: set[int] = set()

    def encode(choice: dict[str, Any]) -> bytes:
        return encode_json({**envelope, "choices": [choice]})

    async with aclosing(run_chat(context, job)) as deltas:
        async for delta in deltas:
            usage.add(delta)
            if delta.index not in started:
                started.add(delta.index)
                yield encode(_format_delta(delta.index, {"role": "assistant", "content": ""}))
            logprobs = chat_logprobs(delta.tokens, context.tokenizer) if job.body.logprobs and delta.tokens else None
            pieces = [_format_event(event, context.settings.reasoning_field) for event in delta.events]
            if logprobs is not None and not pieces:
                pieces.append({"content": ""})
            for position, piece in enumerate(pieces):
                yield encode(_format_delta(delta.index, piece, logprobs if position == 0 else None))
            if delta.finish_reason is not None:
                last = _format_delta(delta.index, {}, finish_reason=delta.finish_reason)
                yield encode(last | mark_left_out(delta.num_left_out))
    if job.body.include_usage:
        yield encode_json({**envelope, "choices": [], "usage": _make_usage(job, usage)})


def _format_reasoning(text: str, field: ReasoningField) -> dict[str, Any]:
    return dict.fromkeys(("reasoning_content", "reasoning") if field == "both" else (field,), text)


def _format_event(event: Event, reasoning_field: ReasoningField) -> dict[str, Any]:
    match event:
        case Content(text):
            return {"content": text}
        case Reasoning(text):
            return _format_reasoning(text, reasoning_field)
        case CallStart(index, call_id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def _format_delta(
    index: int,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    finish_reason: FinishReason | None = None,
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
