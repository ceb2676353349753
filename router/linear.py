"""The router's matrix products, behind one seam: the native CPU kernel where it is to be had, else torch.

The native kernel keeps FP8 matrices as FP8 and gives a row the same bits whatever rows stand beside it. torch
multiplies matrices expanded to the compute dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from experts.device import CPU
from experts.kernels import cpu_ffn
from experts.kernels.cpu_ffn import ScaledWeight
from experts.kernels.tile_table import choose_kernels
from experts.quantization import dequantize_block


class Linear(Protocol):
    """x [..., in] -> [..., out]."""

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """out_dtype: float32 asks for the accumulated sums unrounded; None: x's dtype."""
        ...


class Mlp(Protocol):
    """down(silu(gate(x)) * up(x)), x [num_rows, hidden_size] -> the same shape, float32."""

    def __call__(self, x: Tensor) -> Tensor: ...


class PerHead(Protocol):
    """x [num_rows, num_heads, in] -> [num_rows, num_heads, out], each head with a matrix of its own."""

    def __call__(self, x: Tensor) -> Tensor: ...


class LinearFactory(Protocol):
    """Turns stored weights into products."""

    def linear(self, *weights: ScaledWeight) -> Linear:
        """One product for matrices with the same input: their outputs side by side."""
        ...

    def gate(self, weight: Tensor) -> Linear:
        """The gate's matrix, float32: it computes in float32 whatever the others do."""
        ...

    def mlp(self, gate: ScaledWeight, up: ScaledWeight, down: ScaledWeight) -> Mlp: ...

    def per_head(self, weight: ScaledWeight, num_heads: int, split: int) -> tuple[PerHead, PerHead]:
        """weight: [num_heads * rows, columns], rows of a head together. Of each head, the first `split` rows become a
        product split -> columns (theirs transposed), the others one columns -> rows - split."""
        ...


def choose_linear_factory(dtype: torch.dtype, device: torch.device = CPU, *, expands: bool = False) -> LinearFactory:
    """The native kernel with as many threads as torch is set to, else torch; on a card the Triton kernels and torch.

    dtype: to compute in. expands: see NativeFactory.
    """
    if device.type == "cuda":
        # Triton has no build for some platforms, and takes a second to import.
        from router.device_linear import DeviceFactory

        return DeviceFactory(device, choose_kernels(torch.cuda.get_device_capability(device)), dtype)
    kernel = cpu_ffn.load_cpu_kernel(dtype)
    if kernel is None:
        return TorchFactory(dtype)
    kernel.set_num_threads_(torch.get_num_threads())
    return NativeFactory(kernel, TorchFactory(dtype), expands=expands)


class TorchFactory:
    """Matrices expanded to the compute dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def linear(self, *weights: ScaledWeight) -> Linear:
        return _TorchLinear(torch.cat([expand(weight).to(self._dtype) for weight in weights]))

    def gate(self, weight: Tensor) -> Linear:
        return _TorchLinear(weight)

    def mlp(self, gate: ScaledWeight, up: ScaledWeight, down: ScaledWeight) -> Mlp:
        return _TorchMlp(self.linear(gate, up), self.linear(down))

    def per_head(self, weight: ScaledWeight, num_heads: int, split: int) -> tuple[PerHead, PerHead]:
        heads = expand(weight).to(self._dtype).unflatten(0, (num_heads, -1))  # [num_heads, rows, columns]
        return TorchPerHead(heads[:, :split].contiguous()), TorchPerHead(heads[:, split:].mT.contiguous())


class NativeFactory:
    """Packed matrices. What the kernel does not take (FP16, odd scale blocks) goes to torch."""

    def __init__(self, kernel: cpu_ffn.CpuKernel, fallback: TorchFactory, *, expands: bool = False) -> None:
        """expands: keys and values of long chunks of a prompt may be expanded, which takes w_uk a second time."""
        self._expands = expands
        self._kernel = kernel
        self._fallback = fallback

    def linear(self, *weights: ScaledWeight) -> Linear:
        if not all(cpu_ffn.can_pack(weight.weight.dtype, weight.block) for weight in weights):
            return self._fallback.linear(*weights)
        return NativeLinear(self._kernel, [self._kernel.pack_linear(weight) for weight in weights])

    def gate(self, weight: Tensor) -> Linear:
        return NativeLinear(self._kernel, [self._kernel.pack_linear(ScaledWeight(weight))])

    def mlp(self, gate: ScaledWeight, up: ScaledWeight, down: ScaledWeight) -> Mlp:
        if not all(cpu_ffn.can_pack(weight.weight.dtype, weight.block) for weight in (gate, up, down)):
            return self._fallback.mlp(gate, up, down)
        return NativeMlp(self._kernel, cpu_ffn.PackedLayer({0: self._kernel.pack_expert(gate, up, down)}))

    def per_head(self, weight: ScaledWeight, num_heads: int, split: int) -> tuple[PerHead, PerHead]:
        parts = _cut_heads(weight, num_heads, split)
        if parts is None or not all(cpu_ffn.can_pack(part.weight.dtype, part.block) for half in parts for part in half):
            parts = _cut_heads(ScaledWeight(expand(weight).to(self._kernel.dtype)), num_heads, split)
            assert parts is not None
        first, second = parts
        reverse = self._kernel.pack_side_by_side([_transpose(part) for part in first]) if self._expands else ()
        return (
            NativePerHead(self._kernel, self._kernel.pack_side_by_side(first), reverse),
            NativePerHead(self._kernel, self._kernel.pack_side_by_side(second)),
        )


def expand(weight: ScaledWeight) -> Tensor:
    """[out, in] without scales: float32 if it was FP8, else as stored."""
    if weight.scale_inv is None:
        return weight.weight
    return dequantize_block(weight.weight, weight.scale_inv, weight.block)


def _cut_heads(
    weight: ScaledWeight, num_heads: int, split: int
) -> tuple[list[ScaledWeight], list[ScaledWeight]] | None:
    """Each head's first rows transposed, and its others as they are; None if a block of scales spans two parts."""
    rows = weight.weight.shape[0] // num_heads
    block_rows = weight.block[0]
    if weight.scale_inv is not None and (rows % block_rows or split % block_rows):
        return None
    first: list[ScaledWeight] = []
    second: list[ScaledWeight] = []
    for start in range(0, num_heads * rows, rows):
        upper, lower = weight.weight[start : start + split], weight.weight[start + split : start + rows]
        if weight.scale_inv is None:
            first.append(_transpose(ScaledWeight(upper)))
            second.append(ScaledWeight(lower))
            continue
        scales = weight.scale_inv[start // block_rows : (start + rows) // block_rows]
        upper_scales, lower_scales = scales[: split // block_rows], scales[split // block_rows :]
        first.append(_transpose(ScaledWeight(upper, upper_scales, weight.block)))
        second.append(ScaledWeight(lower, lower_scales, weight.block))
    return first, second


def _transpose(weight: ScaledWeight) -> ScaledWeight:
    if weight.scale_inv is None:
        return ScaledWeight(weight.weight.T.contiguous())
    rows, columns = weight.block
    return ScaledWeight(weight.weight.T.contiguous(), weight.scale_inv.T.contiguous(), (columns, rows))


@dataclass(frozen=True)
class _TorchLinear:
    weight: Tensor

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        return functional.linear(x, self.weight).to(out_dtype or x.dtype)


@dataclass(frozen=True)
class _TorchMlp:
    gate_up: Linear
    down: Linear

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(functional.silu(gate) * up).float()


@dataclass(frozen=True)
class TorchPerHead:
    """weight: [num_heads, in, out]."""

    weight: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return torch.bmm(x.transpose(0, 1), self.weight).transpose(0, 1).contiguous()


@dataclass(frozen=True)
class NativePerHead:
    """reverse: the same matrices, from outputs to inputs; empty where nobody expands (cpu_layer.py)."""

    kernel: cpu_ffn.CpuKernel
    matrices: list[cpu_ffn.PackedMatrix]
    reverse: Sequence[cpu_ffn.PackedMatrix] = ()

    def __call__(self, x: Tensor) -> Tensor:
        heads = [self.kernel.linear(x[:, head], matrix) for head, matrix in enumerate(self.matrices)]
        return torch.stack(heads, dim=1)


@dataclass(frozen=True)
class NativeLinear:
    kernel: cpu_ffn.CpuKernel
    matrices: list[cpu_ffn.PackedMatrix]

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        if len(self.matrices) == 1:
            return self.kernel.linear(x, self.matrices[0], out_dtype)
        return torch.cat([self.kernel.linear(x, matrix, out_dtype) for matrix in self.matrices], dim=-1)


@dataclass(frozen=True)
class NativeMlp:
    """A dense MLP or a shared expert is a layer with one expert that every row chooses with weight 1."""

    kernel: cpu_ffn.CpuKernel
    layer: cpu_ffn.PackedLayer

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernel.mlp(x, self.layer)
