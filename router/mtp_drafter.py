"""Drafts from the checkpoint's MTP module: keeps its cache rows in step with the trunk's and guesses ahead.

Row i of the module needs token i + 1, which is known once the trunk has computed row i and its logits are sampled. So
each step's rows follow right behind the step, and the last of them gives the first draft. The module applied to its own
output gives further ones; their rows hold guesses and are overwritten by what the next step finds.

A draft is drawn as the verifying step will draw: same temperature, filters and penalties, same noise. So it holds as
often as the two distributions agree, at any temperature.
"""

from __future__ import annotations

import itertools
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
from router.step_batch import TokenSpan, build_step_batch, leave_out_rows

# Rows of a sequence that is not drafted for are kept, to go through the module together. So many at most, for what they
# hold and for the prefixes that others reuse.
MAX_KEPT_ROWS = BLOCK_SIZE


class _Rows(NamedTuple):
    """hidden_states: [n, hidden_size] of the trunk, for positions from start on."""

    hidden_states: Tensor
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.hidden_states.shape[0]


@dataclass
class _State:
    """Of a sequence, at the sequence: of a step of many sequences, looking it up was a noticeable part. kept: rows that
    have not gone through the module."""

    acceptance: Acceptance
    kept: _Rows | None = None


@dataclass
class _Job:
    """What goes through the module for one input. block_ids: as they were when it began; cancelling takes them from
    the sequence, but nobody else gets them within a step."""

    index: int
    sequence: Sequence
    rows: _Rows
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

    async def draft(self, inputs: Series[DraftInput]) -> list[list[int]]:
        self._followed = False
        drafts: list[list[int]] = [[] for _ in inputs]
        jobs = [job for index, item in enumerate(inputs) if (job := self._take_up(index, item)) is not None]
        if not any(job.num_drafts > 0 or job.rows.stop - job.rows.start >= MAX_KEPT_ROWS for job in jobs):
            # Nothing is due. A copy: the rows are a view of all rows of their step.
            for job in jobs:
                self._state_of(job.sequence).kept = _Rows(job.rows.hidden_states.clone(), job.rows.start)
            return drafts
        # What is kept goes along; without drafts it fills the cache, and asks the expert groups nothing.
        self._followed = all(job.num_drafts == 0 for job in jobs)
        spans = [_span_of(job) for job in jobs]
        hidden_states = torch.cat([job.rows.hidden_states for job in jobs])
        # A prompt's rows go through for the cache alone.
        last_rows = [end - 1 for end in itertools.accumulate(len(span.token_ids) for span in spans)]
        last_rows = [row for row, job in zip(last_rows, jobs, strict=True) if job.num_drafts > 0]
        batch = leave_out_rows(build_step_batch(spans), last_rows)
        hidden_states = (await self._module.forward(hidden_states, batch))[last_rows]
        jobs = [job for job in jobs if job.num_drafts > 0]
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
                [TokenSpan(job.drafts[-1:], job.rows.stop + len(job.drafts) - 1, job.block_ids) for job in jobs]
            )
            hidden_states = await self._module.forward(hidden_states[unfinished], batch)
        return drafts

    def _take_up(self, index: int, item: DraftInput) -> _Job | None:
        """The job for an input, with the rows kept for it; None if it needs none."""
        sequence = item.sequence
        if sequence.request.max_tokens <= 1:
            return None  # nothing will ever be drafted for it
        rows = _Rows(item.hidden_states, item.start)
        state = self._state_of(sequence)
        kept, state.kept = state.kept, None
        if kept is not None and kept.stop == rows.start:  # else it was computed anew
            rows = _Rows(torch.cat([kept.hidden_states, rows.hidden_states]), kept.start)
        return _Job(index, sequence, rows, item.num_drafts, sequence.block_ids, [])

    def _state_of(self, sequence: Sequence) -> _State:
        if not isinstance(sequence.draft_state, _State):
            sequence.draft_state = _State(self._policy.new_acceptance())
        return sequence.draft_state


def _span_of(job: _Job) -> TokenSpan:
    """The module's rows: each position with the token behind it."""
    return TokenSpan(job.sequence.token_ids[job.rows.start + 1 : job.rows.stop + 1], job.rows.start, job.block_ids)
