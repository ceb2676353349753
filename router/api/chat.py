"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from router.api.chat_types import ChatRequest, Message
from router.api.connection import encode_json, open_stream, until_gone
from router.api.context import ApiContext, get_context
from router.api.errors import BadRequest, NotSupported
from router.api.fields import parse_request
from router.api.generation import FinishReason, SequencePlan, generate
from router.api.logprobs import TokenEntry, chat_logprobs
from router.api.usage import make_usage, sum_cached_tokens
from router.v1 import router_pb2

routes = APIRouter()


@routes.post("/v1/chat/completions")
async def create_chat_completion(request: Request) -> Response:
    context = get_context(request)
    body = parse_request(ChatRequest, await context.read_json(request))
    model = context.resolve_model(body.model)
    job = await until_gone(request, _prepare(context, body, model, request.state.request_id))
    if body.stream:
        return await open_stream(request, _stream(context, job), context.settings)
    return await until_gone(request, _collect(context, job))


async def encode_chat(
    context: ApiContext, messages: Sequence[Message], *, add_generation_prompt: bool, switches: dict[str, bool]
) -> list[int]:
    """Token ids of a chat, by the checkpoint's template. Raises BadRequest."""
    template = context.chat_template
    if template is None:
        raise NotSupported("This model has no chat template; use /v1/completions.")
    if len(messages) > context.settings.max_messages:
        raise BadRequest(f"messages: at most {context.settings.max_messages} are accepted.", param="messages")
    return await context.run_in_thread(
        lambda: template.encode(messages, add_generation_prompt=add_generation_prompt, switches=switches)
    )


@dataclass(frozen=True, slots=True)
class _Job:
    id: str
    created: int
    model: str
    body: ChatRequest
    plans: list[SequencePlan]
    num_prompt_tokens: int

    def envelope(self, object_name: str) -> dict[str, Any]:
        return {"id": self.id, "object": object_name, "created": self.created, "model": self.model}


async def _prepare(context: ApiContext, body: ChatRequest, model: str, request_id: str) -> _Job:
    if body.num_choices > context.settings.max_sequences:
        raise BadRequest(f"n: must not be more than {context.settings.max_sequences}.", param="n")
    context.check_token_ids(body.stop_token_ids, "stop_token_ids")
    context.check_token_ids(tuple(body.logit_bias), "logit_bias")
    token_ids = await encode_chat(
        context,
        body.messages,
        add_generation_prompt=body.add_generation_prompt is not False,
        switches=body.chat_template_kwargs,
    )
    context.check_token_ids(token_ids, "messages")
    if not token_ids:
        raise BadRequest("messages: the model's chat template makes no prompt of them.", param="messages")
    max_tokens = context.limit_tokens(len(token_ids), body.token_limit, None, "messages")
    seed = body.draw_seed()
    plans = [
        SequencePlan(
            index=index,
            request=router_pb2.GenerateRequest(
                request_id=f"{request_id}-{index}",
                prompt_token_ids=token_ids,
                sampling=body.sampling_params(seed + index, context.sampling_defaults),
                max_tokens=max_tokens,
                stop_token_ids=body.stop_token_ids,
                ignore_eos=bool(body.ignore_eos),
                min_tokens=min(body.min_tokens or 0, max_tokens),
                logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            ),
            stops=body.stop,
            include_stop=bool(body.include_stop_str_in_output),
            skip_special_tokens=body.skip_special_tokens is not False,
            echo=None,
            shares_prompt=index > 0,
        )
        for index in range(body.num_choices)
    ]
    return _Job(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), model, body, plans, len(token_ids))


async def _collect(context: ApiContext, job: _Job) -> Response:
    texts = ["" for _ in job.plans]
    tokens: list[list[TokenEntry]] = [[] for _ in job.plans]
    finish_reasons: list[FinishReason | None] = [None for _ in job.plans]
    cached_tokens: dict[int, int] = {}
    async with aclosing(generate(context.routers, context.tokenizer, job.plans)) as deltas:
        async for delta in deltas:
            texts[delta.index] += delta.text
            tokens[delta.index].extend(delta.tokens)
            finish_reasons[delta.index] = delta.finish_reason
            cached_tokens[delta.index] = delta.cached_tokens
    num_tokens = sum(map(len, tokens))

    def build() -> dict[str, Any]:
        return {
            **job.envelope("chat.completion"),
            "choices": [
                {
                    "index": plan.index,
                    "message": {"role": "assistant", "content": texts[plan.index]},
                    "logprobs": chat_logprobs(tokens[plan.index], context.tokenizer) if job.body.logprobs else None,
                    "finish_reason": finish_reasons[plan.index],
                }
                for plan in job.plans
            ],
            "usage": make_usage(job.num_prompt_tokens, num_tokens, sum_cached_tokens(cached_tokens, len(job.plans))),
        }

    content = await context.build_json(build, num_tokens=num_tokens if job.body.logprobs else 0)
    return Response(content, media_type="application/json")


async def _stream(context: ApiContext, job: _Job) -> AsyncGenerator[bytes, None]:
    envelope = job.envelope("chat.completion.chunk")
    num_tokens = 0
    cached_tokens: dict[int, int] = {}
    started: set[int] = set()

    def encode(choice: dict[str, Any]) -> bytes:
        return encode_json({**envelope, "choices": [choice]})

    async with aclosing(generate(context.routers, context.tokenizer, job.plans)) as deltas:
        async for delta in deltas:
            num_tokens += len(delta.tokens)
            cached_tokens[delta.index] = delta.cached_tokens
            if delta.index not in started:
                started.add(delta.index)
                yield encode(_format_delta(delta.index, {"role": "assistant", "content": ""}))
            logprobs = chat_logprobs(delta.tokens, context.tokenizer) if job.body.logprobs and delta.tokens else None
            if delta.text or logprobs is not None:
                yield encode(_format_delta(delta.index, {"content": delta.text}, logprobs))
            if delta.finish_reason is not None:
                yield encode(_format_delta(delta.index, {}, finish_reason=delta.finish_reason))
    if job.body.include_usage:
        usage = make_usage(job.num_prompt_tokens, num_tokens, sum_cached_tokens(cached_tokens, len(job.plans)))
        yield encode_json({**envelope, "choices": [], "usage": usage})


def _format_delta(
    index: int,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    finish_reason: FinishReason | None = None,
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
