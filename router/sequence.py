"""One request inside the engine: its tokens, its cache and the queue on which its caller waits."""

from __future__ import annotations

import asyncio
import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from router.token_counts import TokenCounts

if TYPE_CHECKING:  # the scheduler needs no torch
    from router.sampler import SamplingParams, TokenLogprobs


class FinishReason(enum.Enum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class GenerationRequest:
    """What a caller asks for. logprobs, prompt_logprobs: alternatives per token; None: no logprobs at all.

    num_answer_tokens: tokens at the prompt's end that another router generated: to penalties, they are the answer's.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    stop_token_ids: frozenset[int]
    ignore_eos: bool
    min_tokens: int
    logprobs: int | None
    prompt_logprobs: int | None
    num_answer_tokens: int = 0


@dataclass(frozen=True)
class GeneratedToken:
    """logprobs is None where none were asked for, and for the first token of a prompt."""

    token_id: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True)
class SequenceOutput:
    """What one step gave a sequence. prompt_tokens come before any token."""

    tokens: tuple[GeneratedToken, ...] = ()
    prompt_tokens: tuple[GeneratedToken, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None


@dataclass(eq=False)
class Sequence:
    """Mutated by the engine only. token_ids: the prompt, then what was generated.

    num_computed: tokens whose cache rows are written. block_ids: the blocks with these rows, in order.
    counts: of its tokens, where it has penalties. outputs ends with one that has a finish_reason, or with an error.
    """

    request: GenerationRequest
    token_ids: list[int]
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list[int])
    cancelled: bool = False
    outputs: asyncio.Queue[SequenceOutput | Exception] = field(
        default_factory=asyncio.Queue[SequenceOutput | Exception]
    )

    counts: TokenCounts | None = field(init=False)

    def __post_init__(self) -> None:
        self.counts = None
        if self.request.sampling.penalties is not None:
            start = self.num_prompt_tokens - self.request.num_answer_tokens
            self.counts = TokenCounts(self.token_ids[:start], self.token_ids[start:])

    def append(self, token_id: int) -> None:
        """Add a generated token."""
        self.token_ids.append(token_id)
        if self.counts is not None:
            self.counts.add(token_id)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def max_total_tokens(self) -> int:
        """The length at which it ends; the last token is never fed back, so it needs no cache row."""
        return self.num_prompt_tokens + self.request.max_tokens
