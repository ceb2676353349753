"""The routed experts on a GPU: plan a frame on the host, run it through four kinds of Triton kernel.

    quantise rows -> gate and up with SwiGLU -> quantise -> down, times the pair's weight -> add each row's pairs

A pair's bits depend only on its row, its expert's weights, its weight and the card's kernel choice: not on the other
rows, on how many there are, on tiles, chunks, or whether a CUDA graph replays the launches (captured_ffn.py). There are
no atomics; each row's pairs are added in fp32 in ascending expert id.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from experts.kernels.block_quantized import ExpertStack
from experts.kernels.row_plan import PlanLayout, cut_rows, plan_rows
from experts.kernels.tile_table import KernelChoice, TileLine, WeightPath
from experts.kernels.triton_gemm import down_kernel, gate_up_kernel
from experts.kernels.triton_launch import count_blocks, launch
from experts.kernels.triton_quantize import quantize_rows, view_weight
from experts.kernels.triton_rows import combine_pairs_kernel

# Pairs of one launch, which bounds scratch memory: about 39 KB a pair at the published sizes, 320 MB in all. At 8,192
# pairs the products are bound by arithmetic, so reading the weights again for the next run of rows costs little.
MAX_PAIRS_PER_LAUNCH = 8192
_COMBINE_COLUMNS = 1024


class DevicePlan(NamedTuple):
    """A packed plan on the device: views of one int32 tensor, see PlanLayout and RowPlan."""

    layout: PlanLayout
    num_rows: torch.Tensor
    num_pairs: torch.Tensor
    tile_expert: torch.Tensor
    tile_first: torch.Tensor
    tile_rows: torch.Tensor
    slot_pair: torch.Tensor
    slot_row: torch.Tensor
    row_first: torch.Tensor
    pair_weights: torch.Tensor  # float32


def expert_ffn(
    hidden_states: torch.Tensor,
    pair_rows: np.ndarray,
    pair_experts: np.ndarray,
    pair_weights: np.ndarray,
    stack: ExpertStack,
    choice: KernelChoice,
    *,
    exact: bool,
) -> torch.Tensor:
    """Compute every (row, expert) pair and weight it.

    hidden_states: [num_rows, hidden] of any float dtype, on the stack's device. pair_rows, pair_experts: int32
    [num_pairs], sorted by row, then expert; every expert is in the stack. pair_weights: float32 [num_pairs].
    Returns float32 on the same device: [num_pairs, hidden] in pair order if exact, else each row's sum [num_rows,
    hidden]; zero for a row without pairs. A row that holds NaN or infinity gives NaN, and only that row does.
    """
    num_rows, num_pairs = hidden_states.shape[0], len(pair_rows)
    num_results = num_pairs if exact else num_rows
    results = torch.empty(num_results, stack.hidden_size, dtype=torch.float32, device=hidden_states.device)
    local_experts = np.searchsorted(stack.expert_ids, pair_experts)
    for first_row, end_row in cut_rows(pair_rows, num_rows, MAX_PAIRS_PER_LAUNCH):
        pairs = slice(*np.searchsorted(pair_rows, [first_row, end_row]).tolist())
        line = choose_tiles(choice, local_experts[pairs])
        plan = plan_rows(pair_rows[pairs] - first_row, local_experts[pairs], end_row - first_row, line.block_rows)
        layout = PlanLayout(end_row - first_row, len(plan.slot_pair), len(plan.tile_rows))
        packed = torch.from_numpy(layout.pack(plan, pair_weights[pairs]))
        # From pageable memory: the copy has left it when this returns, without waiting for the device's queue.
        device_plan = view_plan(layout, packed.to(hidden_states.device, non_blocking=True))
        out = results[pairs if exact else slice(first_row, end_row)]
        launch_ffn(hidden_states[first_row:end_row], device_plan, stack, choice, line, out, exact=exact)
    return results


def choose_tiles(choice: KernelChoice, local_experts: np.ndarray) -> TileLine:
    """Look up tiles for the mean number of rows of the experts that have any."""
    num_active = max(1, len(np.unique(local_experts)))
    return choice.choose_tiles(len(local_experts) / num_active)


def view_plan(layout: PlanLayout, packed: torch.Tensor) -> DevicePlan:
    """Name the sections of a packed plan; no copy. packed: int32 [layout.offsets[-1]]."""
    parts = [packed[start : start + length] for start, length in zip(layout.offsets, layout.lengths, strict=False)]
    return DevicePlan._make((layout, *parts[:-1], parts[-1].view(torch.float32)))


def launch_ffn(
    hidden_states: torch.Tensor,
    plan: DevicePlan,
    stack: ExpertStack,
    choice: KernelChoice,
    line: TileLine,
    out: torch.Tensor,
    *,
    exact: bool,
) -> None:
    """Launch the kernels for one plan. No value of the plan is read on the host, so a CUDA graph can capture it.

    hidden_states: [layout.num_rows, hidden], columns contiguous; rows the plan does not use may hold anything.
    out: float32 [layout.num_pairs if exact else layout.num_rows, hidden], contiguous: takes the result; pairs that the
    plan does not use are not written, rows become zero.
    """
    path, block = choice.path, stack.block
    hidden_size, inner_size, device = stack.hidden_size, stack.inner_size, stack.device
    layout = plan.layout
    weighted = out if exact else torch.empty(layout.num_pairs, hidden_size, dtype=torch.float32, device=device)
    x = quantize_rows(hidden_states.unsqueeze(1), path, block[1], count=plan.num_rows)
    if layout.num_tiles > 0:
        inner = torch.empty(layout.num_pairs, inner_size, dtype=torch.float32, device=device)
        by_bits = path is WeightPath.W8A16
        launch(
            gate_up_kernel,
            (layout.num_tiles, count_blocks(inner_size, line.gate_up.block_outputs)),
            x.values,
            x.scales,
            view_weight(stack.gate_up, path),
            stack.gate_up_scale,
            inner,
            plan.tile_expert,
            plan.tile_first,
            plan.tile_rows,
            plan.slot_row,
            hidden_size,
            inner_size,
            stack.gate_up_scale.shape[2],
            stack.num_inner_scale_rows,
            BY_BITS=by_bits,
            GROUP_N=block[0],
            BLOCK_M=line.gate_up.block_rows,
            BLOCK_N=line.gate_up.block_outputs,
            BLOCK_K=block[1],
            **line.gate_up.launch_options,
        )
        activated = quantize_rows(inner.unsqueeze(1), path, block[1], count=plan.num_pairs)
        launch(
            down_kernel,
            (layout.num_tiles, count_blocks(hidden_size, line.down.block_outputs)),
            activated.values,
            activated.scales,
            view_weight(stack.down, path),
            stack.down_scale,
            weighted,
            plan.tile_expert,
            plan.tile_first,
            plan.tile_rows,
            plan.slot_pair,
            plan.pair_weights,
            hidden_size,
            inner_size,
            stack.down_scale.shape[2],
            stack.down_scale.shape[1],
            BY_BITS=by_bits,
            GROUP_N=block[0],
            BLOCK_M=line.down.block_rows,
            BLOCK_N=line.down.block_outputs,
            BLOCK_K=block[1],
            **line.down.launch_options,
        )
    if not exact:
        launch(
            combine_pairs_kernel,
            (layout.num_rows, count_blocks(hidden_size, _COMBINE_COLUMNS)),
            weighted,
            plan.row_first,
            out,
            hidden_size,
            BLOCK=_COMBINE_COLUMNS,
        )
