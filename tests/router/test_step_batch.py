"""Rows of a step: which token, at which position, in which row of the cache."""

from router.block_pool import BLOCK_SIZE
from router.step_batch import Segment, TokenSpan, build_step_batch


def test_spans_become_rows_and_find_their_blocks() -> None:
    decode = TokenSpan([7], context_len=2 * BLOCK_SIZE, block_ids=[5, 0, 9])
    prefill = TokenSpan([1, 2, 3], context_len=BLOCK_SIZE - 1, block_ids=[4, 2, 8, 6])  # 2 of its 4 blocks are needed

    batch = build_step_batch([decode, prefill])

    assert batch.input_ids.tolist() == [7, 1, 2, 3]
    assert batch.positions.tolist() == [64, 31, 32, 33]
    assert batch.slot_mapping.tolist() == [9 * 32, 4 * 32 + 31, 2 * 32, 2 * 32 + 1]
    assert batch.block_tables.tolist() == [[5, 0, 9], [4, 2, 0]]
    assert list(batch.segments) == [Segment(0, 1, 64), Segment(1, 3, 31)]
