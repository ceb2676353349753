"""Which rows an expert's tiles take: (row, expert) pairs sorted by expert and cut into tiles, as plain integers.

Pure functions of numpy arrays. A frame arrives in host memory, so its plan is made there and sent to the device in one
copy; no kernel sorts and nothing waits for the device. A plan may be laid out for more tiles, pairs and rows than it
has: what is left over has no rows and its programs leave at once, so that one captured CUDA graph serves every routing.

Words: a *pair* is one row at one expert, in the frame's order (by row, then expert); a *slot* is a pair's place after
sorting by expert; a *tile* is a run of at most block_rows slots of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# int32 per 16 bytes: the alignment that Triton compiles for, so that no section asks for a variant of its own.
_ALIGNMENT = 4


class RowPlan(NamedTuple):
    """All int32. tile_expert indexes the stacked weights; tile_first is a tile's first slot, tile_rows its length."""

    tile_expert: np.ndarray  # [num_tiles]
    tile_first: np.ndarray  # [num_tiles]
    tile_rows: np.ndarray  # [num_tiles], 1 to block_rows
    slot_pair: np.ndarray  # [num_pairs]
    slot_row: np.ndarray  # [num_pairs]
    row_first: np.ndarray  # [num_rows + 1]: the pairs of row r are row_first[r] to row_first[r + 1]


def plan_rows(pair_rows: np.ndarray, pair_experts: np.ndarray, num_rows: int, block_rows: int) -> RowPlan:
    """Sort pairs by expert and cut each expert's slots into tiles.

    pair_rows, pair_experts: integer [num_pairs], sorted by row, then expert. An expert without rows has no tile.
    The rows of an expert stay ascending.
    """
    order = np.argsort(pair_experts, kind="stable").astype(np.int32)
    experts, first, counts = np.unique(pair_experts[order], return_index=True, return_counts=True)
    tiles_per_expert = -(-counts // block_rows)
    num_tiles = int(tiles_per_expert.sum())
    # A tile's number within its expert: 0, 1, ... restarting where an expert begins.
    restarts = np.repeat(np.cumsum(tiles_per_expert) - tiles_per_expert, tiles_per_expert)
    offsets = (np.arange(num_tiles) - restarts) * block_rows
    return RowPlan(
        tile_expert=np.repeat(experts, tiles_per_expert).astype(np.int32),
        tile_first=(np.repeat(first, tiles_per_expert) + offsets).astype(np.int32),
        tile_rows=np.minimum(np.repeat(counts, tiles_per_expert) - offsets, block_rows).astype(np.int32),
        slot_pair=order,
        slot_row=pair_rows[order].astype(np.int32),
        row_first=np.searchsorted(pair_rows, np.arange(num_rows + 1)).astype(np.int32),
    )


def compute_max_tiles(num_pairs: int, num_experts: int, block_rows: int) -> int:
    """Most tiles that any routing of this many pairs over this many experts can have."""
    return min(num_pairs, num_experts) + num_pairs // block_rows


def cut_rows(pair_rows: np.ndarray, num_rows: int, max_pairs: int) -> list[tuple[int, int]]:
    """Cut a frame into runs of whole rows, (first, end), with at most max_pairs pairs each, or one row.

    pair_rows: integer [num_pairs], ascending. Every row is in a run, also one without pairs.
    """
    row_first = np.searchsorted(pair_rows, np.arange(num_rows + 1))
    runs: list[tuple[int, int]] = []
    start = 0
    while start < num_rows:
        fitting = int(np.searchsorted(row_first, row_first[start] + max_pairs, side="right")) - 1
        end = max(fitting, start + 1)
        runs.append((start, end))
        start = end
    return runs


@dataclass(frozen=True, slots=True)
class PlanLayout:
    """Where the parts of a plan lie in one int32 buffer; sizes are what fits, not what is used.

    Every section starts on 16 bytes. Sections, in order: number of rows, number of pairs, the six arrays of RowPlan,
    the pairs' weights (float32 bits).
    """

    num_rows: int
    num_pairs: int
    num_tiles: int

    @property
    def lengths(self) -> tuple[int, ...]:
        """int32 values of each section."""
        tiles, pairs = self.num_tiles, self.num_pairs
        return (1, 1, tiles, tiles, tiles, pairs, pairs, self.num_rows + 1, pairs)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Start of each section, then the length of the whole."""
        padded = [-(-length // _ALIGNMENT) * _ALIGNMENT for length in self.lengths]
        return tuple(int(offset) for offset in np.cumsum([0, *padded]))

    def pack(self, plan: RowPlan, pair_weights: np.ndarray) -> np.ndarray:
        """Write a plan and its pairs' weights (float32 [num_pairs]) into one int32 array of offsets[-1] values.

        Tiles that are not used get no rows, rows that are not used get no pairs.
        Raises ValueError if the plan is larger than the layout.
        """
        num_rows, num_pairs, num_tiles = len(plan.row_first) - 1, len(plan.slot_pair), len(plan.tile_rows)
        if num_rows > self.num_rows or num_pairs > self.num_pairs or num_tiles > self.num_tiles:
            raise ValueError(
                f"a plan of {num_rows} rows, {num_pairs} pairs and {num_tiles} tiles does not fit one for "
                f"{self.num_rows} rows, {self.num_pairs} pairs and {self.num_tiles} tiles"
            )
        row_first = np.full(self.num_rows + 1, num_pairs, dtype=np.int32)
        row_first[: num_rows + 1] = plan.row_first
        weights = np.ascontiguousarray(pair_weights, dtype=np.float32).view(np.int32)
        counts = (np.array([num_rows], np.int32), np.array([num_pairs], np.int32))
        packed = np.zeros(self.offsets[-1], dtype=np.int32)
        for start, part in zip(self.offsets, (*counts, *plan[:5], row_first, weights), strict=False):
            packed[start : start + len(part)] = part
        return packed
