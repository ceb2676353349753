"""One request for an answer to a chat, whatever API it came by: prepared, run, and read into events.

chat.py, messages.py and responses.py translate between their APIs and this.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import NamedTuple

from router.api.answer_form import bind_answer, is_reasoning_open
from router.api.answer_parser import (
    THINK_BEGIN,
    THINK_END,
    AnswerParser,
    CallArguments,
    CallStart,
    Content,
    Event,
    Reasoning,
)
from router.api.chat_types import ChatRequest, Message
from router.api.context import ApiContext
from router.api.errors import BadRequest, NotSupported
from router.api.form_types import Tool
from router.api.generation import Delta, FinishReason, SequencePlan, generate
from router.api.logprobs import TokenEntry
from router.api.thinking_budget import ThinkingBudget
from router.api.usage import sum_cached_tokens
from router.v1 import router_pb2


@dataclass(frozen=True, slots=True)
class ChatJob:
    """is_reasoning: the prompt ends in an open reasoning part."""

    created: int
    model: str
    body: ChatRequest
    plans: list[SequencePlan]
    num_prompt_tokens: int
    is_reasoning: bool


class ChatDelta(NamedTuple):
    """A piece of one choice. tokens: those behind the events, as far as they are text; finish_reason: None until the
    last piece. stopped_by: the stop string that ended it. num_left_out: see Delta."""

    index: int
    events: list[Event]
    tokens: Sequence[TokenEntry]
    finish_reason: FinishReason | None
    cached_tokens: int
    stopped_by: str | None
    num_left_out: int


async def encode_chat(
    context: ApiContext,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    switches: dict[str, bool],
    tools: Sequence[Tool] = (),
) -> list[int]:
    """Token ids of a chat, by the checkpoint's template. Raises BadRequest."""
    template = context.chat_template
    if template is None:
        raise NotSupported("This model has no chat template; use /v1/completions.")
    return await context.run_in_thread(
        lambda: template.encode(messages, add_generation_prompt=add_generation_prompt, switches=switches, tools=tools)
    )


async def prepare_chat(context: ApiContext, body: ChatRequest, request_id: str) -> ChatJob:
    """Everything up to the routers. Raises ApiError."""
    model = context.resolve_model(body.model)
    context.set_priority(body.priority)
    if body.num_choices > context.settings.max_sequences:
        raise BadRequest(f"n: must not be more than {context.settings.max_sequences}.", param="n")
    context.check_token_ids(body.stop_token_ids, "stop_token_ids")
    context.check_token_ids(tuple(body.logit_bias), "logit_bias")
    token_ids = await encode_chat(
        context,
        body.messages,
        add_generation_prompt=body.add_generation_prompt is not False,
        switches=body.template_switches,
        tools=body.usable_tools,
    )
    context.check_token_ids(token_ids, "messages")
    if not token_ids:
        raise BadRequest("messages: the model's chat template makes no prompt of them.", param="messages")
    max_tokens = context.limit_tokens(len(token_ids), body.token_limit, None, "messages")
    is_reasoning = is_reasoning_open(token_ids, context.marker_ids)
    grammar = await _bind(context, body, is_reasoning=is_reasoning)
    thinking = None
    if body.thinking_token_budget is not None and (end_id := context.marker_ids.get(THINK_END)) is not None:
        begin_id = context.marker_ids.get(THINK_BEGIN)
        thinking = ThinkingBudget(body.thinking_token_budget, begin_id, end_id, is_reasoning)
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
                grammar=grammar,
                cache_salt=body.cache_salt or "",
            ),
            # A marker may be asked for as text; in what is searched it is a character of its own.
            stops=tuple(dict.fromkeys([*body.stop, *map(context.stand_ins.put, body.stop)])),
            include_stop=bool(body.include_stop_str_in_output),
            skip_special_tokens=body.skip_special_tokens is not False,
            echo=None,
            shares_prompt=index > 0,
            stand_ins=context.stand_ins.by_token_id,
            thinking=thinking,
        )
        for index in range(body.num_choices)
    ]
    return ChatJob(int(time.time()), model, body, plans, len(token_ids), is_reasoning)


async def _bind(context: ApiContext, body: ChatRequest, *, is_reasoning: bool) -> router_pb2.Grammar | None:
    assert context.chat_template is not None
    form = bind_answer(body, context.chat_template.tool_format, context.marker_ids, is_reasoning=is_reasoning)
    if form is None:
        return None
    await context.grammars.check(form.grammar, form.param)
    return form.grammar


async def run_chat(context: ApiContext, job: ChatJob) -> AsyncGenerator[ChatDelta, None]:
    """Yield the pieces of all choices as they come. Close it (aclosing) to cancel the work. Raises ApiError."""
    tools = job.body.usable_tools
    tool_format = context.chat_template.tool_format if context.chat_template is not None and tools else None
    must_call = job.body.must_call
    parsers = [
        AnswerParser(context.stand_ins, tool_format, is_reasoning=job.is_reasoning, must_call=must_call)
        for _ in job.plans
    ]
    async with aclosing(generate(context.routers, context.tokenizer, job.plans)) as deltas:
        async for delta in deltas:
            yield _read(delta, parsers[delta.index])


def _read(delta: Delta, parser: AnswerParser) -> ChatDelta:
    events = parser.push(delta.text, is_last=delta.finish_reason is not None)
    finish_reason = delta.finish_reason
    if finish_reason == "stop" and parser.num_calls > 0:
        finish_reason = "tool_calls"
    return ChatDelta(
        delta.index, events, delta.tokens, finish_reason, delta.cached_tokens, delta.stopped_by, delta.num_left_out
    )


@dataclass(slots=True)
class Call:
    call_id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class ChatAnswer:
    """One choice as it grows, for an answer in one piece."""

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list[Call])
    tokens: list[TokenEntry] = field(default_factory=list[TokenEntry])
    finish_reason: FinishReason | None = None
    stopped_by: str | None = None
    num_left_out: int = 0

    def add(self, delta: ChatDelta) -> None:
        self.tokens.extend(delta.tokens)
        self.finish_reason = delta.finish_reason
        self.stopped_by = delta.stopped_by
        self.num_left_out = delta.num_left_out
        for event in delta.events:
            match event:
                case Reasoning(text):
                    self.reasoning += text
                case Content(text):
                    self.content += text
                case CallStart(_, call_id, name):
                    self.calls.append(Call(call_id, name))
                case CallArguments(index, text):
                    self.calls[index].arguments += text


class ChatUsage:
    """Counts the tokens of all choices of a job."""

    def __init__(self, context: ApiContext, job: ChatJob) -> None:
        self._think_begin, self._think_end = (context.marker_ids.get(marker) for marker in (THINK_BEGIN, THINK_END))
        self._job = job
        self._is_reasoning = [job.is_reasoning for _ in job.plans]
        self._is_started = [False for _ in job.plans]
        self._cached_tokens: dict[int, int] = {}
        self._left_out: dict[int, int] = {}
        self.completion_tokens = 0
        self.reasoning_tokens = 0

    def add(self, delta: ChatDelta) -> None:
        index = delta.index
        self._cached_tokens[index] = delta.cached_tokens
        self._left_out[index] = delta.num_left_out
        self.completion_tokens += len(delta.tokens)
        for token in delta.tokens:
            if token.token_id == self._think_begin and not self._is_started[index]:
                self._is_reasoning[index] = True
            self._is_started[index] = True
            self.reasoning_tokens += self._is_reasoning[index]
            if token.token_id == self._think_end:
                self._is_reasoning[index] = False

    @property
    def num_left_out(self) -> int:
        """Experts that all choices together had to do without (router/degradation.py)."""
        return sum(self._left_out.values())

    @property
    def cached_tokens(self) -> int:
        return sum_cached_tokens(self._cached_tokens, len(self._job.plans))


async def collect_chat(context: ApiContext, job: ChatJob) -> tuple[list[ChatAnswer], ChatUsage]:
    """The whole answers, by index of the choice. Raises ApiError."""
    answers = [ChatAnswer() for _ in job.plans]
    usage = ChatUsage(context, job)
    async with aclosing(run_chat(context, job)) as deltas:
        async for delta in deltas:
            answers[delta.index].add(delta)
            usage.add(delta)
    return answers, usage
