"""Which tokens run in the next step, and which sequence has which cache blocks.

A step takes decoding sequences first, one token each (and drafts, where there are any), then prompts in chunks, up to
its budget of tokens. Who is next, and who gives way, is the queue policy's to say. A sequence takes blocks as it grows.
When there are none left, somebody gives its blocks back and waits again; later its tokens are computed anew, or found
in blocks that still hold them. The first in rank can always go on, so everything ends. Pure bookkeeping on lengths and
block ids; it knows neither torch nor clock.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from typing import NamedTuple

from router.block_pool import BLOCK_SIZE, BlockPool, count_blocks
from router.errors import BadRequest, QueueFull
from router.prefix_hash import extend_block_hashes_
from router.queue_policy import FirstComeFirstServed, QueuePolicy, rank_of
from router.sequence import Sequence


@dataclass(frozen=True)
class SchedulerLimits:
    """max_num_seqs: running at once. max_batched_tokens: of one step. num_blocks: of cache, for all running
    sequences. max_waiting: beyond it a request is refused, unless another router had begun it."""

    max_num_seqs: int
    max_batched_tokens: int
    num_blocks: int
    max_waiting: int


class ScheduledChunk(NamedTuple):
    """The next num_new tokens of a sequence, from its num_computed on. The last num_drafts of them are drafts."""

    sequence: Sequence
    num_new: int
    num_drafts: int = 0

    @property
    def is_decode(self) -> bool:
        """One token, and drafts behind it."""
        return self.num_new - self.num_drafts == 1


@dataclass
class SchedulerCounters:
    """Since start. num_prompt_tokens: of admitted requests; num_cached_tokens: those of them found in the cache."""

    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0


class Scheduler:
    """Owned by the engine's event loop. Blocks change hands in schedule() and remove() only, so those of a step that
    is under way are nobody else's until it is over."""

    def __init__(self, limits: SchedulerLimits, policy: QueuePolicy | None = None) -> None:
        self._limits = limits
        self._policy = policy or FirstComeFirstServed()
        self.running: list[Sequence] = []  # in order of rank
        self.pool = BlockPool(limits.num_blocks)
        self.counters = SchedulerCounters()

    @property
    def waiting(self) -> list[Sequence]:
        return self._policy.list_waiting()

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises BadRequest if it could never run even alone, QueueFull if too many wait."""
        needed = sequence.max_total_tokens
        if count_blocks(needed) > self.pool.num_blocks:
            held = self.pool.num_blocks * BLOCK_SIZE
            raise BadRequest(
                f"the request needs {needed} tokens of KV cache, this router holds {held}: "
                "shorten the prompt or lower max_tokens"
            )
        if (refusal := self._policy.find_refusal(sequence, self._limits.max_waiting)) is not None:
            raise QueueFull(refusal)
        self._policy.push(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is; its blocks become free."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        self._policy.drop(sequence)

    def schedule(self) -> list[ScheduledChunk]:
        """The chunks of the next step, at most max_batched_tokens tokens; empty when there is nothing to do."""
        step = _Step(self._limits.max_batched_tokens)
        decoding = [sequence for sequence in self.running if sequence.num_uncomputed == 1]
        prefilling = [sequence for sequence in self.running if sequence.num_uncomputed > 1]
        for sequence in decoding:
            if sequence not in step.preempted:
                self._extend(sequence, step)
        for sequence in sorted(prefilling, key=self._policy.turn):
            self._admit(step, before=sequence)
            if sequence not in step.preempted:
                self._extend(sequence, step)
        self._admit(step, before=None)
        self._add_drafts(decoding, step)
        return list(step.chunks.values())

    def advance(self, sequence: Sequence, num_computed: int) -> None:
        """After a step: the rows of the first num_computed tokens are written. Publishes the blocks that are full and
        gives back those that only rejected drafts needed."""
        num_prompt = min(num_computed, sequence.num_prompt_tokens) - min(
            sequence.num_computed, sequence.num_prompt_tokens
        )
        self._policy.note_computed(sequence, num_prompt, sequence.num_generated - sequence.num_reported)
        sequence.num_reported = sequence.num_generated
        sequence.num_computed = num_computed
        extend_block_hashes_(sequence.block_hashes, sequence.token_ids, sequence.request.cache_salt)
        num_full = min(num_computed // BLOCK_SIZE, len(sequence.block_hashes))
        if not sequence.num_left_out:
            for index in range(sequence.num_published, num_full):
                self.pool.publish(sequence.block_ids[index], sequence.block_hashes[index])
            sequence.num_published = max(sequence.num_published, num_full)
        self._trim(sequence)

    def reserve_drafts(self, sequence: Sequence, num_drafts: int) -> int:
        """Blocks for up to num_drafts tokens behind the known ones, as long as every running sequence finds a free
        one beside them. Returns for how many there is room now; advance() gives the blocks back."""
        room = self._limits.max_batched_tokens - len(self.running)
        # The token behind the last draft ends the sequence at the latest, and is never fed back.
        num_drafts = min(num_drafts, sequence.max_total_tokens - len(sequence.token_ids) - 1, room)
        if num_drafts <= 0:
            return 0
        num_tokens = len(sequence.token_ids) + num_drafts
        missing = count_blocks(num_tokens) - len(sequence.block_ids)
        granted = min(missing, self.pool.num_free - len(self.running))
        if granted > 0:
            sequence.block_ids.extend(self.pool.allocate(granted))
        return min(num_drafts, len(sequence.block_ids) * BLOCK_SIZE - len(sequence.token_ids))

    def check_integrity(self) -> None:
        """Raises RuntimeError where sequences and pool disagree."""
        self.pool.check_integrity(sequence.block_ids for sequence in self.running)
        for sequence in self.waiting:
            if sequence.block_ids or sequence.num_computed:
                raise RuntimeError(f"request {sequence.request.request_id} waits and holds blocks")
        for sequence in self.running:
            if count_blocks(sequence.num_computed) > len(sequence.block_ids):
                raise RuntimeError(f"request {sequence.request.request_id} has rows without blocks")

    def _extend(self, sequence: Sequence, step: _Step) -> None:
        """Put the sequence's next known tokens into the step, as many as budget and blocks allow."""
        wanted = min(step.budget, sequence.num_uncomputed)
        missing = count_blocks(sequence.num_computed + wanted) - len(sequence.block_ids)
        if missing > self.pool.num_free:
            for running in self.running:
                self._trim(running)  # drafts are the first to give way
        while missing > self.pool.num_free:
            victim = self._policy.find_victims(self.running, None)[0]
            if victim is sequence:
                break
            self._preempt(victim, step)
        if missing > 0:
            sequence.block_ids.extend(self.pool.allocate(min(missing, self.pool.num_free)))
        num_new = min(wanted, len(sequence.block_ids) * BLOCK_SIZE - sequence.num_computed)
        if num_new > 0:
            step.add(ScheduledChunk(sequence, num_new))

    def _preempt(self, sequence: Sequence, step: _Step) -> None:
        step.drop(sequence)
        step.preempted.add(sequence)
        self.running.remove(sequence)
        self._release(sequence)
        self._policy.push(sequence)
        self.counters.num_preemptions += 1

    def _admit(self, step: _Step, before: Sequence | None) -> None:
        """Let those run whose turn it is, as long as the step has room for their tokens. before: only those whose turn
        comes before this one's; None: whoever."""
        # What has just given way must not come back for the blocks of the one that it gave way to.
        while step.budget > 0 and not step.preempted and (sequence := self._policy.peek()) is not None:
            if before is not None and self._policy.turn(before) < self._policy.turn(sequence):
                return
            block_ids = self._find_prefix(sequence)
            if not self._make_room(sequence, block_ids, step):
                return
            self._start(sequence, block_ids)
            self._extend(sequence, step)

    def _make_room(self, sequence: Sequence, block_ids: list[int], step: _Step) -> bool:
        """Whether there is room for all known tokens of a sequence beside the running ones and for a block for each of
        these to grow, if need be because others give way. block_ids: that it finds in the cache."""
        needed = count_blocks(len(sequence.token_ids)) - len(block_ids) + self.pool.count_idle(block_ids)
        if self._fits(needed, []):
            return True
        victims: list[Sequence] = []
        for victim in self._policy.find_victims(self.running, sequence):
            victims.append(victim)
            if self._fits(needed, victims):
                for each in victims:
                    self._preempt(each, step)
                # Blocks that victims shared, with others or with the newcomer, may have been counted as free.
                return self._fits(needed, [])
        return False

    def _fits(self, num_blocks: int, victims: list[Sequence]) -> bool:
        """Whether one more sequence with so many blocks can run once victims do not."""
        staying = [running for running in self.running if running not in victims] if victims else self.running
        freed = sum(self.pool.count_sole(victim.block_ids) for victim in victims)
        return (
            len(staying) < self._limits.max_num_seqs
            and num_blocks + _count_promised(staying) + len(staying) <= self.pool.num_free + freed
        )

    def _start(self, sequence: Sequence, block_ids: list[int]) -> None:
        """block_ids: that hold its first tokens already."""
        insort(self.running, sequence, key=rank_of)
        self.pool.hold(block_ids)
        sequence.block_ids = block_ids
        sequence.num_published = len(block_ids)
        sequence.num_computed = len(block_ids) * BLOCK_SIZE
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = sequence.num_computed
            self.counters.num_cached_tokens += sequence.num_computed
            self.counters.num_prompt_tokens += sequence.num_prompt_tokens
        self._policy.admit(sequence)

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """Published blocks that begin as the sequence does; at least its last token is left to compute."""
        if not sequence.may_reuse:
            return []
        extend_block_hashes_(sequence.block_hashes, sequence.token_ids, sequence.request.cache_salt)
        return self.pool.find(sequence.block_hashes)

    def _add_drafts(self, decoding: list[Sequence], step: _Step) -> None:
        """Drafts take what the step has left: they must not cost anybody a token that is sure to be wanted."""
        for sequence in decoding:
            chunk = step.chunks.get(sequence)
            if chunk is None:
                continue
            room = len(sequence.block_ids) * BLOCK_SIZE - sequence.num_computed - 1
            num_drafts = min(len(sequence.draft_token_ids), step.budget, room)
            del sequence.draft_token_ids[num_drafts:]
            if num_drafts > 0:
                step.drop(sequence)
                step.add(ScheduledChunk(sequence, 1 + num_drafts, num_drafts))

    def _trim(self, sequence: Sequence) -> None:
        """Give back blocks behind the last known token."""
        needed = count_blocks(len(sequence.token_ids))
        if len(sequence.block_ids) > needed:
            self.pool.release(sequence.block_ids[needed:])
            del sequence.block_ids[needed:]

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_ids)
        sequence.block_ids = []
        sequence.draft_token_ids = []
        sequence.num_published = 0
        sequence.num_computed = 0


class _Step:
    """A step in the making."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.chunks: dict[Sequence, ScheduledChunk] = {}
        self.preempted: set[Sequence] = set()

    def add(self, chunk: ScheduledChunk) -> None:
        self.chunks[chunk.sequence] = chunk
        self.budget -= chunk.num_new

    def drop(self, sequence: Sequence) -> None:
        chunk = self.chunks.pop(sequence, None)
        if chunk is not None:
            self.budget += chunk.num_new


def _count_promised(running: list[Sequence]) -> int:
    """Blocks that running sequences will take for tokens that are known already."""
    return sum(max(0, count_blocks(len(sequence.token_ids)) - len(sequence.block_ids)) for sequence in running)
