"""The seam between an expert group and what computes for it: how weights are kept, and one layer's call.

The native CPU kernel and the Triton kernels keep weights as the checkpoint has them, FP8 as FP8. Where neither can be
had, or the weights are of a kind that they do not take, torch computes with weights expanded to the compute dtype. One
kernel, on one device, serves a process; its numerics_id names it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch

from experts.device import CPU
from experts.kernels import cpu_ffn, grouped
from experts.kernels.block_quantized import check_block
from experts.kernels.cpu_ffn import ScaledWeight
from experts.kernels.tile_table import choose_kernels
from experts.quantization import dequantize_block

logger = logging.getLogger(__name__)


class ExpertKernel(Protocol):
    """Packs experts at load and computes a layer's pairs. Packed experts and layers are opaque to callers.

    device: where packed experts lie, and where hidden states are taken and results left.
    """

    @property
    def device(self) -> torch.device: ...

    @property
    def numerics_id(self) -> str: ...

    def count_bytes(self, num_experts: int, hidden_size: int, inner: int, weight_dtype: torch.dtype) -> int:
        """What that many packed experts take in the device's memory."""
        ...

    def count_working_bytes(self, hidden_size: int, inner: int) -> int:
        """What packing one expert, or the largest call, takes there besides."""
        ...

    def reserve(self, num_experts: int, hidden_size: int, inner: int, weight_dtype: torch.dtype) -> Any:
        """Make room for that many experts of one shape and stored dtype; handed to pack_expert."""
        ...

    def pack_expert(self, gate: ScaledWeight, up: ScaledWeight, down: ScaledWeight, room: Any) -> Any:
        """gate, up: [inner, hidden]; down: [hidden, inner], as stored, in host memory that is used again afterwards.

        From pinned memory a card's copies may still be under way on the current stream when this returns.
        """
        ...

    def build_layer(self, experts: Mapping[int, Any], *, is_serving: bool = False) -> Mapping[int, Any]:
        """Packed experts by id, ready for expert_ffn. is_serving: others are computed with meanwhile."""
        ...

    @property
    def needs_whole_layers(self) -> bool:
        """Whether a layer's experts must be packed into one room, one after the other."""
        ...

    def adopt_expert(self, packed: Any, room: Any) -> Any:
        """An expert that is packed already, for a layer that is built anew; copied into room if layers are packed
        whole."""
        ...

    def expert_ffn(
        self,
        hidden_states: torch.Tensor,
        pair_rows: np.ndarray,
        pair_experts: np.ndarray,
        pair_weights: np.ndarray,
        layer: Any,
        *,
        exact: bool,
    ) -> torch.Tensor:
        """As kernels.grouped.expert_ffn: float32 [num_pairs, hidden] if exact, else [num_rows, hidden].

        The result may be memory that the next call overwrites.
        """
        ...


def choose_expert_kernel(
    dtype: torch.dtype,
    weight_dtypes: set[torch.dtype],
    block: tuple[int, int],
    device: torch.device = CPU,
) -> ExpertKernel:
    """The best kernel of the device that takes such weights, else torch; the log says which and why.

    dtype: to compute in, bfloat16 or float32. weight_dtypes: as stored; block: of their scales. On the CPU it computes
    with as many threads as torch is set to. On a card, FP8 weights are multiplied by the Triton kernels in the weight
    path that the card has (tile_table.choose_kernels); float32 is for comparing and gets torch's float32 products.
    """
    stored = next(iter(weight_dtypes)) if len(weight_dtypes) == 1 else None
    if device.type == "cuda":
        return _choose_cuda_kernel(dtype, stored, block, device)
    native = cpu_ffn.load_cpu_kernel(dtype)
    if native is not None:
        if stored is not None and cpu_ffn.can_pack(stored, block):
            native.set_num_threads_(torch.get_num_threads())
            return NativeKernel(native)
        logger.warning(
            "experts are expanded for torch: the CPU kernel takes no weights of %s in blocks of %s",
            weight_dtypes,
            block,
        )
    return TorchKernel(dtype)


def _choose_cuda_kernel(
    dtype: torch.dtype, stored: torch.dtype | None, block: tuple[int, int], device: torch.device
) -> ExpertKernel:
    # Triton has no build for some platforms, and takes a second to import.
    from experts.kernels.triton_kernel import TritonKernel

    try:
        check_block(block)
        fits = stored == torch.float8_e4m3fn and dtype == torch.bfloat16
    except ValueError:
        fits = False
    if fits:
        choice = choose_kernels(torch.cuda.get_device_capability(device))
        return TritonKernel(device, choice, dtype, block, use_graphs=True)
    logger.warning(
        "experts are expanded to %s for torch on %s: the Triton kernels take FP8 weights and bfloat16 rows, "
        "not %s in blocks of %s",
        dtype,
        device,
        stored,
        block,
    )
    return TorchKernel(dtype, device)


class NativeKernel:
    """kernels.cpu_ffn: rows do not depend on their neighbours, nor on the number of threads."""

    def __init__(self, kernel: cpu_ffn.CpuKernel) -> None:
        self.kernel = kernel
        self.device = CPU

    @property
    def numerics_id(self) -> str:
        return self.kernel.numerics_id

    def count_bytes(self, num_experts: int, hidden_size: int, inner: int, weight_dtype: torch.dtype) -> int:
        gate_up = cpu_ffn.packed_size((inner, hidden_size), weight_dtype, paired=True)
        return num_experts * (gate_up + cpu_ffn.packed_size((hidden_size, inner), weight_dtype))

    def count_working_bytes(self, hidden_size: int, inner: int) -> int:
        return _count_fp32_bytes(hidden_size, inner)

    def reserve(self, num_experts: int, hidden_size: int, inner: int, weight_dtype: torch.dtype) -> cpu_ffn.WeightArena:
        return cpu_ffn.WeightArena(self.count_bytes(num_experts, hidden_size, inner, weight_dtype))

    def pack_expert(
        self, gate: ScaledWeight, up: ScaledWeight, down: ScaledWeight, room: cpu_ffn.WeightArena
    ) -> cpu_ffn.PackedExpert:
        expert = self.kernel.pack_expert(gate, up, down, room)
        # An arena holds many experts, and one that leaves the group shall not keep its memory.
        for matrix in expert:
            room.discard_with(matrix)
        return expert

    def build_layer(
        self, experts: Mapping[int, cpu_ffn.PackedExpert], *, is_serving: bool = False
    ) -> cpu_ffn.PackedLayer:
        return cpu_ffn.PackedLayer(experts)

    @property
    def needs_whole_layers(self) -> bool:
        return False

    def adopt_expert(self, packed: cpu_ffn.PackedExpert, room: cpu_ffn.WeightArena) -> cpu_ffn.PackedExpert:
        return packed

    def expert_ffn(
        self,
        hidden_states: torch.Tensor,
        pair_rows: np.ndarray,
        pair_experts: np.ndarray,
        pair_weights: np.ndarray,
        layer: cpu_ffn.PackedLayer,
        *,
        exact: bool,
    ) -> torch.Tensor:
        return self.kernel.expert_ffn(hidden_states, pair_rows, pair_experts, pair_weights, layer, exact=exact)


class TorchKernel:
    """kernels.grouped on weights expanded to the compute dtype."""

    def __init__(self, dtype: torch.dtype, device: torch.device = CPU) -> None:
        self._dtype = dtype
        self.device = device

    @property
    def numerics_id(self) -> str:
        """Products of float32 differ in their last bits with the number of threads, so it is part of the id."""
        name = str(self._dtype).removeprefix("torch.")
        if self.device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(self.device)
            return f"cuda-sm{major}{minor}/{name}/grouped/torch-{torch.__version__}"
        capability = torch.backends.cpu.get_cpu_capability()
        return f"cpu-{capability}/{name}/grouped/torch-{torch.__version__}/threads-{torch.get_num_threads()}"

    def count_bytes(self, num_experts: int, hidden_size: int, inner: int, weight_dtype: torch.dtype) -> int:
        return num_experts * 3 * hidden_size * inner * self._dtype.itemsize

    def count_working_bytes(self, hidden_size: int, inner: int) -> int:
        return _count_fp32_bytes(hidden_size, inner)

    def reserve(self, num_experts: int, hidden_size: int, inner: int, weight_dtype: torch.dtype) -> None:
        return None

    def pack_expert(
        self, gate: ScaledWeight, up: ScaledWeight, down: ScaledWeight, room: None
    ) -> grouped.ExpertMatrices:
        inner, hidden_size = gate.weight.shape
        gate_up = torch.empty(2 * inner, hidden_size, dtype=self._dtype, device=self.device)
        gate_up[:inner] = _expand(gate, self.device)
        gate_up[inner:] = _expand(up, self.device)
        own_down = torch.empty(hidden_size, inner, dtype=self._dtype, device=self.device)
        return grouped.ExpertMatrices(gate_up, own_down.copy_(_expand(down, self.device)))

    def build_layer(
        self, experts: Mapping[int, grouped.ExpertMatrices], *, is_serving: bool = False
    ) -> Mapping[int, grouped.ExpertMatrices]:
        return experts

    @property
    def needs_whole_layers(self) -> bool:
        return False

    def adopt_expert(self, packed: grouped.ExpertMatrices, room: None) -> grouped.ExpertMatrices:
        return packed

    def expert_ffn(
        self,
        hidden_states: torch.Tensor,
        pair_rows: np.ndarray,
        pair_experts: np.ndarray,
        pair_weights: np.ndarray,
        layer: Mapping[int, grouped.ExpertMatrices],
        *,
        exact: bool,
    ) -> torch.Tensor:
        return grouped.expert_ffn(hidden_states, pair_rows, pair_experts, pair_weights, layer, exact=exact)


def _expand(weight: ScaledWeight, device: torch.device) -> torch.Tensor:
    if weight.scale_inv is None:
        return weight.weight.to(device)
    return dequantize_block(weight.weight.to(device), weight.scale_inv.to(device), weight.block)


def _count_fp32_bytes(hidden_size: int, inner: int) -> int:
    """One expert in float32, which expanding it may take."""
    return 3 * hidden_size * inner * torch.float32.itemsize
