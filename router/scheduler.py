"""Which tokens run in the next step: first come, first served, decode before prefill, prefill in chunks.

Pure bookkeeping on sequence lengths; it knows neither torch nor clock. A sequence is admitted when its whole length
(prompt + max_tokens) fits beside those already running, so a running one never has to give way.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from router.errors import BadRequest, QueueFull
from router.sequence import Sequence


@dataclass(frozen=True)
class SchedulerLimits:
    """max_num_seqs: running at once. max_batched_tokens: of one step. max_cached_tokens: of all running sequences at
    their full length. max_waiting: beyond it a request is refused."""

    max_num_seqs: int
    max_batched_tokens: int
    max_cached_tokens: int
    max_waiting: int


class ScheduledChunk(NamedTuple):
    """The next num_new tokens of a sequence, from its num_computed on."""

    sequence: Sequence
    num_new: int


class Scheduler:
    """Owned by the engine's event loop."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self._limits = limits
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._reserved_tokens = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises BadRequest if it could never be admitted, QueueFull if too many wait."""
        needed = sequence.max_total_tokens
        if needed > self._limits.max_cached_tokens:
            raise BadRequest(
                f"the request needs {needed} tokens of KV cache, this router holds {self._limits.max_cached_tokens}: "
                "shorten the prompt or lower max_tokens"
            )
        if len(self.waiting) >= self._limits.max_waiting:
            raise QueueFull(f"{len(self.waiting)} requests are waiting already")
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is; its reserved cache becomes free."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._reserved_tokens -= sequence.max_total_tokens
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self) -> list[ScheduledChunk]:
        """The chunks of the next step, at most max_batched_tokens tokens; empty when there is nothing to do."""
        self._admit()
        budget = self._limits.max_batched_tokens
        chunks: list[ScheduledChunk] = []
        decoding = [s for s in self.running if len(s.token_ids) - s.num_computed == 1]
        prefilling = [s for s in self.running if len(s.token_ids) - s.num_computed > 1]
        for sequence in (*decoding, *prefilling):
            num_new = min(budget, len(sequence.token_ids) - sequence.num_computed)
            if num_new == 0:
                break
            chunks.append(ScheduledChunk(sequence, num_new))
            budget -= num_new
        return chunks

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._limits.max_num_seqs:
            needed = self.waiting[0].max_total_tokens
            if self._reserved_tokens + needed > self._limits.max_cached_tokens:
                return
            self.running.append(self.waiting.popleft())
            self._reserved_tokens += needed
