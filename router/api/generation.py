"""From a router's tokens to the pieces of text that a client gets, for one sequence or several at once.

Adds what routers do not know: characters, stop strings, where each token stands in the text. Formatting into OpenAI
objects is done by completions.py and chat.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from router.api.detokenizer import Detokenizer, StopResult, StopStrings
from router.api.logprobs import TokenEntry, read_token
from router.api.prompt_backlog import PromptBacklog
from router.api.request_use import get_current_use
from router.api.router_client import RouterClient
from router.api.thinking_budget import ThinkingBudget
from router.api.tokenizer import TextTokenizer
from router.v1 import router_pb2

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """One sequence to generate."""

    index: int
    """Of the choice in the response."""
    request: router_pb2.GenerateRequest
    stops: tuple[str, ...]
    include_stop: bool
    """Whether a stop string, or a stop id's own text, stays in the text."""
    skip_special_tokens: bool
    echo: str | None
    """The prompt's text, where the client wants it in front of the answer."""
    shares_prompt: bool = False
    """Whether it is a further choice for the prompt of the plan before: its prompt is counted there."""
    stand_ins: Mapping[int, str] = field(default_factory=dict[int, str])
    """Text by token id, for tokens that mean more than their text."""
    thinking: ThinkingBudget | None = None


class Delta(NamedTuple):
    """A piece of one choice."""

    index: int
    text: str
    prompt_tokens: Sequence[TokenEntry]
    tokens: Sequence[TokenEntry]
    """Generated tokens that text was held back for, the current ones included."""
    finish_reason: FinishReason | None
    cached_tokens: int
    """Of the prompt, found in the router's cache; the same in every piece of a choice."""
    router_us: int = 0
    expert_us: int = 0
    """What the choice has cost so far."""
    stopped_by: str | None = None
    """The stop string that ended the text."""
    num_left_out: int = 0
    """Experts that the choice had to do without so far (router/degradation.py)."""


async def generate(
    client: RouterClient, tokenizer: TextTokenizer, plans: Sequence[SequencePlan]
) -> AsyncGenerator[Delta, None]:
    """Yield the pieces of all plans as they come. Close it (aclosing) to cancel the work. Raises ApiError.

    Counts what it yields for the account of the current request, before it does.
    """
    with get_current_use().measure(plans) as meter:
        async with aclosing(_generate_all(client, tokenizer, plans)) as deltas:
            async for delta in deltas:
                meter.count(delta)
                yield delta


async def _generate_all(
    client: RouterClient, tokenizer: TextTokenizer, plans: Sequence[SequencePlan]
) -> AsyncGenerator[Delta, None]:
    if len(plans) == 1:
        async with aclosing(_generate_one(client, tokenizer, plans[0])) as deltas:
            async for delta in deltas:
                yield delta
        return
    # Bounded, so that a client that reads slowly slows the routers' streams instead of filling memory.
    queue: asyncio.Queue[Delta | Exception | None] = asyncio.Queue(maxsize=2 * len(plans))
    backlog = PromptBacklog()
    pumps = [asyncio.create_task(_pump(client, tokenizer, plan, backlog, queue)) for plan in plans]
    try:
        num_running = len(pumps)
        while num_running > 0:
            item = await queue.get()
            if item is None:
                num_running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(
    client: RouterClient,
    tokenizer: TextTokenizer,
    plan: SequencePlan,
    backlog: PromptBacklog,
    queue: asyncio.Queue[Delta | Exception | None],
) -> None:
    try:
        leave = await backlog.enter(len(plan.request.prompt_token_ids))
        try:
            async with aclosing(_generate_one(client, tokenizer, plan)) as deltas:
                async for delta in deltas:
                    leave()
                    await queue.put(delta)
        finally:
            leave()
        await queue.put(None)
    except Exception as error:  # Handed to the consumer, which raises it.
        await queue.put(error)


async def _generate_one(
    client: RouterClient, tokenizer: TextTokenizer, plan: SequencePlan
) -> AsyncGenerator[Delta, None]:
    assembler = _Assembler(tokenizer, plan)
    async with aclosing(client.generate(plan.request, plan.thinking)) as responses:
        async for response in responses:
            for delta in assembler.push(response):
                yield delta
            if assembler.is_finished:
                return


class _Assembler:
    """Turns the responses for one sequence into deltas."""

    def __init__(self, tokenizer: TextTokenizer, plan: SequencePlan) -> None:
        self._tokenizer = tokenizer
        self._plan = plan
        self._detokenizer = Detokenizer(
            tokenizer, skip_special_tokens=plan.skip_special_tokens, stand_ins=plan.stand_ins
        )
        self._prompt_detokenizer = Detokenizer(tokenizer, skip_special_tokens=plan.skip_special_tokens)
        self._stops = StopStrings(plan.stops, include_in_output=plan.include_stop)
        self._text_start = len(plan.echo or "")
        self._prompt_tokens: list[TokenEntry] = []
        self._tokens: list[TokenEntry] = []
        self._num_tokens = 0
        self._is_echoed = plan.echo is None
        self._cached_tokens: int | None = None
        self.is_finished = False

    def push(self, response: router_pb2.GenerateResponse) -> list[Delta]:
        for token in response.prompt_tokens:
            offset = min(self._prompt_detokenizer.num_characters, self._text_start)
            self._prompt_detokenizer.push(token.token_id)
            self._prompt_tokens.append(read_token(token, offset))
        finish_reason = _FINISH_REASONS[response.finish_reason]
        if self._cached_tokens is None:  # a router that takes over after a failure finds some of the answer, too
            self._cached_tokens = response.cached_tokens
        deltas: list[Delta] = []
        if not self._is_echoed and (response.tokens or finish_reason is not None):
            deltas.append(
                Delta(
                    self._plan.index, self._plan.echo or "", self._prompt_tokens, (), None, self._cached_tokens,
                    response.router_us, response.expert_us,
                )
            )  # fmt: skip
            self._is_echoed = True
        text, stopped_by = self._push_tokens(response.tokens, ends_with_stop_id=finish_reason == "stop")
        if stopped_by is not None:
            finish_reason = "stop"
        elif finish_reason is not None:
            result = self._stops.push(self._detokenizer.flush())
            text += result.text
            stopped_by = result.stopped_by
            if stopped_by is None:
                text += self._stops.flush()
        if text or finish_reason is not None:
            deltas.append(
                Delta(
                    self._plan.index, text, (), self._tokens, finish_reason, self._cached_tokens,
                    response.router_us, response.expert_us, stopped_by, response.num_left_out,
                )
            )  # fmt: skip
            self._tokens = []
        self.is_finished = finish_reason is not None
        return deltas

    def _push_tokens(self, tokens: Sequence[router_pb2.TokenOutput], *, ends_with_stop_id: bool) -> StopResult:
        """Returns the text that may be shown, and what ended it."""
        text = ""
        for position, token in enumerate(tokens):
            self._num_tokens += 1
            self._tokens.append(read_token(token, self._text_start + self._detokenizer.num_characters))
            is_stop_id = ends_with_stop_id and position == len(tokens) - 1
            if is_stop_id and not self._plan.include_stop:
                continue
            piece = self._detokenizer.push(token.token_id)
            if self._num_tokens <= self._plan.request.min_tokens:
                text += piece
                continue
            result = self._stops.push(piece)
            text += result.text
            if result.stopped:
                return StopResult(text, result.stopped_by)
        return StopResult(text)


_FINISH_REASONS: dict[int, FinishReason | None] = {
    router_pb2.FINISH_REASON_UNSPECIFIED: None,
    router_pb2.FINISH_REASON_STOP: "stop",
    router_pb2.FINISH_REASON_LENGTH: "length",
}


def mark_left_out(num_left_out: int) -> dict[str, int]:
    """What a choice says of an answer that had to do without experts; nothing of any other."""
    return {"left_out_experts": num_left_out} if num_left_out else {}
