"""A decoder layer up to its experts or MLP, as one call of the CPU kernel (cpu/layer.h).

Attention reads the paged latent cache in place. Like every product of the kernel, a row's result depends on that row
and its context alone: prefill, decode, chunks and batches give the same bits (but see CpuLayerWeights.w_k).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from experts.kernels.cpu_ffn import CpuKernel, PackedMatrix, describe_matrices
from experts.model_config import ModelConfig

# Values of a cache row, and tokens of a cache block, that the kernel is compiled for (cpu/rows.h).
MAX_WIDTH = 2048
BLOCK_SIZE = 32

_INTEGERS: Final = (
    *("family", "arithmetic"),
    *("hidden_size", "num_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("num_experts", "top_k", "n_group", "topk_group", "sigmoid", "group_by_two", "normalize"),
)
_FLOATS: Final = ("routed_scaling_factor", "eps", "softmax_scale")
_ADDRESSES: Final = (
    *("input_norm", "q_a_norm", "kv_a_norm", "post_norm", "rotations", "gate_bias"),
    *("q_a", "kv_a", "q_b", "w_uk", "w_uv", "w_k", "o_proj", "gate", "cache"),
)


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in _INTEGERS),
        *((name, ctypes.c_float) for name in _FLOATS),
        *((name, ctypes.c_void_p) for name in _ADDRESSES),
    )


class _LayerStep(ctypes.Structure):
    _fields_ = (
        ("num_tokens", ctypes.c_int32),
        ("num_segments", ctypes.c_int32),
        ("max_blocks", ctypes.c_int32),
        ("cache_only", ctypes.c_int32),
        ("positions", ctypes.c_void_p),
        ("slot_mapping", ctypes.c_void_p),
        ("segment_starts", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
        ("normed", ctypes.c_void_p),
        ("topk_ids", ctypes.c_void_p),
        ("topk_weights", ctypes.c_void_p),
        ("times_ns", ctypes.c_int64 * 2),
    )


@dataclass(frozen=True)
class CpuLayerWeights:
    """Norms are float32. q_a: q_proj without q_lora_rank, and then q_b and q_a_norm are None.

    w_uk, w_uv: one matrix for each head, qk_nope_head_dim -> kv_lora_rank and kv_lora_rank -> v_head_dim.
    w_k: w_uk the other way round; with it, long chunks of a prompt expand keys and values, and a row's last bits depend
        on its chunk. Empty: attention is always absorbed.
    gate: float32, or None in a dense layer.
    """

    input_norm: Tensor
    q_a: PackedMatrix
    kv_a: PackedMatrix
    q_a_norm: Tensor | None
    q_b: PackedMatrix | None
    kv_a_norm: Tensor
    w_uk: Sequence[PackedMatrix]
    w_uv: Sequence[PackedMatrix]
    w_k: Sequence[PackedMatrix]
    o_proj: PackedMatrix
    post_norm: Tensor
    gate: PackedMatrix | None
    gate_bias: Tensor | None


class CpuStep:
    """The rows of one step on their way through the layers; one object serves all layers, one after the other."""

    def __init__(
        self,
        hidden_states: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        segment_starts: Sequence[int],
        block_tables: Tensor,
        top_k: int,
    ) -> None:
        """hidden_states: [T, hidden_size] contiguous, changed by every layer. The others as in StepBatch;
        segment_starts: of every segment, then T."""
        num_tokens = hidden_states.shape[0]
        self.hidden_states = hidden_states
        self.normed = torch.empty_like(hidden_states)
        self.topk_ids = torch.empty(num_tokens, top_k, dtype=torch.int64)
        self.topk_weights = torch.empty(num_tokens, top_k, dtype=torch.float32)
        starts = np.array(segment_starts, dtype=np.int32)
        self._kept_alive = (positions, slot_mapping, starts, block_tables)
        self.view = _LayerStep(
            num_tokens,
            len(starts) - 1,
            block_tables.shape[1],
            0,
            positions.data_ptr(),
            slot_mapping.data_ptr(),
            starts.ctypes.data,
            block_tables.data_ptr(),
            hidden_states.data_ptr(),
            self.normed.data_ptr(),
            self.topk_ids.data_ptr(),
            self.topk_weights.data_ptr(),
        )

    @property
    def times_ns(self) -> tuple[int, int]:
        """Of the last layer: attention, gate."""
        attention_ns, gate_ns = self.view.times_ns
        return attention_ns, gate_ns


class CpuLayer:
    """One layer's weights and cache, ready to be called."""

    def __init__(
        self,
        kernel: CpuKernel,
        config: ModelConfig,
        weights: CpuLayerWeights,
        cache: Tensor,
        rotations: Tensor,
        softmax_scale: float,
    ) -> None:
        """cache: [num_blocks, BLOCK_SIZE, width] in the kernel's dtype. rotations: [positions, R / 2] complex64.

        Raises ValueError for a cache that does not fit.
        """
        width = config.kv_lora_rank + config.qk_rope_head_dim
        if cache.shape[1:] != (BLOCK_SIZE, width) or cache.dtype != kernel.dtype or width > MAX_WIDTH:
            raise ValueError(f"the CPU kernel has no cache of {tuple(cache.shape)} {cache.dtype}")
        self._kernel = kernel
        self._kept_alive: list[object] = [cache, rotations, weights]
        self._view = _Layer(
            kernel.family_number,
            kernel.arithmetic_number,
            config.hidden_size,
            config.num_attention_heads,
            config.q_lora_rank or 0,
            config.kv_lora_rank,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
            config.n_routed_experts,
            config.num_experts_per_tok,
            config.n_group if config.topk_method != "greedy" else 0,
            config.topk_group,
            config.scoring_func == "sigmoid",
            config.topk_method == "noaux_tc",
            config.norm_topk_prob,
            config.routed_scaling_factor,
            config.rms_norm_eps,
            softmax_scale,
            self._floats(weights.input_norm),
            self._floats(weights.q_a_norm),
            self._floats(weights.kv_a_norm),
            self._floats(weights.post_norm),
            rotations.data_ptr(),
            self._floats(weights.gate_bias),
            self._matrices(weights.q_a),
            self._matrices(weights.kv_a),
            self._matrices(weights.q_b),
            self._matrices(*weights.w_uk),
            self._matrices(*weights.w_uv),
            self._matrices(*weights.w_k),
            self._matrices(weights.o_proj),
            self._matrices(weights.gate),
            cache.data_ptr(),
        )

    def attend(self, step: CpuStep) -> None:
        """Add attention to step.hidden_states and set step.normed, topk_ids and topk_weights (not in a dense layer)."""
        self._run(step, cache_only=False)

    def fill_cache(self, step: CpuStep) -> None:
        """Leave the rows' latents in the cache; of step, only normed changes."""
        self._run(step, cache_only=True)

    def _run(self, step: CpuStep, *, cache_only: bool) -> None:
        step.view.cache_only = cache_only
        self._kernel.attend(ctypes.addressof(self._view), ctypes.addressof(step.view))

    def _floats(self, vector: Tensor | None) -> int | None:
        if vector is None:
            return None
        kept = vector.to(torch.float32).contiguous()
        self._kept_alive.append(kept)
        return kept.data_ptr()

    def _matrices(self, *matrices: PackedMatrix | None) -> int | None:
        found = [matrix for matrix in matrices if matrix is not None]
        if not found:
            return None
        views = describe_matrices(found)
        self._kept_alive.append(views)
        return ctypes.addressof(views)
