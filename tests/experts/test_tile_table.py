"""Which variant a card gets."""

from __future__ import annotations

import pytest

from experts.kernels.tile_table import KernelChoice, WeightPath, choose_kernels, compute_packed_bytes


def test_cards_with_an_fp8_unit_multiply_in_fp8_and_older_ones_decode() -> None:
    chosen = {capability: choose_kernels(capability).path for capability in [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)]}
    assert chosen == {
        (8, 0): WeightPath.W8A16,
        (8, 6): WeightPath.W8A16,
        (8, 9): WeightPath.W8A8,
        (9, 0): WeightPath.W8A8,
        (12, 0): WeightPath.W8A8,
    }
    assert choose_kernels((9, 0), WeightPath.W8A16).path is WeightPath.W8A16


@pytest.mark.parametrize(
    ("capability", "path", "message"),
    [((7, 5), WeightPath.W8A16, "at least 8.0"), ((8, 6), WeightPath.W8A8, "no FP8 unit: take the path w8a16")],
)
def test_what_a_card_cannot_do_is_refused(capability: tuple[int, int], path: WeightPath, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KernelChoice(capability, path)


@pytest.mark.parametrize("path", WeightPath)
def test_lines_ascend_and_share_their_rows_per_tile(path: WeightPath) -> None:
    for capability in [(8, 9), (9, 0), (10, 3), (12, 1)]:
        lines = KernelChoice(capability, path).lines
        limits = [line.max_rows_per_expert for line in lines]
        assert limits[-1] is None
        rising = [limit for limit in limits[:-1] if limit is not None]
        assert len(rising) == len(limits) - 1 and rising == sorted(set(rising))
        assert all(line.gate_up.block_rows == line.down.block_rows for line in lines)


def test_rows_per_expert_choose_the_line() -> None:
    choice = choose_kernels((9, 0))
    assert choice.choose_tiles(1) == choice.lines[0]
    assert choice.choose_tiles(16) == choice.lines[0]
    assert choice.choose_tiles(16.5) == choice.lines[1]
    assert choice.choose_tiles(100_000) == choice.lines[-1]


def test_packed_bytes_count_partial_blocks() -> None:
    # kv_a_proj_with_mqa as published: 576 rows are four and a half blocks.
    assert compute_packed_bytes((576, 7168), (128, 128)) == 576 * 7168 + 4 * 5 * 56
