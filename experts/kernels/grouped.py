"""Torch's own products, on any device: rows gathered per expert, one pair of products each, in the compute dtype.

A row's result for an expert depends only on the rows sent to that expert in this frame: each expert's rows are
gathered into memory of their own, in ascending row order, and multiplied alone. So one, two or four groups give the
same bits per (row, expert) pair. Weighting and adding are fp32, in ascending expert id for each row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import linear, silu


class ExpertMatrices(NamedTuple):
    """One expert in the compute dtype. gate_up: [2 * inner, hidden], gate first; down: [hidden, inner]."""

    gate_up: torch.Tensor
    down: torch.Tensor


def expert_ffn(
    hidden_states: torch.Tensor,
    pair_rows: np.ndarray,
    pair_experts: np.ndarray,
    pair_weights: np.ndarray,
    layer: Mapping[int, ExpertMatrices],
    *,
    exact: bool,
) -> torch.Tensor:
    """Compute every (row, expert) pair and weight it.

    hidden_states: [num_rows, hidden] in the weights' dtype, on their device. pair_rows, pair_experts: int32
    [num_pairs], sorted by row, then expert; every expert is in layer. pair_weights: float32 [num_pairs].
    Returns float32: [num_pairs, hidden] in pair order if exact, else each row's sum [num_rows, hidden].
    """
    if hidden_states.shape[0] == 1:
        return _one_row(hidden_states, pair_experts, pair_weights, layer, exact=exact)
    num_rows, hidden_size = hidden_states.shape
    num_results = len(pair_rows) if exact else num_rows
    device = hidden_states.device
    result = torch.zeros(num_results, hidden_size, dtype=torch.float32, device=device)
    # A stable sort keeps the rows of an expert ascending.
    order = np.argsort(pair_experts, kind="stable")
    sorted_experts = pair_experts[order]
    starts = np.flatnonzero(np.diff(sorted_experts, prepend=-1)).tolist()
    rows = torch.from_numpy(pair_rows[order].astype(np.int64)).to(device)
    weights = torch.from_numpy(pair_weights[order].astype(np.float32)).to(device).unsqueeze(1)  # [num_pairs, 1]
    targets = torch.from_numpy(order).to(device) if exact else rows
    for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
        output = _ffn(hidden_states.index_select(0, rows[start:end]), layer[int(sorted_experts[start])])
        # An expert has a row at most once, so no two additions of one call meet.
        result.index_add_(0, targets[start:end], output.mul_(weights[start:end]))
    return result


def _one_row(
    hidden_states: torch.Tensor,
    pair_experts: np.ndarray,
    pair_weights: np.ndarray,
    layer: Mapping[int, ExpertMatrices],
    *,
    exact: bool,
) -> torch.Tensor:
    """The same for a single row, which needs no gathering: all pairs are its own, by ascending expert."""
    outputs = [
        _ffn(hidden_states, layer[expert]).mul_(weight)
        for expert, weight in zip(pair_experts.tolist(), pair_weights.tolist(), strict=True)
    ]
    if exact:
        return torch.cat(outputs)  # [num_pairs, hidden]
    result = outputs[0]
    for output in outputs[1:]:
        result.add_(output)
    return result


def _ffn(rows: torch.Tensor, expert: ExpertMatrices) -> torch.Tensor:
    """Feed rows [num_rows, hidden] through one expert. Returns float32 of the same shape, in memory of its own."""
    gate, up = linear(rows, expert.gate_up).chunk(2, dim=-1)  # each [num_rows, inner]
    return linear(silu(gate).mul_(up), expert.down).to(torch.float32)
