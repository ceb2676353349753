"""The judge: every expert in plain fp32, ascending expert order, nothing shared with the kernels that serve."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from experts.quantization import dequantize_block


def dequantize_reference(weight: torch.Tensor, scale_inv: torch.Tensor | None, block: tuple[int, int]) -> torch.Tensor:
    """Return the weight in float32; scale_inv is None for a weight that is not quantised."""
    return weight.to(torch.float32) if scale_inv is None else dequantize_block(weight, scale_inv, block)


def expert_ffn_reference(
    hidden_states: torch.Tensor,
    pair_rows: torch.Tensor,
    pair_experts: torch.Tensor,
    pair_weights: torch.Tensor,
    matrices: Mapping[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    *,
    exact: bool,
) -> torch.Tensor:
    """Compute down(silu(gate(x)) * up(x)) for every pair and weight it.

    hidden_states: [num_rows, hidden]. pair_rows, pair_experts: integer [num_pairs], sorted by row, then expert.
    pair_weights: [num_pairs] float32. matrices: expert id -> (gate, up [inner, hidden], down [hidden, inner]).
    Returns float32: [num_pairs, hidden] if exact, else the sum of each row's pairs [num_rows, hidden].
    """
    x = hidden_states.to(torch.float32)
    weighted = torch.zeros(len(pair_rows), x.shape[1], dtype=torch.float32)
    for pair, (row, expert, weight) in enumerate(
        zip(pair_rows.tolist(), pair_experts.tolist(), pair_weights.tolist(), strict=True)
    ):
        gate, up, down = (matrix.to(torch.float32) for matrix in matrices[expert])
        inner = torch.nn.functional.silu(gate @ x[row]) * (up @ x[row])
        weighted[pair] = (down @ inner) * weight
    if exact:
        return weighted
    result = torch.zeros_like(x)
    for pair, row in enumerate(pair_rows.tolist()):
        result[row] += weighted[pair]
    return result
