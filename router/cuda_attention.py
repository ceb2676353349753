"""Absorbed attention over the paged cache for a card, in torch: few large products instead of many small ones.

A card waits longer for a kernel to be launched than for most of them to run, so all tokens of a step are answered
together, each with its own context, padded to the longest of its run. Tokens are cut into runs of similar context so
that a run's scores and gathered rows stay within a fixed amount of memory. Letters as in attention.py; G tokens of a
run that belong to g sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from router.block_pool import BLOCK_SIZE
from router.step_batch import Segment, StepBatch

# Bytes of one run's gathered cache rows and float32 scores.
RUN_BYTES = 256 * 2**20


class Run(NamedTuple):
    """Tokens start to start + num_new of each segment from first to end; all of a run have the same num_new."""

    first: int
    end: int
    start: int
    num_new: int


def attend_tokens(queries: Tensor, cache: Tensor, batch: StepBatch, scale: float, rank: int) -> Tensor:
    """queries: [T, H, L + R]; cache: one layer's [num_blocks, BLOCK_SIZE, L + R], the new rows written. rank: L.

    batch.block_tables: on the queries' device. Returns [T, H, L]: softmax(scores) @ c_kv, in the queries' dtype;
    scores and softmax in float32.
    """
    num_heads, width = queries.shape[1:]
    per_position = width * cache.element_size() + 2 * num_heads * torch.float32.itemsize
    out = torch.empty(*queries.shape[:2], rank, dtype=queries.dtype, device=queries.device)
    for run in plan_runs(batch.segments, RUN_BYTES, width * cache.element_size(), per_position):
        segments = batch.segments[run.first : run.end]
        visible = max(segment.context_len + run.start + run.num_new for segment in segments)
        num_blocks = -(-visible // BLOCK_SIZE)
        block_ids = batch.block_tables[run.first : run.end, :num_blocks]
        rows = cache[block_ids.long()].flatten(1, 2)  # [g, C, L + R]
        first_row = segments[0].start + run.start
        # Segments follow each other; a run of several has whole ones, so its tokens do too.
        span = slice(first_row, first_row + len(segments) * run.num_new)
        asked = queries[span].reshape(len(segments), run.num_new * num_heads, width)  # [g, n * H, L + R]
        scores = torch.bmm(asked, rows.mT).float().mul_(scale)  # [g, n * H, C]
        last = batch.positions[span].view(len(segments), run.num_new, 1, 1)
        hidden = torch.arange(rows.shape[1], device=rows.device) > last  # [g, n, 1, C]
        by_token = scores.view(len(segments), run.num_new, num_heads, -1).masked_fill_(hidden, float("-inf"))
        # Rows behind a sequence's end may never have been written: 0 * NaN would be NaN.
        beyond = hidden[:, -1, 0].unsqueeze(-1)  # [g, C, 1]
        values = rows[..., :rank].masked_fill(beyond, 0.0)
        weights = by_token.softmax(dim=-1).to(rows.dtype).view(len(segments), run.num_new * num_heads, -1)
        out[span] = torch.bmm(weights, values).view(-1, num_heads, rank)
    return out


def plan_runs(segments: Sequence[Segment], max_bytes: int, row_bytes: int, bytes_per_position: int) -> Iterator[Run]:
    """Cut a step into runs that take at most max_bytes, or are one token.

    row_bytes: of one cache row; bytes_per_position: of one token's scores and a cache row at one context position.
    """
    first = 0
    while first < len(segments):
        num_new = segments[first].num_new
        longest = segments[first].context_len + num_new
        if _count_bytes(1, num_new, longest, row_bytes, bytes_per_position) > max_bytes:
            yield from _cut_segment(first, segments[first], max_bytes, row_bytes, bytes_per_position)
            first += 1
            continue
        end = first + 1
        while end < len(segments) and segments[end].num_new == num_new:
            wider = max(longest, segments[end].context_len + num_new)
            if _count_bytes(end + 1 - first, num_new, wider, row_bytes, bytes_per_position) > max_bytes:
                break
            longest, end = wider, end + 1
        yield Run(first, end, 0, num_new)
        first = end


def _cut_segment(
    index: int, segment: Segment, max_bytes: int, row_bytes: int, bytes_per_position: int
) -> Iterator[Run]:
    """A long segment, some tokens at a time: rows are gathered anew for each run."""
    context_len = segment.context_len + segment.num_new
    free_bytes = max_bytes - context_len * row_bytes
    step = max(1, free_bytes // (context_len * (bytes_per_position - row_bytes)))
    for start in range(0, segment.num_new, step):
        yield Run(index, index + 1, start, min(step, segment.num_new - start))


def _count_bytes(num_segments: int, num_new: int, context_len: int, row_bytes: int, bytes_per_position: int) -> int:
    return num_segments * context_len * (row_bytes + num_new * (bytes_per_position - row_bytes))
