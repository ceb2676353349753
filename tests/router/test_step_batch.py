"""Rows of a step: which token, at which position, in which row of the cache."""

import dataclasses

import torch

from router.block_pool import BLOCK_SIZE
from router.step_batch import Segment, TokenSpan, build_step_batch, take_output_rows


def test_spans_become_rows_and_find_their_blocks() -> None:
    decode = TokenSpan([7], context_len=2 * BLOCK_SIZE, block_ids=[5, 0, 9])
    prefill = TokenSpan([1, 2, 3], context_len=BLOCK_SIZE - 1, block_ids=[4, 2, 8, 6])  # 2 of its 4 blocks are needed

    batch = build_step_batch([decode, prefill])

    assert batch.input_ids.tolist() == [7, 1, 2, 3]
    assert batch.positions.tolist() == [64, 31, 32, 33]
    assert batch.slot_mapping.tolist() == [9 * 32, 4 * 32 + 31, 2 * 32, 2 * 32 + 1]
    assert batch.block_tables.tolist() == [[5, 0, 9], [4, 2, 0]]
    assert list(batch.segments) == [Segment(0, 1, 64), Segment(1, 3, 31)]


def test_output_rows_become_a_batch_whose_context_is_in_the_cache() -> None:
    prompt = TokenSpan([1, 2, 3, 4], context_len=BLOCK_SIZE - 2, block_ids=[4, 2])
    unread = TokenSpan([5, 6], context_len=0, block_ids=[7])
    verified = TokenSpan([8, 9], context_len=3, block_ids=[1])
    batch = dataclasses.replace(build_step_batch([prompt, unread, verified]), output_rows=torch.tensor([0, 2, 3, 6, 7]))

    rest = take_output_rows(batch)

    assert list(rest.segments) == [Segment(0, 1, 30), Segment(1, 2, 32), Segment(3, 2, 3)]
    assert rest.input_ids.tolist() == [1, 3, 4, 8, 9]
    assert rest.positions.tolist() == [30, 32, 33, 3, 4]
    assert rest.slot_mapping.tolist() == [4 * 32 + 30, 2 * 32, 2 * 32 + 1, 32 + 3, 32 + 4]
    assert rest.block_tables.tolist() == [[4, 2], [4, 2], [1, 0]]
    assert rest.output_rows is None
