"""All tokens of a step at once give what segment after segment gives; run on the CPU, as the products are torch's."""

from __future__ import annotations

import pytest
import torch

from router.block_pool import BLOCK_SIZE
from router.cuda_attention import Run, attend_tokens, plan_runs
from router.step_batch import Segment, StepBatch, TokenSpan, build_step_batch

HEADS, RANK, ROPE = 3, 16, 8
SCALE = 0.3


def make_batch(sizes: list[tuple[int, int]]) -> StepBatch:
    """(context_len, num_new) of each sequence; blocks shuffled among the sequences."""
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1)).tolist()
    spans: list[TokenSpan] = []
    for context_len, num_new in sizes:
        num_blocks = -(-(context_len + num_new) // BLOCK_SIZE)
        spans.append(TokenSpan([0] * num_new, context_len, [order.pop() for _ in range(num_blocks)]))
    return build_step_batch(spans)


def attend_one_by_one(queries: torch.Tensor, cache: torch.Tensor, batch: StepBatch) -> torch.Tensor:
    out = torch.empty(*queries.shape[:2], RANK)
    for index, segment in enumerate(batch.segments):
        rows = cache[batch.block_tables[index].long()].flatten(0, 1)
        for token in range(segment.num_new):
            seen = rows[: segment.context_len + token + 1]
            scores = (queries[segment.start + token] @ seen.T) * SCALE
            out[segment.start + token] = scores.softmax(dim=-1) @ seen[:, :RANK]
    return out


@pytest.mark.parametrize("run_bytes", [1, 40_000, 2**28], ids=["token by token", "some runs", "one run"])
@pytest.mark.parametrize(
    "sizes",
    [
        [(0, 1)],
        [(31, 1), (32, 1), (300, 1), (5, 1)],
        [(0, 40), (64, 7), (3, 1), (90, 1)],
        [(10, 3), (50, 3), (0, 3)],
    ],
    ids=["first token", "decode", "mixed", "verify"],
)
def test_the_same_as_token_by_token(
    sizes: list[tuple[int, int]], run_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.cuda_attention.RUN_BYTES", run_bytes)
    generator = torch.Generator().manual_seed(0)
    batch = make_batch(sizes)
    # Blocks that nobody has written may hold anything.
    cache = torch.full((200, BLOCK_SIZE, RANK + ROPE), float("nan"))
    for index, segment in enumerate(batch.segments):
        for position in range(segment.context_len + segment.num_new):
            block = batch.block_tables[index, position // BLOCK_SIZE]
            cache[block, position % BLOCK_SIZE] = torch.randn(RANK + ROPE, generator=generator)
    queries = torch.randn(len(batch.input_ids), HEADS, RANK + ROPE, generator=generator)
    found = attend_tokens(queries, cache, batch, SCALE, RANK)
    torch.testing.assert_close(found, attend_one_by_one(queries, cache, batch), rtol=1e-5, atol=1e-6)


def test_runs_cover_every_token_once_within_the_bytes() -> None:
    sizes = [(100, 1), (90, 1), (5000, 1), (10, 64), (10, 64), (0, 900), (7, 1)]
    starts = [sum(num_new for _, num_new in sizes[:index]) for index in range(len(sizes))]
    segments = [Segment(start, num_new, context) for start, (context, num_new) in zip(starts, sizes, strict=True)]
    row_bytes, per_position, most = 100, 500, 2_000_000
    runs = list(plan_runs(segments, most, row_bytes, per_position))
    tokens: list[int] = []
    for run in runs:
        chosen = segments[run.first : run.end]
        assert len({segment.num_new for segment in chosen}) == 1
        longest = max(segment.context_len + segment.num_new for segment in chosen)
        size = len(chosen) * longest * (row_bytes + run.num_new * (per_position - row_bytes))
        assert size <= most or (len(chosen), run.num_new) == (1, 1)
        for segment in chosen:
            tokens.extend(range(segment.start + run.start, segment.start + run.start + run.num_new))
    assert tokens == list(range(starts[-1] + 1))
    assert runs[0] == Run(0, 2, 0, 1)
