"""One request inside the engine: its tokens, its cache and the queue on which its caller waits."""

from __future__ import annotations

import asyncio
import enum
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from router.grammar import GrammarState
from router.token_counts import TokenCounts

if TYPE_CHECKING:  # the scheduler needs no torch
    from router.sampler import SamplingParams, TokenLogprobs
    from router.sequence_trace import SequenceTrace

# Lower goes first. Compared as tuples are.
Rank = tuple[float, ...]


class FinishReason(enum.Enum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class GenerationRequest:
    """What a caller asks for. logprobs, prompt_logprobs: alternatives per token; None: no logprobs at all.

    num_answer_tokens: tokens at the prompt's end that another router generated: to penalties, they are the answer's.
    priority: lower goes first. fairness_key: whose request it is, for policies that share out by fairness_weight.
    cache_salt: requests with different ones share no cached prefix.
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
    priority: int = 0
    fairness_key: str = ""
    cache_salt: str = ""
    fairness_weight: float = 1.0


@dataclass(frozen=True)
class GeneratedToken:
    """logprobs is None where none were asked for, and for the first token of a prompt."""

    token_id: int
    logprobs: TokenLogprobs | None


class SequenceTimes(NamedTuple):
    """Where the time of a sequence went: waiting for its first step, from then to its first token, from that to its
    last."""

    queue_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True)
class SequenceOutput:
    """What one step gave a sequence. prompt_tokens come before any token."""

    tokens: tuple[GeneratedToken, ...] = ()
    prompt_tokens: tuple[GeneratedToken, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None


@dataclass(eq=False)
class Sequence:
    """Mutated by engine and scheduler only. token_ids: the prompt, then what was generated.

    num_computed: tokens whose cache rows are written. block_ids: the blocks with these rows, in order.
    block_hashes: of token_ids, as far as they were needed. num_published: its first blocks that others may find.
    num_reported: of its generated tokens, that the queue policy knows of. router_ns, expert_ns: what it has cost, see
    GenerateResponse.
    num_cached_tokens: of the prompt, found in the cache when it was first admitted; None: not yet.
    num_prompt_tokens_sent: prompt tokens handed out with their logprobs; a sequence that is computed anew sends none
    twice. draft_token_ids: guesses of the tokens behind the known ones, to be verified in the next step.
    num_left_out: experts that its rows had to do without, those of drafts included; what it computes from then on is
    not for others. counts: of its tokens, where it has penalties. grammar: what its answer must match. outputs ends
    with one that has a finish_reason, or with an error.
    draft_state: what the drafter keeps of it.
    arrived_s, started_s, first_token_s: of time.monotonic; started_s: its first step began. trace: None: not sampled.
    """

    request: GenerationRequest
    token_ids: list[int]
    rank: Rank = ()
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list[int])
    block_hashes: list[bytes] = field(default_factory=list[bytes])
    num_published: int = 0
    num_reported: int = 0
    router_ns: int = 0
    expert_ns: int = 0
    num_cached_tokens: int | None = None
    num_prompt_tokens_sent: int = 0
    draft_token_ids: list[int] = field(default_factory=list[int])
    cancelled: bool = False
    grammar: GrammarState | None = None
    num_left_out: int = 0
    counts: TokenCounts | None = field(init=False, default=None)
    arrived_s: float = field(default_factory=time.monotonic)
    started_s: float | None = None
    first_token_s: float | None = None
    trace: SequenceTrace | None = None
    draft_state: object | None = None
    outputs: asyncio.Queue[SequenceOutput | Exception] = field(
        default_factory=asyncio.Queue[SequenceOutput | Exception]
    )

    def __post_init__(self) -> None:
        if self.request.sampling.penalties is not None:
            start = self.num_prompt_tokens - self.request.num_answer_tokens
            self.counts = TokenCounts(self.token_ids[:start], self.token_ids[start:])

    def append(self, token_id: int) -> None:
        """Add a generated token."""
        self.token_ids.append(token_id)
        if self.counts is not None:
            self.counts.add(token_id)
        if self.grammar is not None:
            self.grammar.advance(token_id)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        """Known tokens without cache rows: at least one, while it runs."""
        return len(self.token_ids) - self.num_computed

    @property
    def max_total_tokens(self) -> int:
        """The length at which it ends; the last token is never fed back, so it needs no cache row."""
        return self.num_prompt_tokens + self.request.max_tokens

    def times(self, now_s: float) -> SequenceTimes:
        """Up to now_s, of time.monotonic."""
        started_s = now_s if self.started_s is None else self.started_s
        first_token_s = now_s if self.first_token_s is None else self.first_token_s
        return SequenceTimes(started_s - self.arrived_s, first_token_s - started_s, now_s - first_token_s)

    @property
    def may_reuse(self) -> bool:
        """Whether cached rows will do: prompt logprobs need the logits of every row."""
        return self.request.prompt_logprobs is None or self.num_prompt_tokens_sent == self.num_prompt_tokens
