"""The gate: which experts a token goes to, and with which weights. Everything here is float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from experts.model_config import ModelConfig
from router.linear import Linear


@dataclass(frozen=True)
class GateWeights:
    """projection: hidden_size -> n_routed_experts, in float32.  e_score_correction_bias: [n_routed_experts] float32."""

    projection: Linear
    e_score_correction_bias: Tensor | None


def compute_gate_logits(hidden_states: Tensor, weights: GateWeights) -> Tensor:
    """hidden_states: [num_tokens, hidden_size], any float dtype. Returns [num_tokens, n_routed_experts] float32."""
    return weights.projection(hidden_states.float())


def select_experts(
    gate_logits: Tensor, e_score_correction_bias: Tensor | None, config: ModelConfig
) -> tuple[Tensor, Tensor]:
    """Choose num_experts_per_tok experts per token (DeepSeek-V3 report, section 2.1.2; DeepSeek-V2 report, 2.2.1).

    Biased scores choose the experts, unbiased scores weight them. With `noaux_tc` a gate group's score is the sum of
    its two highest biased scores, with `group_limited_greedy` its highest score; `greedy` knows no groups. Experts
    outside the topk_group best groups are masked with -inf: a mask of 0 would prefer them to negative biased scores. Of
    equal scores the lower expert's, or gate group's, is chosen.

    gate_logits: [num_tokens, n_routed_experts] float32.
    Returns topk_weights [num_tokens, num_experts_per_tok] float32 and topk_ids, same shape, int64, best first.
    """
    scores = gate_logits.sigmoid() if config.scoring_func == "sigmoid" else gate_logits.softmax(dim=-1)
    choice = scores if e_score_correction_bias is None else scores + e_score_correction_bias
    if config.topk_method != "greedy" and config.n_group > config.topk_group:
        choice = _mask_groups(choice, config)
    topk_ids = _find_highest(choice, config.num_experts_per_tok)
    topk_weights = scores.gather(-1, topk_ids)
    if config.norm_topk_prob:
        topk_weights = topk_weights / (topk_weights.sum(dim=-1, keepdim=True) + 1e-20)
    return topk_weights * config.routed_scaling_factor, topk_ids


def _mask_groups(choice: Tensor, config: ModelConfig) -> Tensor:
    num_tokens = choice.shape[0]
    grouped = choice.view(num_tokens, config.n_group, -1)  # [num_tokens, n_group, n_routed_experts / n_group]
    if config.topk_method == "noaux_tc":
        group_scores = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
    else:
        group_scores = grouped.amax(dim=-1)
    kept = _find_highest(group_scores, config.topk_group)  # [num_tokens, topk_group]
    dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept, False)
    return grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).view(num_tokens, -1)


def _find_highest(values: Tensor, count: int) -> Tensor:
    """Places along the last dimension, best first; of equal ones the lower place, which topk does not promise."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]
