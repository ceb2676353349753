"""Which cache blocks are free. Pure bookkeeping on block ids; it knows neither torch nor sequences."""

from __future__ import annotations

# Tokens per block: attention's context chunks are whole blocks, and a prefix is reused in whole blocks.
BLOCK_SIZE = 32


def count_blocks(num_tokens: int) -> int:
    """Blocks that hold num_tokens tokens."""
    return -(-num_tokens // BLOCK_SIZE)


class BlockPool:
    """Owned by the scheduler."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        # Taken from the end: low ids first, and those used last again first, so that little memory is touched.
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take count blocks. Raises ValueError if fewer are free: ask num_free first."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks of a pool with {len(self._free)} free ones")
        return [self._free.pop() for _ in range(count)]

    def release(self, block_ids: list[int]) -> None:
        self._free.extend(reversed(block_ids))
