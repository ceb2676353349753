"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from router.api.answer_form import bind_text
from router.api.completions_types import DEFAULT_MAX_TOKENS, CompletionRequest
from router.api.connection import encode_json, encode_with_items, open_stream, until_gone
from router.api.context import ApiContext, get_context
from router.api.errors import BadRequest
from router.api.generation import Delta, FinishReason, SequencePlan, generate, mark_left_out
from router.api.logprobs import TokenEntry, completion_logprobs
from router.api.usage import make_usage, sum_cached_tokens
from router.v1 import router_pb2

routes = APIRouter()

# About 300 bytes each until they are sent: three for each token of the longest published context.
_MAX_PROMPT_LOGPROBS = 2**19


@routes.post("/v1/completions")
async def create_completion(request: Request) -> Response:
    context = get_context(request)
    body = await context.parse(CompletionRequest, request)
    model = context.resolve_model(body.model)
    job = await until_gone(request, _prepare(context, body, model, request.state.request_id))
    if body.stream:
        return await open_stream(request, _stream(context, job), context.settings)
    return await until_gone(request, _collect(context, job))


@dataclass(frozen=True, slots=True)
class _Job:
    id: str
    created: int
    model: str
    body: CompletionRequest
    plans: list[SequencePlan]
    num_prompt_tokens: int
    """Each prompt once, whatever n."""

    def envelope(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
        }


async def _prepare(context: ApiContext, body: CompletionRequest, model: str, request_id: str) -> _Job:
    context.set_priority(body.priority)
    num_sequences = len(body.prompt) * body.num_choices
    if num_sequences > context.settings.max_sequences:
        raise BadRequest(
            f"A request may ask for at most {context.settings.max_sequences} sequences (prompts times n).",
            param="n" if body.num_choices > 1 else "prompt",
        )
    context.check_token_ids(body.stop_token_ids, "stop_token_ids")
    context.check_token_ids(tuple(body.logit_bias), "logit_bias")
    form = None if body.structured_outputs is None else bind_text(body.structured_outputs)
    if form is not None:
        await context.grammars.check(form.grammar, form.param)
    skip_special_tokens = body.skip_special_tokens is not False
    texts = [prompt for prompt in body.prompt if isinstance(prompt, str)]
    encoded = iter(await context.encode_texts(texts, add_special_tokens=body.add_special_tokens is not False))
    plans: list[SequencePlan] = []
    num_prompt_tokens = 0
    for prompt in body.prompt:
        token_ids = next(encoded) if isinstance(prompt, str) else prompt
        context.check_token_ids(token_ids, "prompt")
        if not token_ids:
            raise BadRequest("prompt: must have at least one token.", param="prompt")
        num_prompt_tokens += len(token_ids)
        max_tokens = context.limit_tokens(len(token_ids), body.token_limit, DEFAULT_MAX_TOKENS, "prompt")
        if body.echo and body.logprobs is not None:
            _check_num_logprobs(num_prompt_tokens * body.num_choices * (body.logprobs + 1))
        echo = None
        if body.echo:
            echo = (
                prompt
                if isinstance(prompt, str)
                else context.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
            )
        seed = body.draw_seed()
        for choice in range(body.num_choices):
            index = len(plans)
            generate_request = router_pb2.GenerateRequest(
                request_id=f"{request_id}-{index}",
                prompt_token_ids=token_ids,
                sampling=body.sampling_params(seed + choice, context.sampling_defaults),
                max_tokens=max_tokens,
                stop_token_ids=body.stop_token_ids,
                ignore_eos=bool(body.ignore_eos),
                min_tokens=min(body.min_tokens or 0, max_tokens),
                logprobs=body.logprobs,
                prompt_logprobs=body.logprobs if body.echo else None,
                grammar=None if form is None else form.grammar,
                cache_salt=body.cache_salt or "",
            )
            plans.append(
                SequencePlan(
                    index=index,
                    request=generate_request,
                    stops=body.stop,
                    include_stop=bool(body.include_stop_str_in_output),
                    skip_special_tokens=skip_special_tokens,
                    echo=echo,
                    shares_prompt=choice > 0,
                )
            )
    return _Job(f"cmpl-{uuid.uuid4().hex}", int(time.time()), model, body, plans, num_prompt_tokens)


def _check_num_logprobs(number: int) -> None:
    if number > _MAX_PROMPT_LOGPROBS:
        raise BadRequest(
            f"A request may ask for at most {_MAX_PROMPT_LOGPROBS} log probabilities of its prompts (tokens times "
            "logprobs + 1).",
            param="logprobs",
        )


@dataclass(slots=True)
class _Choice:
    """A choice as it grows, for an answer in one piece."""

    index: int
    text: str
    tokens: list[TokenEntry]
    num_tokens: int
    finish_reason: FinishReason | None
    cached_tokens: int = 0
    num_left_out: int = 0

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.tokens.extend(delta.prompt_tokens)
        self.tokens.extend(delta.tokens)
        self.num_tokens += len(delta.tokens)
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.cached_tokens = delta.cached_tokens
        self.num_left_out = delta.num_left_out


async def _collect(context: ApiContext, job: _Job) -> Response:
    choices = [_Choice(plan.index, "", [], 0, None) for plan in job.plans]
    async with aclosing(generate(context.routers, context.tokenizer, job.plans)) as deltas:
        async for delta in deltas:
            choices[delta.index].add(delta)

    usage = make_usage(
        job.num_prompt_tokens,
        sum(choice.num_tokens for choice in choices),
        sum_cached_tokens({choice.index: choice.cached_tokens for choice in choices}, job.body.num_choices),
    )

    def encode_choices() -> Iterator[bytes]:
        for choice in choices:
            formatted = _format_choice(context, job, choice.index, choice.text, choice.tokens, choice.finish_reason)
            yield encode_json(formatted | mark_left_out(choice.num_left_out))

    def build() -> bytes:
        return encode_with_items(job.envelope(), "choices", encode_choices(), {"usage": usage})

    num_logprobs = 0 if job.body.logprobs is None else sum(len(choice.tokens) for choice in choices)
    return Response(await context.build_body(build, num_tokens=num_logprobs), media_type="application/json")


async def _stream(context: ApiContext, job: _Job) -> AsyncGenerator[bytes, None]:
    envelope = job.envelope()
    num_tokens = 0
    cached_tokens: dict[int, int] = {}

    async def encode_choice(
        delta: Delta, text: str, entries: list[TokenEntry], finish_reason: FinishReason | None
    ) -> bytes:
        def build() -> dict[str, Any]:
            choice = _format_choice(context, job, delta.index, text, entries, finish_reason)
            if finish_reason is not None:
                choice |= mark_left_out(delta.num_left_out)
            return {**envelope, "choices": [choice]}

        num_tokens = 0 if job.body.logprobs is None else len(entries)
        return await context.build_body(lambda: encode_json(build()), num_tokens=num_tokens)

    async with aclosing(generate(context.routers, context.tokenizer, job.plans)) as deltas:
        async for delta in deltas:
            num_tokens += len(delta.tokens)
            cached_tokens[delta.index] = delta.cached_tokens
            entries = [*delta.prompt_tokens, *delta.tokens]
            if delta.text or (entries and job.body.logprobs is not None):
                yield await encode_choice(delta, delta.text, entries, None)
            if delta.finish_reason is not None:
                yield await encode_choice(delta, "", [], delta.finish_reason)
    if job.body.include_usage:
        num_cached = sum_cached_tokens(cached_tokens, job.body.num_choices)
        yield encode_json(
            {**envelope, "choices": [], "usage": make_usage(job.num_prompt_tokens, num_tokens, num_cached)}
        )


def _format_choice(
    context: ApiContext,
    job: _Job,
    index: int,
    text: str,
    entries: list[TokenEntry],
    finish_reason: FinishReason | None,
) -> dict[str, Any]:
    has_logprobs = job.body.logprobs is not None and bool(entries)
    return {
        "index": index,
        "text": text,
        "logprobs": completion_logprobs(entries, context.tokenizer) if has_logprobs else None,
        "finish_reason": finish_reason,
    }
