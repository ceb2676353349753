"""The expert kernels on a card, at the published sizes: what Triton's interpreter cannot show."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experts.kernels.captured_ffn import CapturedFfn
from experts.kernels.row_plan import PlanLayout, plan_rows
from experts.kernels.tile_table import KernelChoice, TileLine, WeightPath, compute_packed_bytes
from experts.kernels.triton_ffn import expert_ffn, launch_ffn, view_plan
from tests.experts.random_experts import Frame, RandomExperts, compute_expected, make_frame, relative_error
from tests.tolerances import KERNEL_RELATIVE_ERROR

BLOCK = (128, 128)


def uneven_frame(experts: RandomExperts, num_rows: int, seed: int) -> Frame:
    """Expert 0 has every row, 1 every third, 2 one, 3 none."""
    rows_of = {0: list(range(num_rows)), 1: list(range(0, num_rows, 3)), 2: [num_rows // 2]}
    return make_frame(experts, rows_of, num_rows, seed)


def run_line(experts: RandomExperts, frame: Frame, choice: KernelChoice, line: TileLine) -> torch.Tensor:
    """Weighted pairs with the tiles of this line, whatever the number of rows."""
    plan = plan_rows(frame.pair_rows, frame.pair_experts, len(frame.hidden_states), line.block_rows)
    layout = PlanLayout(len(frame.hidden_states), len(plan.slot_pair), len(plan.tile_rows))
    packed = torch.from_numpy(layout.pack(plan, frame.pair_weights)).to(frame.hidden_states.device)
    out = torch.empty(len(frame.pair_rows), experts.stack.hidden_size, device=packed.device)
    launch_ffn(frame.hidden_states, view_plan(layout, packed), experts.stack, choice, line, out, exact=True)
    return out


@pytest.mark.parametrize("num_rows", [1, 8, 40, 200])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_real_widths_match_the_reference(
    real_experts: RandomExperts, choice: KernelChoice, num_rows: int, dtype: torch.dtype
) -> None:
    frame = uneven_frame(real_experts, num_rows, seed=num_rows)
    frame = frame._replace(hidden_states=frame.hidden_states.to(dtype))
    result = expert_ffn(*frame, real_experts.stack, choice, exact=False)
    expected = compute_expected(real_experts, frame, choice.path, exact=False)
    assert relative_error(result, expected) <= KERNEL_RELATIVE_ERROR


def test_a_row_has_the_same_bits_in_every_tile_of_the_table(real_experts: RandomExperts, choice: KernelChoice) -> None:
    frame = uneven_frame(real_experts, 150, seed=1)
    first, *others = [run_line(real_experts, frame, choice, line) for line in choice.lines]
    for other in others:
        assert torch.equal(other, first)


def test_a_row_has_the_same_bits_alone_and_among_others(real_experts: RandomExperts, choice: KernelChoice) -> None:
    frame = uneven_frame(real_experts, 150, seed=2)
    together = expert_ffn(*frame, real_experts.stack, choice, exact=True)
    for row in (0, 75, 149):
        own = frame.pair_rows == row
        alone = Frame(
            frame.hidden_states[row : row + 1],
            np.zeros(int(own.sum()), np.int32),
            frame.pair_experts[own],
            frame.pair_weights[own],
        )
        result = expert_ffn(*alone, real_experts.stack, choice, exact=True)
        assert torch.equal(result, together[torch.from_numpy(own).to(together.device)])


def test_a_frame_cut_into_launches_has_the_same_bits(
    real_experts: RandomExperts, choice: KernelChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = uneven_frame(real_experts, 100, seed=3)
    whole = expert_ffn(*frame, real_experts.stack, choice, exact=False)
    monkeypatch.setattr("experts.kernels.triton_ffn.MAX_PAIRS_PER_LAUNCH", 17)
    assert torch.equal(expert_ffn(*frame, real_experts.stack, choice, exact=False), whole)


@pytest.mark.parametrize("exact", [False, True], ids=["reduced", "exact"])
def test_a_captured_graph_replays_any_routing_with_the_same_bits(
    real_experts: RandomExperts, choice: KernelChoice, exact: bool
) -> None:
    dtype = torch.bfloat16
    captured = CapturedFfn(real_experts.stack, choice, max_rows=32, max_pairs=64, dtype=dtype, exact=exact)
    second = CapturedFfn(
        real_experts.stack, choice, max_rows=32, max_pairs=64, dtype=dtype, exact=exact, share_memory_with=captured
    )
    for num_rows in (32, 1, 9):
        frame = uneven_frame(real_experts, num_rows, seed=num_rows)
        frame = frame._replace(hidden_states=frame.hidden_states.to(dtype))
        expected = expert_ffn(*frame, real_experts.stack, choice, exact=exact)
        for graph in (captured, second):
            assert torch.equal(graph.compute(*frame), expected)
    with pytest.raises(ValueError, match="cannot be shared"):
        CapturedFfn(
            real_experts.stack, choice, max_rows=8, max_pairs=64, dtype=dtype, exact=exact, share_memory_with=captured
        )
    with pytest.raises(ValueError, match="captured for 32 rows"):
        captured.compute(*uneven_frame(real_experts, 33, seed=0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_spoils_no_other(
    real_experts: RandomExperts, choice: KernelChoice, value: float
) -> None:
    frame = uneven_frame(real_experts, 6, seed=4)
    clean = expert_ffn(*frame, real_experts.stack, choice, exact=False)
    frame.hidden_states[2, 4000] = value
    spoiled = expert_ffn(*frame, real_experts.stack, choice, exact=False)
    assert bool(spoiled[2].isnan().all())
    others = [0, 1, 3, 4, 5]
    assert torch.equal(spoiled[others], clean[others])


def test_a_nan_byte_of_a_weight_gives_nan(real_experts: RandomExperts, choice: KernelChoice) -> None:
    stack = real_experts.stack
    stored = stack.down[1, 5, 9].clone()
    try:
        stack.down[1, 5, 9] = 0x7F
        result = expert_ffn(*make_frame(real_experts, {0: [0], 1: [0]}, 1), stack, choice, exact=True)
    finally:
        stack.down[1, 5, 9] = stored
    assert bool(result[1, 5].isnan()) and result.isnan().sum() == 1


def test_memory_is_the_bytes_as_stored_and_bounded_scratch(real_experts: RandomExperts, choice: KernelChoice) -> None:
    stack = real_experts.stack
    expected = 4 * (2 * compute_packed_bytes((2048, 7168), BLOCK) + compute_packed_bytes((7168, 2048), BLOCK))
    assert stack.size_bytes == expected
    frame = uneven_frame(real_experts, 600, seed=5)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    expert_ffn(*frame, stack, choice, exact=False)
    torch.cuda.synchronize()
    # Per pair: its fp32 row, its fp32 inner row and that row quantised; per row: its input quantised and its sum.
    wide = 2 if choice.path is WeightPath.W8A16 else 1
    pairs = len(frame.pair_rows) * (7168 * 4 + 2048 * (4 + wide) + 64)
    rows = 600 * (7168 * (4 + wide) + 224)
    assert torch.cuda.max_memory_allocated() - before <= (pairs + rows) * 1.05 + 4 * 2**20
