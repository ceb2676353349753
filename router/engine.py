"""The engine: many sequences, one step at a time.

`Engine._step` is the index of the router: schedule -> trunk (which asks the expert groups) -> sample -> verify drafts
-> hand out -> draft.
New requests join between steps and cancelled ones leave there. It runs on one event loop and computes on that loop's
thread; while it waits for experts, the loop serves the RPCs.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Series
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from experts.model_config import ModelConfig
from router.drafter import Drafter, DraftInput, count_accepted
from router.errors import BadRequest, ExpertsUnavailable, NotReady, RouterError
from router.grammar import GrammarState
from router.loop_turns import give_turns
from router.micro_batches import MicroBatchRunner
from router.overlap_policy import OverlapPolicy
from router.queue_policy import QueuePolicy
from router.sample_rows import build_sample_row
from router.sampler import TokenLogprobs, compute_logprobs, sample
from router.scheduler import ScheduledChunk, Scheduler, SchedulerLimits
from router.sequence import FinishReason, GeneratedToken, GenerationRequest, Sequence, SequenceOutput
from router.sequence_trace import HopRecorder
from router.step_batch import Segment, StepBatch, TokenSpan, build_step_batch, leave_out_rows
from router.step_times import PartTimes
from router.trunk import Trunk

logger = logging.getLogger(__name__)

# Rows of prompt logits computed at once: 128 x 129,280 float32 are 66 MB for DeepSeek-V3.
LOGITS_ROWS = 128
# Outputs of a sequence that are waited for between two steps; a client that has more does not read.
MOST_UNTAKEN = 4


@dataclass(frozen=True)
class EngineProgress:
    """Proof of life: a frozen engine has an old current step, or waiting sequences and no new steps.

    Blocks are of the latent cache; idle ones are free, and their content can still be found. What follows counts since
    start: the first three as SchedulerCounters does. num_turns: times that a sequence got tokens in a step, so
    num_generated_tokens / num_turns is how many a step gives each. num_drafted[j], num_accepted[j]: verified drafts at
    depth j + 1, and those that held."""

    num_steps: int
    current_step_ms: int
    num_running: int
    num_waiting: int
    num_blocks: int
    num_blocks_held: int
    num_blocks_idle: int
    num_preemptions: int
    num_prompt_tokens: int
    num_cached_tokens: int
    times: PartTimes
    num_turns: int
    num_generated_tokens: int
    num_drafted: tuple[int, ...]
    num_accepted: tuple[int, ...]


class TeamQueue(NamedTuple):
    """Sequences of one fairness_key."""

    fairness_key: str
    num_running: int
    num_waiting: int


class Engine:
    """Owned by one event loop; every method is called on it."""

    def __init__(
        self,
        config: ModelConfig,
        trunk: Trunk,
        limits: SchedulerLimits,
        *,
        max_model_len: int,
        overlap: OverlapPolicy | None = None,
        drafter: Drafter | None = None,
        find_outage: Callable[[], str | None] = lambda: None,
        queue_policy: QueuePolicy | None = None,
        count_expert_groups: Callable[[], int] = lambda: 1,
        hops: HopRecorder | None = None,
    ) -> None:
        """limits.num_blocks: of the trunk's cache. overlap: None computes every step as one batch. drafter: None: one
        token per sequence and step. find_outage: what has been missing for so long that no request may wait for it;
        None: nothing. queue_policy: None: first come, first served. count_expert_groups: that
        a layer is spread over. hops: where the dispatcher notes them; None: nowhere."""
        self._config = config
        self._trunk = trunk
        self._micro_batches = MicroBatchRunner(trunk, overlap or OverlapPolicy("off"))
        self._drafter = drafter
        self._scheduler = Scheduler(limits, queue_policy)
        self._max_model_len = max_model_len
        self._eos_token_ids = frozenset(config.eos_token_ids)
        self._wake = asyncio.Event()
        self.find_outage = find_outage
        self._hops = hops or HopRecorder()
        self._draining = False
        self._num_steps = 0
        self._num_submitted = 0
        self._num_turns = 0
        self._num_generated_tokens = 0
        self._num_drafted: list[int] = []
        self._num_accepted: list[int] = []
        self._step_started: float | None = None
        self._count_expert_groups = count_expert_groups
        self._charged_until_ns = 0
        self._charged_wait_ns = 0

    @property
    def draining(self) -> bool:
        return self._draining

    def progress(self) -> EngineProgress:
        started, pool, counters = self._step_started, self._scheduler.pool, self._scheduler.counters
        return EngineProgress(
            num_steps=self._num_steps,
            current_step_ms=0 if started is None else int((time.monotonic() - started) * 1000),
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            times=dataclasses.replace(self._trunk.times),
            num_blocks=pool.num_blocks,
            num_blocks_held=pool.num_blocks - pool.num_free,
            num_blocks_idle=pool.num_idle,
            num_preemptions=counters.num_preemptions,
            num_prompt_tokens=counters.num_prompt_tokens,
            num_cached_tokens=counters.num_cached_tokens,
            num_turns=self._num_turns,
            num_generated_tokens=self._num_generated_tokens,
            num_drafted=tuple(self._num_drafted),
            num_accepted=tuple(self._num_accepted),
        )

    def list_team_queues(self) -> list[TeamQueue]:
        """By fairness_key, those with most sequences first."""
        running = Counter(sequence.request.fairness_key for sequence in self._scheduler.running)
        waiting = Counter(sequence.request.fairness_key for sequence in self._scheduler.waiting)
        return [TeamQueue(key, running[key], waiting[key]) for key, _ in (running + waiting).most_common()]

    def check_integrity(self) -> None:
        """Raises RuntimeError where sequences and cache blocks disagree."""
        self._scheduler.check_integrity()

    def submit(self, request: GenerationRequest, grammar: GrammarState | None = None) -> Sequence:
        """Queue a request; its outputs arrive in the returned sequence's queue. grammar: what its answer must match.

        Raises BadRequest, QueueFull, NotReady while draining, or ExpertsUnavailable during an outage.
        """
        if self._draining:
            raise NotReady("the router is draining")
        self._validate(request)
        if (outage := self.find_outage()) is not None:
            raise ExpertsUnavailable(outage)
        sequence = Sequence(request=request, token_ids=list(request.prompt_token_ids), grammar=grammar)
        self._scheduler.add(sequence)
        self._num_submitted += 1
        self._wake.set()
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Stop working for a sequence; a step that is under way finishes without handing its token out."""
        sequence.cancelled = True
        self._scheduler.remove(sequence)
        self._wake.set()

    def start_drain(self) -> None:
        """Take nothing new from now on; what was accepted runs to its end."""
        self._draining = True

    async def run(self) -> None:
        """Step for ever. A step that fails ends its own sequences with the error, never the engine."""
        with torch.inference_mode():
            while True:
                chunks = self._scheduler.schedule()
                if not chunks:
                    self._wake.clear()
                    await self._wake.wait()
                    self._charged_until_ns = time.perf_counter_ns()
                    continue
                started_s = self._step_started = time.monotonic()
                traced = self._note_start(chunks, started_s)
                started_ns = time.perf_counter_ns()
                is_whole = False
                try:
                    await self._step(chunks)
                    is_whole = True
                except RouterError as error:
                    logger.warning("step failed request_ids=%s reason=%s", _list_ids(chunks), error)
                    self._fail(chunks, error)
                    if (outage := self.find_outage()) is not None:
                        self._fail_all(ExpertsUnavailable(outage))
                except Exception as error:
                    logger.exception("step failed request_ids=%s", _list_ids(chunks))
                    self._fail(chunks, error)
                finally:
                    if traced:
                        self._note_traced(traced, started_s)
                    self._step_started = None
                    self._num_steps += 1
                    self._trunk.times.step_ns += time.perf_counter_ns() - started_ns
                await self._give_turns(chunks)
                # With the turns: they are part of what drafts save.
                if is_whole and self._drafter is not None and all(chunk.is_decode for chunk in chunks):
                    self._drafter.note_step(len(chunks), (time.perf_counter_ns() - started_ns) / 1e9)

    def _note_start(self, chunks: list[ScheduledChunk], now_s: float) -> list[ScheduledChunk]:
        """Returns the chunks of sequences that are traced."""
        traced: list[ScheduledChunk] = []
        for chunk in chunks:
            if chunk.sequence.started_s is None:
                chunk.sequence.started_s = now_s
            if chunk.sequence.trace is not None:
                traced.append(chunk)
                if chunk.sequence.trace.wants_hops and not self._hops.is_on:
                    self._hops.start()
        return traced

    def _note_traced(self, traced: list[ScheduledChunk], started_s: float) -> None:
        now_s, hops = time.monotonic(), self._hops.stop()
        for chunk in traced:
            if chunk.sequence.trace is not None:
                chunk.sequence.trace.add_step(started_s, now_s, chunk.num_new, hops)

    async def _give_turns(self, chunks: list[ScheduledChunk]) -> None:
        """The RPC handlers send what the step gave them, and new requests come in."""
        await give_turns(
            lambda: sum(0 < chunk.sequence.outputs.qsize() <= MOST_UNTAKEN for chunk in chunks),
            lambda: self._num_submitted,
        )

    async def _step(self, chunks: list[ScheduledChunk]) -> None:
        batch = build_step_batch([_span_of(chunk) for chunk in chunks])
        if self._drafter is None:  # the MTP module reads every row
            batch = leave_out_rows(batch, _find_output_rows(chunks, batch.segments))
        hidden_states = await self._micro_batches.forward(batch)
        await self._hand_out_prompt_logprobs(chunks, batch, hidden_states)
        sampled = self._sample(chunks, batch, hidden_states)
        self._charge(chunks)
        going_on: list[tuple[Sequence, Segment]] = []
        has_left_out = batch.num_left_out.any()
        for chunk, segment in zip(chunks, batch.segments, strict=True):
            sequence = chunk.sequence
            if sequence.cancelled:
                continue
            if has_left_out:
                rows = slice(segment.start, segment.start + segment.num_new)
                sequence.num_left_out += int(batch.num_left_out[rows].sum())
            if self._take(chunk, sampled.get(sequence, [])):
                going_on.append((sequence, segment))
        if self._drafter is not None and going_on:
            await self._draft(self._drafter, going_on, hidden_states)

    def _charge(self, chunks: list[ScheduledChunk]) -> None:
        """Share out among the sequences of a step the time since the last one was shared out: drafting and the turns
        of the loop behind a step are the next one's."""
        now_ns = time.perf_counter_ns()
        step_ns, self._charged_until_ns = now_ns - self._charged_until_ns, now_ns
        wait_ns = self._trunk.times.wait_ns - self._charged_wait_ns
        self._charged_wait_ns += wait_ns
        num_tokens = sum(chunk.num_new for chunk in chunks)
        expert_ns = wait_ns * self._count_expert_groups()
        for chunk in chunks:
            chunk.sequence.router_ns += step_ns * chunk.num_new // num_tokens
            chunk.sequence.expert_ns += expert_ns * chunk.num_new // num_tokens

    def _sample(
        self, chunks: list[ScheduledChunk], batch: StepBatch, hidden_states: Tensor
    ) -> dict[Sequence, list[GeneratedToken]]:
        """The next tokens of every sequence whose known tokens are all computed now: one, and one more for each draft
        that holds."""
        sampled = [
            (chunk, segment)
            for chunk, segment in zip(chunks, batch.segments, strict=True)
            if chunk.num_new - chunk.num_drafts == chunk.sequence.num_uncomputed
            and chunk.sequence.request.max_tokens > 0
            and not chunk.sequence.cancelled
        ]
        if not sampled:
            return {}
        last_rows = [row for chunk, segment in sampled for row in _last_rows(chunk, segment)]
        if len(last_rows) < hidden_states.shape[0]:
            hidden_states = hidden_states[last_rows]
        logits = self._trunk.compute_logits(hidden_states)
        started_ns = time.perf_counter_ns()
        rows = [
            build_sample_row(chunk.sequence, chunk.sequence.draft_token_ids[:n], self._eos_token_ids)
            for chunk, _ in sampled
            for n in range(chunk.num_drafts + 1)
        ]
        token_ids = sample(logits, rows)
        ids = token_ids.tolist()
        kept = self._verify([chunk for chunk, _ in sampled], ids)
        logprobs = _compute_wanted_logprobs(logits, token_ids, kept)
        self._trunk.times.sample_ns += time.perf_counter_ns() - started_ns
        return {
            sequence: [GeneratedToken(ids[row], logprobs.get(row)) for row in kept_rows]
            for sequence, kept_rows in kept.items()
        }

    def _verify(self, chunks: list[ScheduledChunk], ids: list[int]) -> dict[Sequence, range]:
        """Which of the sampled rows are kept: one per sequence, and those behind drafts that hold."""
        kept: dict[Sequence, range] = {}
        start = 0
        for sequence, _, num_drafts in chunks:
            num_accepted = count_accepted(sequence.draft_token_ids[:num_drafts], ids[start : start + num_drafts])
            if self._drafter is not None and num_drafts > 0:
                self._drafter.note_verified(sequence, num_drafts, num_accepted)
                self._count_drafts(num_drafts, num_accepted)
            sequence.draft_token_ids = []
            kept[sequence] = range(start, start + 1 + num_accepted)
            start += 1 + num_drafts
        return kept

    def _count_drafts(self, num_drafts: int, num_accepted: int) -> None:
        missing = [0] * (num_drafts - len(self._num_drafted))
        self._num_drafted += missing
        self._num_accepted += missing
        for index in range(num_drafts):
            self._num_drafted[index] += 1
            self._num_accepted[index] += index < num_accepted

    def _take(self, chunk: ScheduledChunk, tokens: list[GeneratedToken]) -> bool:
        """Note what a step gave a sequence, and hand it out. Returns whether the sequence goes on."""
        sequence, request = chunk.sequence, chunk.sequence.request
        if not tokens:
            self._scheduler.advance(sequence, sequence.num_computed + chunk.num_new)
            if sequence.num_uncomputed > 0:
                return True
            self._finish(sequence, SequenceOutput(finish_reason=FinishReason.LENGTH))
            return False
        if sequence.grammar is not None and sequence.grammar.error is not None:
            self._finish(sequence, sequence.grammar.error)
            return False
        self._num_turns += 1
        if sequence.first_token_s is None:
            sequence.first_token_s = time.monotonic()
        output: SequenceOutput | None = None
        for index, token in enumerate(tokens):
            sequence.append(token.token_id)
            self._num_generated_tokens += 1
            taken = tuple(tokens[: index + 1])
            is_eos = token.token_id in self._eos_token_ids and not request.ignore_eos
            if is_eos or token.token_id in request.stop_token_ids:
                output = SequenceOutput(taken, (), FinishReason.STOP, token.token_id)
            elif sequence.num_generated >= request.max_tokens:
                output = SequenceOutput(taken, (), FinishReason.LENGTH)
            if output is not None:
                break
        self._scheduler.advance(sequence, len(sequence.token_ids) - 1)  # the last one is fed back in the next step
        if output is not None:
            self._finish(sequence, output)
            return False
        sequence.outputs.put_nowait(SequenceOutput(tuple(tokens)))
        return True

    async def _draft(self, drafter: Drafter, going_on: list[tuple[Sequence, Segment]], hidden_states: Tensor) -> None:
        decoding = [sequence for sequence, _ in going_on if sequence.num_uncomputed == 1]
        depths = dict(zip(decoding, drafter.choose_depths(decoding), strict=True)) if decoding else {}
        inputs: list[DraftInput] = []
        for sequence, segment in going_on:
            num_drafts = self._scheduler.reserve_drafts(sequence, depths.get(sequence, 0))
            start = segment.context_len
            rows = range(segment.start, segment.start + sequence.num_computed - start)
            inputs.append(DraftInput(sequence, rows, start, num_drafts))
        try:
            guesses = await drafter.draft(hidden_states, inputs)
        except RouterError as error:  # the tokens are handed out already, and the next step needs no drafts
            logger.warning("no drafts num_sequences=%d reason=%s", len(inputs), error)
            return
        for draft_input, token_ids in zip(inputs, guesses, strict=True):
            if not draft_input.sequence.cancelled:
                draft_input.sequence.draft_token_ids = token_ids

    def _finish(self, sequence: Sequence, output: SequenceOutput | Exception) -> None:
        self._scheduler.remove(sequence)
        sequence.outputs.put_nowait(output)

    def _fail(self, chunks: list[ScheduledChunk], error: Exception) -> None:
        for sequence in [chunk.sequence for chunk in chunks]:
            if sequence in self._scheduler.running:  # else it has ended, or was cancelled meanwhile
                self._finish(sequence, error)

    def _fail_all(self, error: Exception) -> None:
        """Nobody waits for what others have waited for in vain."""
        for sequence in [*self._scheduler.running, *self._scheduler.waiting]:
            self._finish(sequence, error)

    async def _hand_out_prompt_logprobs(
        self, chunks: list[ScheduledChunk], batch: StepBatch, hidden_states: Tensor
    ) -> None:
        """Row p of a prompt gives the log-probability of prompt token p + 1; the first token has none."""
        for chunk, segment in zip(chunks, batch.segments, strict=True):
            sequence = chunk.sequence
            num_top = sequence.request.prompt_logprobs
            if num_top is None or sequence.cancelled:
                continue
            # The row of the last token sent, if it was sent before the sequence had to start anew.
            first = max(segment.context_len, sequence.num_prompt_tokens_sent - 1)
            last = min(segment.context_len + segment.num_new, sequence.num_prompt_tokens - 1)
            tokens = [GeneratedToken(sequence.token_ids[0], None)] if sequence.num_prompt_tokens_sent == 0 else []
            for start in range(first, last, LOGITS_ROWS):
                stop = min(start + LOGITS_ROWS, last)
                offset = segment.start - segment.context_len
                logits = self._trunk.compute_logits(hidden_states[offset + start : offset + stop])
                following = sequence.token_ids[start + 1 : stop + 1]
                rows = compute_logprobs(logits, torch.tensor(following), [num_top] * len(following))
                tokens.extend(GeneratedToken(token_id, row) for token_id, row in zip(following, rows, strict=True))
                await asyncio.sleep(0)  # seconds of work for a long prompt: somebody may ask for a sign of life
            if tokens:
                sequence.num_prompt_tokens_sent += len(tokens)
                sequence.outputs.put_nowait(SequenceOutput(prompt_tokens=tuple(tokens)))

    def _validate(self, request: GenerationRequest) -> None:
        num_prompt = len(request.prompt_token_ids)
        if num_prompt == 0:
            raise BadRequest("the prompt has no tokens")
        if num_prompt + request.max_tokens > self._max_model_len:
            raise BadRequest(
                f"the prompt has {num_prompt} tokens and max_tokens is {request.max_tokens}: together more than the "
                f"context of {self._max_model_len} tokens"
            )
        if request.num_answer_tokens > num_prompt:
            raise BadRequest(f"{request.num_answer_tokens} answer tokens in a prompt of {num_prompt}")
        bias = request.sampling.logit_bias
        for name, ids in (
            ("token id", request.prompt_token_ids),
            ("stop token id", request.stop_token_ids),
            ("logit_bias token id", () if bias is None else bias.token_ids.tolist()),
        ):
            highest = max(ids, default=0)
            if highest >= self._config.vocab_size:
                raise BadRequest(f"{name} {highest} is outside the vocabulary of {self._config.vocab_size}")


def _list_ids(chunks: list[ScheduledChunk]) -> str:
    return ",".join(chunk.sequence.request.request_id for chunk in chunks)


def _span_of(chunk: ScheduledChunk) -> TokenSpan:
    sequence, start = chunk.sequence, chunk.sequence.num_computed
    token_ids = sequence.token_ids[start : start + chunk.num_new - chunk.num_drafts]
    drafts = sequence.draft_token_ids[: chunk.num_drafts]
    return TokenSpan([*token_ids, *drafts], start, sequence.block_ids)


def _last_rows(chunk: ScheduledChunk, segment: Segment) -> range:
    """The rows of a step that are sampled: of the last known token, and of the drafts."""
    stop = segment.start + segment.num_new
    return range(stop - chunk.num_drafts - 1, stop)


def _find_output_rows(chunks: list[ScheduledChunk], segments: Series[Segment]) -> list[int]:
    """Those of a step that are sampled, or whose logprobs somebody wants."""
    rows: list[int] = []
    for chunk, segment in zip(chunks, segments, strict=True):
        if chunk.sequence.request.prompt_logprobs is not None:
            rows.extend(range(segment.start, segment.start + segment.num_new))
        elif chunk.num_new - chunk.num_drafts == chunk.sequence.num_uncomputed:
            rows.extend(_last_rows(chunk, segment))
    return rows


def _compute_wanted_logprobs(
    logits: Tensor, token_ids: Tensor, kept: dict[Sequence, range]
) -> dict[int, TokenLogprobs]:
    """By row of logits, for the kept rows of sequences that asked for logprobs."""
    num_top: dict[int, int] = {}
    for sequence, rows in kept.items():
        if sequence.request.logprobs is not None:
            num_top.update(dict.fromkeys(rows, sequence.request.logprobs))
    if not num_top:
        return {}
    rows = list(num_top)
    return dict(zip(rows, compute_logprobs(logits[rows], token_ids[rows], list(num_top.values())), strict=True))
