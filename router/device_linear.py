"""The router's products on a card: FP8 matrices stay FP8 through the Triton kernels, the rest is torch's.

Expanded to bf16 the router of DeepSeek-V3 takes 34 GB, as stored 19.1: only the latter fits a card of 24 GB, together
with the latent cache once the embedding stays in host memory (tests/router/test_device_memory.py has the sum).
Nothing here needs a card: under Triton's interpreter it runs on the CPU, and on torch's meta device it allocates as on
a card, which is how its memory is tested.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from experts.kernels.block_quantized import BlockScaledMatrix, check_block
from experts.kernels.cpu_ffn import ScaledWeight
from experts.kernels.tile_table import KernelChoice
from experts.kernels.triton_linear import HeadRows, block_scaled_linear, head_linear
from experts.quantization import dequantize_block
from router.linear import Linear, Mlp, PerHead


class DeviceFactory:
    """router.linear.LinearFactory for one card. Weights come in host memory, one at a time, and leave it at once."""

    def __init__(self, device: torch.device, choice: KernelChoice, dtype: torch.dtype) -> None:
        """dtype: to compute in. FP8 matrices stay so in bfloat16; float32 is for comparing and expands them."""
        self.device = device
        self._choice = choice
        self._dtype = dtype

    def linear(self, *weights: ScaledWeight) -> Linear:
        if all(self._stays_fp8(weight) for weight in weights):
            return Fp8Linear([self._place_fp8(weight) for weight in weights], self._choice)
        return DenseLinear(torch.cat([self._expand(weight).to(self._dtype) for weight in weights]))

    def gate(self, weight: Tensor) -> Linear:
        return DenseLinear(weight.to(self.device))

    def mlp(self, gate: ScaledWeight, up: ScaledWeight, down: ScaledWeight) -> Mlp:
        return DeviceMlp(self.linear(gate, up), self.linear(down))

    def per_head(self, weight: ScaledWeight, num_heads: int, split: int) -> tuple[PerHead, PerHead]:
        """Both products read the one stored matrix."""
        rows = weight.weight.shape[0] // num_heads
        if self._stays_fp8(weight) and weight.block[0] in (32, 64, 128):
            matrix = self._place_fp8(weight)
            return (
                Fp8PerHead(matrix, HeadRows(num_heads, rows, 0, split), self._choice, transposed=True),
                Fp8PerHead(matrix, HeadRows(num_heads, rows, split, rows - split), self._choice, transposed=False),
            )
        heads = self._expand(weight).to(self._dtype).unflatten(0, (num_heads, rows))  # [num_heads, rows, columns]
        return DensePerHead(heads[:, :split]), DensePerHead(heads[:, split:].mT)

    def _stays_fp8(self, weight: ScaledWeight) -> bool:
        if weight.scale_inv is None or self._dtype != torch.bfloat16:
            return False
        try:
            check_block(weight.block)
        except ValueError:
            return False
        return True

    def _place_fp8(self, weight: ScaledWeight) -> BlockScaledMatrix:
        assert weight.scale_inv is not None
        return BlockScaledMatrix.from_fp8(weight.weight, weight.scale_inv, weight.block, self.device)

    def _expand(self, weight: ScaledWeight) -> Tensor:
        if weight.scale_inv is None:
            return weight.weight.to(self.device)
        return dequantize_block(weight.weight.to(self.device), weight.scale_inv.to(self.device), weight.block)


@dataclass(frozen=True)
class Fp8Linear:
    """Outputs of the matrices side by side."""

    matrices: list[BlockScaledMatrix]
    choice: KernelChoice

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        parts = [block_scaled_linear(rows, matrix, self.choice, out_dtype) for matrix in self.matrices]
        result = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return result.view(*x.shape[:-1], result.shape[-1])


@dataclass(frozen=True)
class Fp8PerHead:
    matrix: BlockScaledMatrix
    heads: HeadRows
    choice: KernelChoice
    transposed: bool

    def __call__(self, x: Tensor) -> Tensor:
        return head_linear(x, self.matrix, self.heads, self.choice, transposed=self.transposed)


@dataclass(frozen=True)
class DenseLinear:
    """weight: [out, in]."""

    weight: Tensor

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        wanted = out_dtype or x.dtype
        x = x.to(self.weight.dtype)
        if wanted == torch.float32 and wanted != x.dtype and x.is_cuda and x.dim() == 2:
            # The accumulated sums, without a float32 copy of the weight.
            return torch.mm(x, self.weight.t(), out_dtype=torch.float32)
        return functional.linear(x, self.weight).to(wanted)


@dataclass(frozen=True)
class DensePerHead:
    """weight: [num_heads, in, out]."""

    weight: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return torch.bmm(x.transpose(0, 1), self.weight).transpose(0, 1).contiguous()


@dataclass(frozen=True)
class DeviceMlp:
    gate_up: Linear
    down: Linear

    def __call__(self, x: Tensor) -> Tensor:
        # Float32 between the products, as the experts' kernel has it: FP8 matrices scale it to their own range.
        gate, up = self.gate_up(x, torch.float32).chunk(2, dim=-1)
        return self.down(functional.silu(gate).mul_(up), torch.float32)
