"""Which tokens run in the next step: first come, first served, decode before prefill, prefill in chunks.

Pure bookkeeping on sequence lengths; it knows neither torch nor clock. A sequence is admitted when its whole length
(prompt + max_tokens) fits beside those already running, so a running one never has to give way.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from router.block_pool import BLOCK_SIZE, BlockPool, count_blocks
from router.errors import BadRequest, QueueFull
from router.sequence import Sequence


@dataclass(frozen=True)
class SchedulerLimits:
    """max_num_seqs: running at once. max_batched_tokens: of one step. num_blocks: of cache, for all running
    sequences. max_waiting: beyond it a request is refused."""

    max_num_seqs: int
    max_batched_tokens: int
    num_blocks: int
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
        self._pool = BlockPool(limits.num_blocks)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises BadRequest if it could never be admitted, QueueFull if too many wait."""
        needed = sequence.max_total_tokens
        if count_blocks(needed) > self._pool.num_blocks:
            held = self._pool.num_blocks * BLOCK_SIZE
            raise BadRequest(
                f"the request needs {needed} tokens of KV cache, this router holds {held}: "
                "shorten the prompt or lower max_tokens"
            )
        if len(self.waiting) >= self._limits.max_waiting:
            raise QueueFull(f"{len(self.waiting)} requests are waiting already")
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is; its blocks become free."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._pool.release(sequence.block_ids)
            sequence.block_ids = []
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
            needed = count_blocks(self.waiting[0].max_total_tokens)
            if needed > self._pool.num_free:
                return
            sequence = self.waiting.popleft()
            sequence.block_ids = self._pool.allocate(needed)
            self.running.append(sequence)
