"""Plans of tiles: every pair in one tile of its expert, whatever the routing."""

from __future__ import annotations

import numpy as np
import pytest

from experts.kernels.row_plan import PlanLayout, compute_max_tiles, cut_rows, plan_rows

BLOCK_ROWS = 4


def draw_routing(seed: int, num_rows: int, num_experts: int, skew: float) -> tuple[np.ndarray, np.ndarray]:
    """Zero to three experts for each row, the first ones the more often the greater the skew."""
    random = np.random.default_rng(seed)
    shares = np.exp(-skew * np.arange(num_experts))
    rows: list[int] = []
    experts: list[int] = []
    for row in range(num_rows):
        chosen = random.choice(num_experts, random.integers(0, 4), replace=False, p=shares / shares.sum())
        rows += [row] * len(chosen)
        experts += sorted(chosen.tolist())
    return np.array(rows, dtype=np.int32), np.array(experts, dtype=np.int32)


@pytest.mark.parametrize("skew", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("num_rows", [0, 1, 37])
def test_every_pair_is_in_exactly_one_tile_of_its_expert(num_rows: int, skew: float) -> None:
    pair_rows, pair_experts = draw_routing(1, num_rows, 8, skew)
    plan = plan_rows(pair_rows, pair_experts, num_rows, BLOCK_ROWS)
    seen: list[int] = []
    for expert, first, length in zip(plan.tile_expert, plan.tile_first, plan.tile_rows, strict=True):
        assert 1 <= length <= BLOCK_ROWS
        pairs = plan.slot_pair[first : first + length]
        assert (pair_experts[pairs] == expert).all()
        assert (pair_rows[pairs] == plan.slot_row[first : first + length]).all()
        seen += pairs.tolist()
    assert sorted(seen) == list(range(len(pair_rows)))
    for row in range(num_rows):
        assert (pair_rows[plan.row_first[row] : plan.row_first[row + 1]] == row).all()
    assert plan.row_first[-1] == len(pair_rows)


def test_the_rows_of_an_expert_stay_ascending() -> None:
    pair_rows, pair_experts = draw_routing(2, 40, 4, 1.0)
    plan = plan_rows(pair_rows, pair_experts, 40, BLOCK_ROWS)
    for expert in range(4):
        rows = plan.slot_row[pair_experts[plan.slot_pair] == expert]
        assert (np.diff(rows) > 0).all()


@pytest.mark.parametrize(("num_experts", "num_rows"), [(1, 9), (8, 3), (3, 8)])
def test_no_routing_has_more_tiles_than_reserved(num_experts: int, num_rows: int) -> None:
    for seed in range(50):
        random = np.random.default_rng(seed)
        experts = random.integers(0, num_experts, num_rows)
        plan = plan_rows(np.arange(num_rows), experts, num_rows, BLOCK_ROWS)
        assert len(plan.tile_rows) <= compute_max_tiles(num_rows, num_experts, BLOCK_ROWS)


def test_a_larger_layout_leaves_the_rest_without_rows() -> None:
    pair_rows, pair_experts = draw_routing(3, 5, 4, 0.0)
    plan = plan_rows(pair_rows, pair_experts, 5, BLOCK_ROWS)
    weights = np.linspace(0, 1, len(pair_rows), dtype=np.float32)
    layout = PlanLayout(num_rows=9, num_pairs=30, num_tiles=20)
    packed = layout.pack(plan, weights)
    assert len(packed) == layout.offsets[-1] and all(offset % 4 == 0 for offset in layout.offsets)
    sections = [packed[start : start + length] for start, length in zip(layout.offsets, layout.lengths, strict=False)]
    assert sections[0] == 5 and sections[1] == len(pair_rows)
    assert sections[4].tolist() == plan.tile_rows.tolist() + [0] * (20 - len(plan.tile_rows))
    assert sections[7].tolist() == plan.row_first.tolist() + [len(pair_rows)] * 4
    assert np.array_equal(sections[8].view(np.float32)[: len(weights)], weights)


def test_a_plan_that_does_not_fit_its_layout_is_refused() -> None:
    plan = plan_rows(np.arange(5), np.zeros(5, np.int32), 5, BLOCK_ROWS)
    with pytest.raises(ValueError, match="does not fit"):
        PlanLayout(num_rows=5, num_pairs=4, num_tiles=9).pack(plan, np.ones(5, np.float32))


def test_a_frame_is_cut_between_rows() -> None:
    pair_rows = np.array([0, 0, 0, 1, 1, 3, 4, 4, 4, 4, 4, 5])
    assert cut_rows(pair_rows, 7, max_pairs=100) == [(0, 7)]
    assert cut_rows(pair_rows, 7, max_pairs=4) == [(0, 1), (1, 4), (4, 5), (5, 7)]
    assert cut_rows(np.array([], dtype=np.int32), 3, max_pairs=4) == [(0, 3)]
    assert cut_rows(np.array([], dtype=np.int32), 0, max_pairs=4) == []
