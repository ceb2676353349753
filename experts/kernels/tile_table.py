"""Which kernel variant runs on which card: the weight path and the tile sizes, from fixed tables.

Nothing is tuned while serving: a tile follows from the card's compute capability, the weight path and the number of
rows per expert. It knows nothing of Triton, so a process without a GPU can read it. tests/benchmarks/gpu_tiles.py
measures other tiles on a real card and prints the table's lines.

Numerics: a row's result does not depend on the tile. Every tile reduces a row in the same order: blocks of the
checkpoint's scale columns in ascending order, each one dot product from zero, scaled and added in fp32; never split
over K. Within a block the order is the tensor core's, so all tiles of one capability must use one family of matrix
instruction: mma.sync below 9.0 and on 12.x, wgmma on 9.0, which needs block_outputs to be a multiple of 64 and
num_warps a multiple of 4. tests/experts/test_triton_compile.py reads the instructions out of the generated code.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

Capability = tuple[int, int]

# The first cards whose tensor cores (and whose Triton types) have e4m3.
FIRST_FP8_CAPABILITY: Capability = (8, 9)
# Below it there is no bf16 and other matrix instructions: not supported.
FIRST_CAPABILITY: Capability = (8, 0)


class WeightPath(enum.Enum):
    """How FP8 weights are multiplied.

    W8A8: activations quantised to e4m3 per row and scale block, FP8 tensor cores. W8A16: activations in fp16 with a
    power of two per row and scale block, weights decoded to fp16 by bits inside the tile; exact but for fp16's 11 bits.
    """

    W8A8 = "w8a8"
    W8A16 = "w8a16"


class Tile(NamedTuple):
    """block_rows: rows of the batch; block_outputs: rows of the weight, per matrix. num_stages: depth of the copies."""

    block_rows: int
    block_outputs: int
    num_warps: int
    num_stages: int

    @property
    def launch_options(self) -> dict[str, int]:
        """What Triton's launch takes beside the kernel's own arguments."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


class TileLine(NamedTuple):
    """What runs up to this many rows per expert (None: however many). gate_up loads two matrices, down one.

    Both have the same block_rows, as they share one plan. A linear map takes down's.
    """

    max_rows_per_expert: int | None
    gate_up: Tile
    down: Tile

    @property
    def block_rows(self) -> int:
        return self.down.block_rows


# Chosen so that nothing spills from registers and shared memory per block suffices (163 KB on 8.0, 227 KB on 9.0, 99 KB
# on 8.6, 8.9 and 12.0), with as many programs as that leaves for few rows. Not yet measured on cards: to be replaced by
# lines that tests/benchmarks/gpu_tiles.py prints.
_A16_MMA_SYNC = (
    TileLine(16, Tile(16, 32, 4, 5), Tile(16, 64, 4, 5)),
    TileLine(64, Tile(64, 32, 8, 4), Tile(64, 32, 4, 4)),
    TileLine(None, Tile(128, 32, 8, 3), Tile(128, 64, 8, 3)),
)
_A8_MMA_SYNC = (
    TileLine(16, Tile(16, 32, 4, 5), Tile(16, 64, 4, 5)),
    TileLine(64, Tile(32, 64, 4, 4), Tile(32, 64, 4, 4)),
    TileLine(None, Tile(128, 32, 8, 3), Tile(128, 64, 8, 3)),
)
_A16_WGMMA = (
    TileLine(16, Tile(16, 64, 4, 5), Tile(16, 64, 4, 6)),
    TileLine(None, Tile(64, 64, 8, 3), Tile(64, 64, 4, 4)),
)
_A8_WGMMA = (
    TileLine(16, Tile(16, 64, 4, 5), Tile(16, 64, 4, 6)),
    TileLine(64, Tile(64, 64, 4, 4), Tile(64, 64, 4, 4)),
    TileLine(None, Tile(128, 64, 8, 3), Tile(128, 64, 8, 4)),
)
# Keyed by the first capability that a table serves; a card takes the last key of its path at or below its own.
_TABLES = MappingProxyType(
    {
        WeightPath.W8A16: {(8, 0): _A16_MMA_SYNC, (9, 0): _A16_WGMMA, (12, 0): _A16_MMA_SYNC},
        WeightPath.W8A8: {(8, 9): _A8_MMA_SYNC, (9, 0): _A8_WGMMA, (12, 0): _A8_MMA_SYNC},
    }
)


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """The variant for one card. Raises ValueError for a card or a path that cannot be."""

    capability: Capability
    path: WeightPath

    def __post_init__(self) -> None:
        if self.capability < FIRST_CAPABILITY:
            raise ValueError(f"compute capability {_dotted(self.capability)}: at least 8.0 (Ampere) is needed")
        if self.path is WeightPath.W8A8 and self.capability < FIRST_FP8_CAPABILITY:
            raise ValueError(f"compute capability {_dotted(self.capability)} has no FP8 unit: take the path w8a16")

    @property
    def lines(self) -> tuple[TileLine, ...]:
        """By ascending number of rows; the last line has no maximum."""
        tables = _TABLES[self.path]
        return tables[max(first for first in tables if first <= self.capability)]

    def choose_tiles(self, rows_per_expert: float) -> TileLine:
        """Return the first line that admits this many rows (a mean is fine: the result does not depend on it)."""
        return next(
            line
            for line in self.lines
            if line.max_rows_per_expert is None or rows_per_expert <= line.max_rows_per_expert
        )

    def describe(self) -> str:
        """Name for a numerics_id: what decides the last bits besides the versions of Triton and torch."""
        return f"sm{self.capability[0]}{self.capability[1]}/{self.path.value}"


def choose_kernels(capability: Capability, path: WeightPath | None = None) -> KernelChoice:
    """Choose for a card; path overrides what the card would get. Raises ValueError, see KernelChoice."""
    if path is None:
        path = WeightPath.W8A8 if capability >= FIRST_FP8_CAPABILITY else WeightPath.W8A16
    return KernelChoice(capability, path)


def compute_packed_bytes(shape: tuple[int, int], block: tuple[int, int]) -> int:
    """Bytes of one FP8 matrix on a card: a byte per weight and a float32 per block, partial blocks counted."""
    rows, columns = shape
    return rows * columns + 4 * -(-rows // block[0]) * -(-columns // block[1])


def _dotted(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"
