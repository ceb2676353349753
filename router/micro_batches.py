"""Runs a step as several micro-batches at once, so that one computes attention while another waits for its experts.

A step's rows do not depend on each other but through the cache, so any cut between two sequences is good. A long chunk
of one prompt may be cut as well: then the later rows attend, in every layer, after the earlier rows have (LayerOrder).
Rows come back in the step's order.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from router.block_pool import BLOCK_SIZE
from router.layer_order import LayerOrder
from router.overlap_policy import OverlapPolicy, StepSize, StepTimes
from router.step_batch import Segment, StepBatch

# Keys that cost one token as much as all else that the router computes in a layer: in DeepSeek-V3 the projections and
# the shared expert are 231 M products, a key is 139 k (128 heads x (576 + 512)).
KEYS_PER_TOKEN = 1660
# A chunk is cut only into parts of at least so many rows: shorter ones read the weights for too little.
LEAST_ROWS_OF_PART = 32


class MicroBatch(NamedTuple):
    """follows: the first segment goes on where the last one of the micro-batch before ends."""

    batch: StepBatch
    follows: bool


class TrunkForward(Protocol):
    """router.trunk.Trunk."""

    async def forward(self, batch: StepBatch, order: LayerOrder | None = None) -> Tensor: ...


class MicroBatchRunner:
    """Runs steps through a trunk in as many micro-batches as the policy says. Owned by one event loop."""

    def __init__(
        self,
        trunk: TrunkForward,
        policy: OverlapPolicy,
        *,
        clock: Callable[[], float] = time.perf_counter,
        compute_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        """clock: seconds. compute_clock: seconds that the event loop's thread has computed."""
        self._trunk = trunk
        self._policy = policy
        self._clock = clock
        self._compute_clock = compute_clock

    async def forward(self, batch: StepBatch) -> Tensor:
        """Trunk.forward of the whole batch: [num_tokens, hidden_size]. Raises what the trunk raises."""
        size = StepSize(len(batch.input_ids), len(batch.segments))
        micro_batches = split_batch(batch, self._policy.choose(size))
        started_s, computed_s = self._clock(), self._compute_clock()
        if len(micro_batches) == 1:
            hidden_states = await self._trunk.forward(batch)
        else:
            hidden_states = await self._run_together(micro_batches)
        step_s = self._clock() - started_s
        wait_s = max(0.0, step_s - (self._compute_clock() - computed_s))
        self._policy.record(size, len(micro_batches), StepTimes(step_s, wait_s))
        return hidden_states

    async def _run_together(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        is_ordered = any(micro_batch.follows for micro_batch in micro_batches)
        forwards: list[Coroutine[Any, Any, Tensor]] = []
        order: LayerOrder | None = None
        for index, (batch, _) in enumerate(micro_batches):
            if is_ordered:
                order = LayerOrder(order)
            forwards.append(self._start_late(index, batch, order))
        return torch.cat(await run_all_or_none(forwards))

    async def _start_late(self, num_turns: int, batch: StepBatch, order: LayerOrder | None) -> Tensor:
        """The first frames of the micro-batch before leave in the turn of the loop after the one that posts them:
        computing in the same turn would hold them up."""
        for _ in range(num_turns):
            await asyncio.sleep(0)
        return await self._trunk.forward(batch, order)


async def run_all_or_none(coroutines: Sequence[Coroutine[Any, Any, Tensor]]) -> list[Tensor]:
    """Run them at once. When one fails, or the caller is cancelled, none is left running; raises the first failure."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def split_batch(batch: StepBatch, count: int) -> list[MicroBatch]:
    """Cut a step into at most count micro-batches of about the same cost; fewer where it has not as many pieces.

    Their rows, one after the other, are the step's.
    """
    cuts = _choose_cuts(batch, count) if count > 1 else []
    if not cuts:
        return [MicroBatch(batch, follows=False)]
    segment_starts = [segment.start for segment in batch.segments]
    edges = [0, *cuts, len(batch.input_ids)]
    return [
        MicroBatch(_slice_batch(batch, segment_starts, start, end), follows=start not in segment_starts)
        for start, end in itertools.pairwise(edges)
    ]


def _choose_cuts(batch: StepBatch, count: int) -> list[int]:
    """Rows that begin a micro-batch, ascending: between two segments, or within a long one where that is nearer."""
    costs = np.cumsum(KEYS_PER_TOKEN + batch.positions.numpy())  # of all rows up to and with this one
    num_rows = len(costs)
    edges = [segment.start for segment in batch.segments] + [num_rows]
    cuts: list[int] = []
    for part in range(1, count):
        wanted = costs[-1] * part / count
        row = int(np.searchsorted(costs, wanted)) + 1  # rows before it cost as much as wanted, or just more
        after = bisect.bisect_left(edges, row)
        start, end = edges[max(after - 1, 0)], edges[after]
        if row - start >= LEAST_ROWS_OF_PART and end - row >= LEAST_ROWS_OF_PART:
            cut = row
        else:
            cut = min(start, end, key=lambda edge: abs((costs[edge - 1] if edge else 0) - wanted))
        if 0 < cut < num_rows and (not cuts or cut > cuts[-1]):
            cuts.append(cut)
    return cuts


def _slice_batch(batch: StepBatch, segment_starts: Sequence[int], start: int, end: int) -> StepBatch:
    """The rows [start, end) as a batch of their own."""
    first = bisect.bisect_right(segment_starts, start) - 1
    last = bisect.bisect_left(segment_starts, end)
    segments: list[Segment] = []
    for segment in batch.segments[first:last]:
        from_row = max(segment.start, start)
        to_row = min(segment.start + segment.num_new, end)
        segments.append(Segment(from_row - start, to_row - from_row, segment.context_len + from_row - segment.start))
    num_blocks = -(-max(segment.context_len + segment.num_new for segment in segments) // BLOCK_SIZE)
    return StepBatch(
        input_ids=batch.input_ids[start:end],
        positions=batch.positions[start:end],
        slot_mapping=batch.slot_mapping[start:end],
        block_tables=batch.block_tables[first:last, :num_blocks].contiguous(),
        segments=segments,
        num_left_out=batch.num_left_out[start:end],
        output_rows=_slice_rows(batch.output_rows, start, end),
    )


def _slice_rows(rows: Tensor | None, start: int, end: int) -> Tensor | None:
    return None if rows is None else rows[(rows >= start) & (rows < end)] - start
