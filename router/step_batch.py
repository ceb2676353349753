"""What one step computes: the new tokens of many sequences, flattened, and where their cache rows lie.

Attention reads a sequence's context through its row of block_tables and writes the new rows through slot_mapping, so
neither knows sequences. Splitting a batch by its segments gives batches that are as good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from router.block_pool import BLOCK_SIZE


class Segment(NamedTuple):
    """The rows [start, start + num_new) of a step: one sequence whose context was context_len before."""

    start: int
    num_new: int
    context_len: int


class TokenSpan(NamedTuple):
    """A sequence's share of a step. token_ids: the new tokens, at positions context_len and following.

    block_ids: its blocks from position 0 on; more of them than the new tokens need do no harm.
    """

    token_ids: Sequence[int]
    context_len: int
    block_ids: Sequence[int]


@dataclass(frozen=True)
class StepBatch:
    """T tokens. segments partition the rows, in order.

    input_ids, positions: [T] int64.
    slot_mapping: [T] int64: each token's row in a layer's cache seen as [num_blocks * BLOCK_SIZE, width].
    block_tables: [num_segments, max_blocks] int32, row i for segments[i], padded with 0.
    num_left_out: [T] int32, added to by the layers: experts that a row had to do without (router/degradation.py).
    """

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    segments: Sequence[Segment]
    num_left_out: npt.NDArray[np.int32]


def build_step_batch(spans: Sequence[TokenSpan]) -> StepBatch:
    """Flatten the spans, in their order."""
    segments: list[Segment] = []
    input_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    longest = max(span.context_len + len(span.token_ids) for span in spans)
    block_tables = np.zeros((len(spans), -(-longest // BLOCK_SIZE)), dtype=np.int32)
    for index, span in enumerate(spans):
        # In Python: most spans have a token or two, for which numpy's calls cost more than they do.
        token_ids, context_len, block_ids = span
        end = context_len + len(token_ids)
        num_blocks = -(-end // BLOCK_SIZE)
        block_tables[index, :num_blocks] = block_ids[:num_blocks]
        segments.append(Segment(len(input_ids), len(token_ids), context_len))
        input_ids.extend(token_ids)
        for position in range(context_len, end):
            positions.append(position)
            slots.append(block_ids[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
    return StepBatch(
        input_ids=torch.tensor(input_ids),
        positions=torch.tensor(positions),
        slot_mapping=torch.tensor(slots),
        block_tables=torch.from_numpy(block_tables),
        segments=segments,
        num_left_out=np.zeros(len(input_ids), dtype=np.int32),
    )
