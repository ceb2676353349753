"""Drafts from the checkpoint's MTP module: keeps its cache rows in step with the trunk's and guesses ahead.

Row i of the module needs token i + 1, which is known once the trunk has computed row i and its logits are sampled. So
each step's rows follow right behind the step, and the last of them gives the first draft. The module applied to its own
output gives further ones; their rows hold guesses and are overwritten by what the next step finds. All other rows are
there for the cache alone, as the module is a single layer.

A draft is drawn as the verifying step will draw: same temperature, filters and penalties, same noise. So it holds as
often as the two distributions agree, at any temperature.
"""

from __future__ import annotations

from collections.abc import Sequence as Series
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from router.block_pool import BLOCK_SIZE
from router.draft_policy import Acceptance, DraftPolicy
from router.drafter import DraftInput
from router.mtp import MtpModule
from router.sample_rows import build_sample_row
from router.sampler import sample
from router.sequence import Sequence
from router.step_batch import TokenSpan, build_step_batch

# Rows of a sequence that is not drafted for are kept, to go through the module together. So many at most, for what they
# hold and for the prefixes that others reuse.
MAX_KEPT_ROWS = BLOCK_SIZE


class _Kept(NamedTuple):
    """hidden_states: [n, hidden_size] of the trunk, for the positions from start on."""

    hidden_states: Tensor
    start: int


@dataclass
class _State:
    """Of a sequence, at the sequence: of a step of many sequences, looking it up was a noticeable part. kept: rows that
    have not gone through the module."""

    acceptance: Acceptance
    kept: _Kept | None = None


@dataclass
class _Job:
    """What goes through the module for one input: the rows kept for it, then some of the step. start, stop: their
    positions. block_ids: as they were when it began; cancelling takes them from the sequence, but nobody else gets
    them within a step."""

    index: int
    sequence: Sequence
    kept: Tensor | None
    rows: range
    start: int
    stop: int
    num_drafts: int
    block_ids: list[int]
    drafts: list[int]


class MtpDrafter:
    """Implements drafter.Drafter. Owned by the engine's event loop."""

    def __init__(self, module: MtpModule, policy: DraftPolicy, eos_token_ids: frozenset[int]) -> None:
        self._policy = policy
        self._module = module
        self._eos_token_ids = eos_token_ids
        self._followed = False  # the last step had a pass without drafts

    def choose_depths(self, sequences: Series[Sequence]) -> list[int]:
        return self._policy.choose([self._state_of(sequence).acceptance for sequence in sequences])

    def note_verified(self, sequence: Sequence, num_drafts: int, num_accepted: int) -> None:
        self._policy.note_verified(self._state_of(sequence).acceptance, num_drafts, num_accepted)

    def note_step(self, num_sequences: int, seconds: float) -> None:
        self._policy.note_step(num_sequences, seconds, self._followed)

    async def draft(self, hidden_states: Tensor, inputs: Series[DraftInput]) -> list[list[int]]:
        self._followed = False
        drafts: list[list[int]] = [[] for _ in inputs]
        jobs = [job for index, item in enumerate(inputs) if (job := self._take_up(index, item)) is not None]
        if not any(job.num_drafts > 0 or job.stop - job.start >= MAX_KEPT_ROWS for job in jobs):
            for job in jobs:  # nothing is due
                self._keep(job, hidden_states)
            return drafts
        # What is kept goes along; without drafts it fills the cache, and asks the expert groups nothing.
        context, spans = _cut_spans(jobs)
        hidden_states = _take_rows(hidden_states, jobs)
        jobs = [job for job in jobs if job.num_drafts > 0]
        if not jobs:
            self._followed = True
            self._module.fill_cache(hidden_states, build_step_batch(context))
            return drafts
        hidden_states = await self._module.forward(
            hidden_states, build_step_batch(spans), build_step_batch(context) if context else None
        )
        while jobs:
            token_ids = sample(
                self._module.compute_logits(hidden_states),
                [build_sample_row(job.sequence, job.drafts, self._eos_token_ids) for job in jobs],
            )
            for job, token_id in zip(jobs, token_ids.tolist(), strict=True):
                job.drafts.append(token_id)
                drafts[job.index] = job.drafts
            unfinished = [len(job.drafts) < job.num_drafts for job in jobs]
            if not any(unfinished):
                break
            jobs = [job for job in jobs if len(job.drafts) < job.num_drafts]
            # The row behind the last one, whose next token is the last draft.
            batch = build_step_batch(
                [TokenSpan(job.drafts[-1:], job.stop + len(job.drafts) - 1, job.block_ids) for job in jobs]
            )
            hidden_states = await self._module.forward(hidden_states[unfinished], batch)
        return drafts

    def _take_up(self, index: int, item: DraftInput) -> _Job | None:
        """The job for an input, with the rows kept for it; None if it needs none."""
        sequence = item.sequence
        if sequence.request.max_tokens <= 1:
            return None  # nothing will ever be drafted for it
        state = self._state_of(sequence)
        kept, state.kept = state.kept, None
        start, stop = item.start, item.start + len(item.rows)
        states = None
        if kept is not None and kept.start + len(kept.hidden_states) == start:  # else it was computed anew
            states, start = kept
        return _Job(index, sequence, states, item.rows, start, stop, item.num_drafts, sequence.block_ids, [])

    def _keep(self, job: _Job, hidden_states: Tensor) -> None:
        rows = hidden_states[job.rows.start : job.rows.stop]
        # A copy, and not a view of all rows of the step.
        rows = rows.clone() if job.kept is None else torch.cat([job.kept, rows])
        self._state_of(job.sequence).kept = _Kept(rows, job.start)

    def _state_of(self, sequence: Sequence) -> _State:
        if not isinstance(sequence.draft_state, _State):
            sequence.draft_state = _State(self._policy.new_acceptance())
        return sequence.draft_state


def _cut_spans(jobs: Series[_Job]) -> tuple[list[TokenSpan], list[TokenSpan]]:
    """Each position with the token behind it: of the rows that only the cache is to know, and of those that drafts are
    made of, the last one of each sequence that is drafted for."""
    context: list[TokenSpan] = []
    spans: list[TokenSpan] = []
    for job in jobs:
        token_ids, stop = job.sequence.token_ids, job.stop
        if job.num_drafts > 0:
            spans.append(TokenSpan(token_ids[stop : stop + 1], stop - 1, job.block_ids))
            stop -= 1
        if stop > job.start:
            context.append(TokenSpan(token_ids[job.start + 1 : stop + 1], job.start, job.block_ids))
    return context, spans


def _take_rows(hidden_states: Tensor, jobs: Series[_Job]) -> Tensor:
    """The hidden states of all spans, in their order. hidden_states: of the step."""
    sources = [hidden_states]
    num_rows = hidden_states.shape[0]
    rows: list[int] = []
    last_rows: list[int] = []
    for job in jobs:
        if job.kept is not None:
            sources.append(job.kept)
            rows.extend(range(num_rows, num_rows + job.kept.shape[0]))
            num_rows += job.kept.shape[0]
        rows.extend(job.rows)
        if job.num_drafts > 0:
            last_rows.append(rows.pop())
    source = torch.cat(sources) if len(sources) > 1 else hidden_states
    return source.index_select(0, torch.tensor(rows + last_rows, device=source.device))
