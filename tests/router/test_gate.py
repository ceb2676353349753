"""The gate chooses and weights experts as the DeepSeek reports say and as transformers does."""

from typing import Any

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from experts.model_config import ModelConfig
from router.gate import GateWeights, compute_gate_logits, select_experts
from router.linear import Linear, choose_linear_factory
from tests.random_checkpoint import build_config
from tests.tolerances import FLOAT32_RELATIVE_ERROR

NUM_TOKENS = 256


def model_config(**overrides: Any) -> ModelConfig:
    return ModelConfig.from_dict(build_config(**overrides))


def project(weight: torch.Tensor) -> Linear:
    return choose_linear_factory(torch.bfloat16).gate(weight)


def by_expert(topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in ascending expert id: neither side promises an order."""
    ids, order = topk_ids.sort(dim=-1)
    return topk_weights.gather(-1, order), ids


def test_hand_computed_example_with_negative_choices() -> None:
    """4 gate groups of 2; every choice but one is negative, so masking with 0 would pick dropped experts.

    choice: -0.5 -0.6 | -0.1 +0.05 | -0.8 -0.8 | -0.3 -0.4; group sums -1.1, -0.05, -1.6, -0.7: groups 1 and 3 stay.
    """
    config = model_config(n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3)
    scores = torch.tensor([[0.5, 0.4, 0.9, 0.1, 0.2, 0.2, 0.7, 0.6]])
    bias = torch.tensor([-1.0, -1.0, -1.0, -0.05, -1.0, -1.0, -1.0, -1.0])

    topk_weights, topk_ids = select_experts(scores.logit(), bias, config)

    assert topk_ids.tolist() == [[3, 2, 6]]
    # Unbiased scores 0.1, 0.9, 0.7 over their sum 1.7, times routed_scaling_factor 2.5.
    expected = torch.tensor([[0.147059, 1.323529, 1.029412]])
    torch.testing.assert_close(topk_weights, expected, rtol=1e-5, atol=1e-6)


def test_weights_are_not_normalised_where_the_config_says_so() -> None:
    config = model_config(
        n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, norm_topk_prob=False,
        routed_scaling_factor=2.0,
    )  # fmt: skip
    scores = torch.tensor([[0.1, 0.8, 0.3, 0.6]])

    topk_weights, topk_ids = select_experts(scores.logit(), torch.zeros(4), config)

    assert topk_ids.tolist() == [[1, 3]]
    torch.testing.assert_close(topk_weights, torch.tensor([[1.6, 1.2]]), rtol=1e-5, atol=1e-6)


def test_group_limited_greedy_ranks_groups_by_their_best_expert() -> None:
    """Group 0 has the higher sum, group 1 the highest expert: V2 keeps group 1, V3's rule would keep group 0."""
    config = model_config(
        model_type="deepseek_v2", n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2,
        topk_method="group_limited_greedy",
    )  # fmt: skip
    scores = torch.tensor([[0.3, 0.29, 0.4, 0.01]])

    topk_weights, topk_ids = select_experts(scores.log(), None, config)

    assert topk_ids.tolist() == [[2, 3]]
    torch.testing.assert_close(topk_weights, torch.tensor([[0.4, 0.01]]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("n_routed_experts", "n_group", "topk_group", "num_experts_per_tok"),
    [(16, 4, 2, 4), (16, 8, 4, 8), (32, 1, 1, 6), (16, 4, 4, 4), (16, 2, 1, 1)],
)
def test_noaux_tc_agrees_with_transformers(
    n_routed_experts: int, n_group: int, topk_group: int, num_experts_per_tok: int
) -> None:
    sizes: dict[str, Any] = {
        "n_routed_experts": n_routed_experts, "n_group": n_group, "topk_group": topk_group,
        "num_experts_per_tok": num_experts_per_tok, "hidden_size": 64,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(n_routed_experts + n_group)
    theirs = DeepseekV3TopkRouter(DeepseekV3Config(**sizes, norm_topk_prob=True))
    theirs.weight.data = torch.randn(n_routed_experts, 64, generator=generator)
    theirs.e_score_correction_bias.copy_(torch.randn(n_routed_experts, generator=generator) - 0.5)
    hidden_states = torch.randn(NUM_TOKENS, 64, generator=generator)

    with torch.no_grad():
        _, their_weights, their_ids = theirs(hidden_states)
        weights = GateWeights(project(theirs.weight.data), theirs.e_score_correction_bias)
        topk_weights, topk_ids = select_experts(
            compute_gate_logits(hidden_states, weights),
            weights.e_score_correction_bias,
            model_config(**sizes, norm_topk_prob=True),
        )

    our_weights, our_ids = by_expert(topk_weights, topk_ids)
    their_weights, their_ids = by_expert(their_weights, their_ids)
    assert torch.equal(our_ids, their_ids)
    torch.testing.assert_close(our_weights, their_weights, rtol=FLOAT32_RELATIVE_ERROR, atol=0)


@pytest.mark.parametrize("topk_method", ["greedy", "group_limited_greedy"])
def test_softmax_gates_agree_with_transformers(topk_method: str) -> None:
    sizes: dict[str, Any] = {
        "n_routed_experts": 24, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 6, "hidden_size": 64,
        "topk_method": topk_method, "routed_scaling_factor": 16.0,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(7)
    theirs = DeepseekV2TopkRouter(DeepseekV2Config(**sizes))
    theirs.weight.data = torch.randn(24, 64, generator=generator)
    hidden_states = torch.randn(NUM_TOKENS, 64, generator=generator)

    with torch.no_grad():
        _, their_weights, their_ids = theirs(hidden_states)
        logits = compute_gate_logits(hidden_states, GateWeights(project(theirs.weight.data), None))
        topk_weights, topk_ids = select_experts(logits, None, model_config(model_type="deepseek_v2", **sizes))

    our_weights, our_ids = by_expert(topk_weights, topk_ids)
    their_weights, their_ids = by_expert(their_weights, their_ids)
    assert torch.equal(our_ids, their_ids)
    torch.testing.assert_close(our_weights, their_weights, rtol=FLOAT32_RELATIVE_ERROR, atol=0)


def test_chosen_experts_lie_in_at_most_topk_group_gate_groups() -> None:
    config = model_config(n_routed_experts=32, n_group=8, topk_group=3, num_experts_per_tok=8)
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(NUM_TOKENS, 32, generator=generator)

    _, topk_ids = select_experts(logits, torch.randn(32, generator=generator) - 2.0, config)

    gate_groups = topk_ids // (32 // 8)
    assert max(len(set(row)) for row in gate_groups.tolist()) <= 3
    assert all(len(set(row)) == 8 for row in topk_ids.tolist())


def test_gate_is_float32_for_bfloat16_hidden_states() -> None:
    hidden_states = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    weights = GateWeights(project(torch.randn(4, 16, generator=torch.Generator().manual_seed(1))), None)

    logits = compute_gate_logits(hidden_states, weights)

    assert logits.dtype == torch.float32
    assert torch.equal(logits, compute_gate_logits(hidden_states.float(), weights))
