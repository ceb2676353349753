"""The seam between an expert group and what computes for it: how weights are kept, and one layer's call.

The native CPU kernel keeps weights as the checkpoint has them, FP8 as FP8. Where it cannot be built, or the weights are
of a kind that it does not take, torch computes with weights expanded to the compute dtype. One kernel serves a process;
its numerics_id names it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch

from experts.kernels import cpu_ffn, grouped
from experts.kernels.cpu_ffn import ScaledWeight
from experts.quantization import dequantize_block

logger = logging.getLogger(__name__)


class ExpertKernel(Protocol):
    """Packs experts at load and computes a layer's pairs. Packed experts and layers are opaque to callers."""

    @property
    def numerics_id(self) -> str: ...

    def count_bytes(self, num_experts: int, hidden_size: int, inner: int, weight_dtype: torch.dtype) -> int:
        """What that many packed experts take in memory."""
        ...

    def reserve(self, num_experts: int, hidden_size: int, inner: int, weight_dtype: torch.dtype) -> Any:
        """Make room for that many experts of one shape and stored dtype; handed to pack_expert."""
        ...

    def pack_expert(self, gate: ScaledWeight, up: ScaledWeight, down: ScaledWeight, room: Any) -> Any:
        """gate, up: [inner, hidden]; down: [hidden, inner], as stored."""
        ...

    def build_layer(self, experts: Mapping[int, Any]) -> Mapping[int, Any]:
        """Packed experts by id, ready for expert_ffn."""
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
        """As kernels.grouped.expert_ffn: float32 [num_pairs, hidden] if exact, else [num_rows, hidden]."""
        ...


def choose_expert_kernel(dtype: torch.dtype, weight_dtypes: set[torch.dtype], block: tuple[int, int]) -> ExpertKernel:
    """The native kernel where it is to be had and takes such weights, else torch; the log says which and why.

    It computes with as many threads as torch is set to. dtype: to compute in, bfloat16 or float32.
    weight_dtypes: as stored; block: of their scales.
    """
    native = cpu_ffn.load_cpu_kernel(dtype)
    if native is not None:
        if len(weight_dtypes) == 1 and all(cpu_ffn.can_pack(stored, block) for stored in weight_dtypes):
            native.set_num_threads_(torch.get_num_threads())
            return NativeKernel(native)
        logger.warning(
            "experts are expanded for torch: the CPU kernel takes no weights of %s in blocks of %s",
            weight_dtypes,
            block,
        )
    return TorchKernel(dtype)


class NativeKernel:
    """kernels.cpu_ffn: rows do not depend on their neighbours, nor on the number of threads."""

    def __init__(self, kernel: cpu_ffn.CpuKernel) -> None:
        self._kernel = kernel

    @property
    def numerics_id(self) -> str:
        return self._kernel.numerics_id

    def count_bytes(self, num_experts: int, hidden_size: int, inner: int, weight_dtype: torch.dtype) -> int:
        gate_up = cpu_ffn.packed_size((inner, hidden_size), weight_dtype, paired=True)
        return num_experts * (gate_up + cpu_ffn.packed_size((hidden_size, inner), weight_dtype))

    def reserve(self, num_experts: int, hidden_size: int, inner: int, weight_dtype: torch.dtype) -> cpu_ffn.WeightArena:
        return cpu_ffn.WeightArena(self.count_bytes(num_experts, hidden_size, inner, weight_dtype))

    def pack_expert(
        self, gate: ScaledWeight, up: ScaledWeight, down: ScaledWeight, room: cpu_ffn.WeightArena
    ) -> cpu_ffn.PackedExpert:
        return self._kernel.pack_expert(gate, up, down, room)

    def build_layer(self, experts: Mapping[int, cpu_ffn.PackedExpert]) -> cpu_ffn.PackedLayer:
        return cpu_ffn.PackedLayer(experts)

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
        return self._kernel.expert_ffn(hidden_states, pair_rows, pair_experts, pair_weights, layer, exact=exact)


class TorchKernel:
    """kernels.grouped on weights expanded to the compute dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    @property
    def numerics_id(self) -> str:
        """Products of float32 differ in their last bits with the number of threads, so it is part of the id."""
        capability = torch.backends.cpu.get_cpu_capability()
        name = str(self._dtype).removeprefix("torch.")
        return f"cpu-{capability}/{name}/grouped/torch-{torch.__version__}/threads-{torch.get_num_threads()}"

    def count_bytes(self, num_experts: int, hidden_size: int, inner: int, weight_dtype: torch.dtype) -> int:
        return num_experts * 3 * hidden_size * inner * self._dtype.itemsize

    def reserve(self, num_experts: int, hidden_size: int, inner: int, weight_dtype: torch.dtype) -> None:
        return None

    def pack_expert(
        self, gate: ScaledWeight, up: ScaledWeight, down: ScaledWeight, room: None
    ) -> grouped.ExpertMatrices:
        inner = gate.weight.shape[0]
        gate_up = torch.empty(2 * inner, gate.weight.shape[1], dtype=self._dtype)
        gate_up[:inner] = _expand(gate)
        gate_up[inner:] = _expand(up)
        return grouped.ExpertMatrices(gate_up, _expand(down).to(self._dtype).contiguous())

    def build_layer(self, experts: Mapping[int, grouped.ExpertMatrices]) -> Mapping[int, grouped.ExpertMatrices]:
        return experts

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


def _expand(weight: ScaledWeight) -> torch.Tensor:
    if weight.scale_inv is None:
        return weight.weight
    return dequantize_block(weight.weight, weight.scale_inv, weight.block)
