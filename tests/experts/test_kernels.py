"""The kernel that serves against the judge, under kind and unkind routing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experts.kernels.grouped import ExpertMatrices, expert_ffn
from tests.experts.reference import expert_ffn_reference
from tests.tolerances import KERNEL_RELATIVE_ERROR

HIDDEN, INNER, NUM_EXPERTS = 96, 40, 6

Layer = dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]

ROUTINGS: dict[str, list[list[int]]] = {
    "one row, one expert": [[3]],
    "one row, several experts": [[0, 2, 5]],
    "all rows to one expert": [[4]] * 9,
    "every row to every expert": [list(range(NUM_EXPERTS))] * 7,
    "one hot expert": [[0], [0, 1], [0], [0, 5], [0], [0], [0, 3]],
    "rows that chose nobody here": [[], [1], [], [], [2, 3], []],
    "each row its own expert": [[5], [4], [3], [2], [1], [0]],
    "one row of many, chosen by nobody else": [[], [], [2]],
}


def make_layer(dtype: torch.dtype) -> Layer:
    """Expert id -> (gate, up, down)."""
    generator = torch.Generator().manual_seed(1)
    return {
        expert: (
            (torch.randn(INNER, HIDDEN, generator=generator) / HIDDEN**0.5).to(dtype),
            (torch.randn(INNER, HIDDEN, generator=generator) / HIDDEN**0.5).to(dtype),
            (torch.randn(HIDDEN, INNER, generator=generator) / INNER**0.5).to(dtype),
        )
        for expert in range(NUM_EXPERTS)
    }


def make_pairs(routing: list[list[int]]) -> Pairs:
    pairs = [(row, expert) for row, experts in enumerate(routing) for expert in experts]
    weights = np.random.default_rng(2).uniform(0.1, 2.0, len(pairs)).astype(np.float32)
    return (
        np.array([row for row, _ in pairs], dtype=np.int32),
        np.array([expert for _, expert in pairs], dtype=np.int32),
        weights,
    )


def make_rows(num_rows: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(num_rows, HIDDEN, generator=torch.Generator().manual_seed(3)).to(dtype)


def judge(rows: torch.Tensor, pairs: Pairs, layer: Layer, *, exact: bool) -> torch.Tensor:
    pair_rows, pair_experts, pair_weights = (torch.from_numpy(part) for part in pairs)
    return expert_ffn_reference(rows, pair_rows, pair_experts, pair_weights, layer, exact=exact)


def build(layer: Layer) -> dict[int, ExpertMatrices]:
    return {expert: ExpertMatrices(torch.cat([gate, up]), down) for expert, (gate, up, down) in layer.items()}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS.keys())
def test_fp32_agrees_with_the_judge(routing: list[list[int]], exact: bool) -> None:
    layer, rows, pairs = make_layer(torch.float32), make_rows(len(routing), torch.float32), make_pairs(routing)
    found = expert_ffn(rows, *pairs, build(layer), exact=exact)
    expected = judge(rows, pairs, layer, exact=exact)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS.keys())
def test_bf16_agrees_with_the_judge_within_the_rounding_of_bf16(routing: list[list[int]]) -> None:
    layer, rows, pairs = make_layer(torch.bfloat16), make_rows(len(routing), torch.bfloat16), make_pairs(routing)
    found = expert_ffn(rows, *pairs, build(layer), exact=False)
    expected = judge(rows, pairs, layer, exact=False)
    # Each of gate, up, their product and the result is rounded to 8 bits; the norm averages those out.
    assert float((found - expected).norm() / expected.norm()) <= 4 * KERNEL_RELATIVE_ERROR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pair_has_the_same_bits_whichever_group_computes_it(dtype: torch.dtype) -> None:
    """One group with all experts, or one group per expert that is sent only its own rows."""
    routing = [[0, 1, 2], [1], [0, 5], [2, 3, 4, 5], [1, 4]]
    layer, rows = build(make_layer(dtype)), make_rows(len(routing), dtype)
    pair_rows, pair_experts, pair_weights = make_pairs(routing)
    together = expert_ffn(rows, pair_rows, pair_experts, pair_weights, layer, exact=True)
    for expert in range(NUM_EXPERTS):
        mine = np.flatnonzero(pair_experts == expert)
        sent_rows = rows[torch.from_numpy(pair_rows[mine]).long()]
        alone = expert_ffn(
            sent_rows,
            np.arange(len(mine), dtype=np.int32),
            pair_experts[mine],
            pair_weights[mine],
            {expert: layer[expert]},
            exact=True,
        )
        assert torch.equal(alone, together[torch.from_numpy(mine)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS.keys())
def test_the_reduced_sum_is_the_exact_rows_added_by_ascending_expert(
    routing: list[list[int]], dtype: torch.dtype
) -> None:
    layer, rows, pairs = build(make_layer(dtype)), make_rows(len(routing), dtype), make_pairs(routing)
    exact = expert_ffn(rows, *pairs, layer, exact=True)
    expected = torch.zeros(len(routing), HIDDEN)
    for pair, row in enumerate(pairs[0].tolist()):
        expected[row] += exact[pair]
    assert torch.equal(expert_ffn(rows, *pairs, layer, exact=False), expected)


@pytest.mark.parametrize("exact", [False, True])
def test_a_row_that_is_not_finite_does_not_touch_the_others(exact: bool) -> None:
    routing = [[0, 1], [0, 1], [1]]
    layer, rows, pairs = build(make_layer(torch.float32)), make_rows(3, torch.float32), make_pairs(routing)
    clean = expert_ffn(rows, *pairs, layer, exact=exact)
    rows[1, 5] = float("nan")
    poisoned = expert_ffn(rows, *pairs, layer, exact=exact)
    kept = torch.tensor([0, 1, 4] if exact else [0, 2])
    assert torch.equal(poisoned[kept], clean[kept])
    assert bool(poisoned.isnan().any())


def test_inputs_are_left_as_they_were() -> None:
    routing = [[0, 1], [2]]
    layer, rows, pairs = build(make_layer(torch.float32)), make_rows(2, torch.float32), make_pairs(routing)
    before = rows.clone()
    for _ in range(2):
        expert_ffn(rows, *pairs, layer, exact=False)
    assert torch.equal(rows, before)
