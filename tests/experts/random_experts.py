"""Random FP8 experts and frames for the kernels' tests, on any device, and the judge's answer to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import silu

from experts.kernels.block_quantized import ExpertStack
from experts.kernels.tile_table import WeightPath
from experts.quantization import FP8_MAX, quantize_block
from tests.experts.reference import dequantize_reference, expert_ffn_reference

Matrices = dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class RandomExperts:
    """stack: what the kernel reads. matrices: expert id -> gate, up, down in float32, on the stack's device."""

    stack: ExpertStack
    matrices: Matrices

    @property
    def block_columns(self) -> int:
        return self.stack.block[1]


class Frame(NamedTuple):
    """hidden_states: [num_rows, hidden]; pair_rows, pair_experts: int32; pair_weights: float32, [num_pairs]."""

    hidden_states: torch.Tensor
    pair_rows: np.ndarray
    pair_experts: np.ndarray
    pair_weights: np.ndarray


def make_experts(
    expert_ids: list[int],
    hidden_size: int,
    inner_size: int,
    block: tuple[int, int] = (128, 128),
    device: torch.device | str = "cpu",
) -> RandomExperts:
    """Scaled so that activations neither grow nor shrink from layer to layer."""
    generator = torch.Generator(device).manual_seed(0)
    stack = ExpertStack.allocate(np.array(expert_ids), hidden_size, inner_size, block, device)
    matrices: Matrices = {}
    for expert_id in expert_ids:
        dequantized: list[torch.Tensor] = []
        for projection in ("gate_proj", "up_proj", "down_proj"):
            rows, columns = (hidden_size, inner_size) if projection == "down_proj" else (inner_size, hidden_size)
            weight = torch.randn(rows, columns, generator=generator, device=device) * columns**-0.5
            quantized, scale_inv = quantize_block(weight.cpu(), block)
            stack.put_(expert_id, projection, quantized, scale_inv)
            dequantized.append(dequantize_reference(quantized, scale_inv, block).to(device))
        gate, up, down = dequantized
        matrices[expert_id] = (gate, up, down)
    return RandomExperts(stack, matrices)


def make_frame(experts: RandomExperts, rows_of: dict[int, list[int]], num_rows: int, seed: int = 0) -> Frame:
    """A frame whose expert e has the rows rows_of[e]."""
    stack = experts.stack
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(num_rows, stack.hidden_size, generator=generator).to(stack.device)
    pairs = sorted((row, expert) for expert, rows in rows_of.items() for row in rows)
    return Frame(
        hidden_states,
        np.array([row for row, _ in pairs], dtype=np.int32),
        np.array([expert for _, expert in pairs], dtype=np.int32),
        np.random.default_rng(seed).uniform(0.1, 1.0, len(pairs)).astype(np.float32),
    )


def compute_expected(experts: RandomExperts, frame: Frame, path: WeightPath, *, exact: bool) -> torch.Tensor:
    """The judge's answer in float32: for W8A16 the reference, for W8A8 the same with rounded activations."""
    x, pair_rows, pair_experts, pair_weights = frame
    if path is WeightPath.W8A16:
        weighted = expert_ffn_reference(
            x,
            torch.from_numpy(pair_rows),
            torch.from_numpy(pair_experts),
            torch.from_numpy(pair_weights),
            experts.matrices,
            exact=True,
        )
    else:
        weighted = torch.zeros(len(pair_rows), x.shape[1])
        quantized = round_activations(x.to(torch.float32), experts.block_columns)
        for pair, (row, expert, weight) in enumerate(
            zip(pair_rows.tolist(), pair_experts.tolist(), pair_weights.tolist(), strict=True)
        ):
            gate, up, down = experts.matrices[expert]
            inner = silu(gate @ quantized[row]) * (up @ quantized[row])
            weighted[pair] = (down @ round_activations(inner.unsqueeze(0), experts.block_columns)[0]) * weight
    if exact:
        return weighted.to(x.device)
    result = torch.zeros(x.shape).index_add_(0, torch.from_numpy(pair_rows).long(), weighted)
    return result.to(x.device)


def round_activations(x: torch.Tensor, block: int) -> torch.Tensor:
    """Quantise per row and block of columns to e4m3 as published (s = max(amax, 1e-4) / 448), and back.

    x: float32 [num_rows, num_columns]; the last block may be partial.
    """
    num_rows, num_columns = x.shape
    padded = torch.nn.functional.pad(x, (0, -num_columns % block)).view(num_rows, -1, block)
    scales = padded.abs().amax(dim=2, keepdim=True).clamp_min(1e-4) / FP8_MAX
    rounded = (padded / scales).to(torch.float8_e4m3fn).to(torch.float32) * scales
    return rounded.view(num_rows, -1)[:, :num_columns]


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """max |result - expected| / max |expected|."""
    return ((result.to(torch.float32) - expected).abs().max() / expected.abs().max()).item()
