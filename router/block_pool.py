"""Which cache blocks are free, who holds the others, and which content may be used again.

A block is *held* by one or more sequences; or *idle*: nobody holds it, and its published content can be found by its
hash until the block is needed; or *blank*. Idle blocks are taken least recently used first. Pure bookkeeping on block
ids and hashes; it knows neither torch nor sequences.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

# Tokens per block: attention's context chunks are whole blocks, and a prefix is reused in whole blocks.
BLOCK_SIZE = 32


def count_blocks(num_tokens: int) -> int:
    """Blocks that hold num_tokens tokens."""
    return -(-num_tokens // BLOCK_SIZE)


class BlockPool:
    """Owned by the scheduler."""

    def __init__(self, num_blocks: int) -> None:
        self._num_holders = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._found: dict[bytes, int] = {}  # the block that has published a hash, held or idle
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        # Taken from the end: low ids first, and those used last again first, so that little memory is touched.
        self._blank = list(range(num_blocks - 1, -1, -1))

    @property
    def num_blocks(self) -> int:
        return len(self._num_holders)

    @property
    def num_free(self) -> int:
        """Blocks that allocate() can give, idle ones included."""
        return len(self._blank) + len(self._idle)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def allocate(self, count: int) -> list[int]:
        """Take count blocks, to be held once. Raises ValueError if fewer are free: ask num_free first."""
        if count > self.num_free:
            raise ValueError(f"{count} blocks of a pool with {self.num_free} free ones")
        block_ids = [self._blank.pop() if self._blank else self._evict() for _ in range(count)]
        for block_id in block_ids:
            self._num_holders[block_id] = 1
        return block_ids

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest run of hashes, from the first, that are published. To be held before use."""
        block_ids: list[int] = []
        for block_hash in hashes:
            block_id = self._found.get(block_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def count_idle(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks would leave the free ones if they were held."""
        return sum(block_id in self._idle for block_id in block_ids)

    def count_sole(self, block_ids: Iterable[int]) -> int:
        """How many of these held blocks nobody else holds."""
        return sum(self._num_holders[block_id] == 1 for block_id in block_ids)

    def hold(self, block_ids: Iterable[int]) -> None:
        """One holder more for blocks that find() gave."""
        for block_id in block_ids:
            self._idle.pop(block_id, None)
            self._num_holders[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """One holder less. Of a sequence's blocks, the last becomes the least recently used: nothing finds a block
        whose predecessors are gone."""
        for block_id in reversed(block_ids):
            self._num_holders[block_id] -= 1
            if self._num_holders[block_id] > 0:
                continue
            if self._hashes[block_id] is None:
                self._blank.append(block_id)
            else:
                self._idle[block_id] = None

    def publish(self, block_id: int, block_hash: bytes) -> None:
        """The held block is full, and may be found from now on. Does nothing if another block has that content."""
        if self._found.setdefault(block_hash, block_id) == block_id:
            self._hashes[block_id] = block_hash

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """tables: the blocks of every sequence. Raises RuntimeError naming the block that is wrong."""
        holders = Counter(block_id for table in tables for block_id in table)
        blank = Counter(self._blank)
        for block_id, num_holders in enumerate(self._num_holders):
            block_hash = self._hashes[block_id]
            if num_holders != holders[block_id]:
                raise RuntimeError(f"block {block_id} counts {num_holders} holders and has {holders[block_id]}")
            if (num_holders > 0) + blank[block_id] + (block_id in self._idle) != 1:
                raise RuntimeError(f"block {block_id} is not exactly one of held, idle and blank")
            if block_id in self._idle and block_hash is None:
                raise RuntimeError(f"block {block_id} is idle and was never published")
            if blank[block_id] and block_hash is not None:
                raise RuntimeError(f"block {block_id} is blank and published")
            if block_hash is not None and self._found.get(block_hash) != block_id:
                raise RuntimeError(f"block {block_id} is published and cannot be found")
        num_published = sum(block_hash is not None for block_hash in self._hashes)
        if len(self._found) != num_published:
            raise RuntimeError(f"{len(self._found)} hashes can be found and {num_published} blocks are published")

    def _evict(self) -> int:
        block_id, _ = self._idle.popitem(last=False)
        block_hash = self._hashes[block_id]
        assert block_hash is not None
        del self._found[block_hash]
        self._hashes[block_id] = None
        return block_id
