"""What one step computes: the new tokens of many sequences, flattened, and where their cache rows lie.

Attention reads a sequence's context through its row of block_tables and writes the new rows through slot_mapping, so
neither knows sequences. Splitting a batch by its segments gives batches that are as good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from router.block_pool import BLOCK_SIZE

# Rows that nobody reads are left out of the last layer from so many on: it takes a call and a few small copies.
LEAST_LEFT_OUT = 8


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
    output_rows: int64, ascending: the rows whose result anybody reads; None: all. The others are there for what later
    rows find in the cache, and are not computed beyond that in the last layer.
    """

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    segments: Sequence[Segment]
    num_left_out: npt.NDArray[np.int32]
    output_rows: Tensor | None = None


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
    rows = torch.from_numpy(np.array((input_ids, positions, slots), dtype=np.int64))
    return StepBatch(
        input_ids=rows[0],
        positions=rows[1],
        slot_mapping=rows[2],
        block_tables=torch.from_numpy(block_tables),
        segments=segments,
        num_left_out=np.zeros(len(input_ids), dtype=np.int32),
    )


def leave_out_rows(batch: StepBatch, output_rows: Sequence[int]) -> StepBatch:
    """The batch with these output rows; as it is where they are nearly all. None of them: it fills the cache, and the
    last layer asks no experts."""
    if output_rows and len(batch.input_ids) - len(output_rows) < LEAST_LEFT_OUT:
        return batch
    return replace(batch, output_rows=torch.tensor(output_rows, dtype=torch.int64))


def take_output_rows(batch: StepBatch) -> StepBatch:
    """The output rows as a batch of their own, whose context is in the cache already. There must be some."""
    assert batch.output_rows is not None
    rows: list[int] = batch.output_rows.tolist()
    segments: list[Segment] = []
    tables: list[int] = []
    index = 0
    for start, row in enumerate(rows):
        while row >= batch.segments[index].start + batch.segments[index].num_new:
            index += 1
        if tables and tables[-1] == index and rows[start - 1] == row - 1:
            segments[-1] = segments[-1]._replace(num_new=segments[-1].num_new + 1)
        else:
            segment = batch.segments[index]
            segments.append(Segment(start, 1, segment.context_len + row - segment.start))
            tables.append(index)
    return StepBatch(
        input_ids=batch.input_ids[batch.output_rows],
        positions=batch.positions[batch.output_rows],
        slot_mapping=batch.slot_mapping[batch.output_rows],
        block_tables=batch.block_tables[tables],
        segments=segments,
        num_left_out=np.zeros(len(rows), dtype=np.int32),
    )
