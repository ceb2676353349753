"""What a decoder layer does before its experts: attention, residual, norm, gate. In the CPU kernel, else in torch."""

from __future__ import annotations

from time import perf_counter_ns
from typing import Protocol

import torch
from torch import Tensor

from experts.kernels.cpu_ffn import CpuKernel
from experts.kernels.cpu_layer import BLOCK_SIZE, MAX_WIDTH, CpuLayer, CpuLayerWeights, CpuStep
from experts.model_config import ModelConfig
from router import block_pool
from router.attention import Attention
from router.gate import compute_gate_logits, select_experts
from router.linear import NativeLinear, NativePerHead
from router.norm import rms_norm
from router.rotary import compute_softmax_scale
from router.step_batch import StepBatch
from router.step_times import PartTimes
from router.weights import LayerWeights

assert block_pool.BLOCK_SIZE == BLOCK_SIZE  # compiled into the kernel


class LayerRun(Protocol):
    """The rows of one step on their way through layers of one kind."""

    @property
    def hidden_states(self) -> Tensor:
        """[num_tokens, hidden_size]: the residual stream as it is now."""
        ...

    @property
    def normed(self) -> Tensor:
        """[num_tokens, hidden_size]: what the experts or the MLP take."""
        ...

    @property
    def topk_ids(self) -> Tensor:
        """[num_tokens, num_experts_per_tok] int64."""
        ...

    @property
    def topk_weights(self) -> Tensor:
        """[num_tokens, num_experts_per_tok] float32."""
        ...

    def add(self, first: Tensor, second: Tensor | None) -> None:
        """hidden_states + (first + second), float32, rounded once."""
        ...


class LayerFront(Protocol):
    def start(self, hidden_states: Tensor, batch: StepBatch) -> LayerRun:
        """Begin a walk through layers like this one; none changes hidden_states itself."""
        ...

    def attend(self, run: LayerRun) -> None:
        """Leave the rows' latents in the cache, add attention, and set normed and the chosen experts.

        run: started by a front of the same class."""
        ...

    def fill_cache(self, run: LayerRun) -> None:
        """Leave the rows' latents in the cache, and nothing else for anybody to use."""
        ...


class TorchRun:
    def __init__(self, hidden_states: Tensor, batch: StepBatch) -> None:
        self.hidden_states = hidden_states
        self.batch = batch
        self.normed = hidden_states
        self.topk_ids = self.topk_weights = hidden_states.new_empty(0)

    def add(self, first: Tensor, second: Tensor | None) -> None:
        ffn = first if second is None else first + second
        self.hidden_states = (self.hidden_states + ffn).to(self.hidden_states.dtype)


class TorchFront:
    def __init__(
        self,
        config: ModelConfig,
        weights: LayerWeights,
        cache: Tensor,
        rotations: Tensor,
        times: PartTimes,
        *,
        deterministic: bool,
    ) -> None:
        self._config = config
        self._times = times
        self._weights = weights
        self._rotations = rotations
        self._attention = Attention(config, cache, weights.attention, compute_softmax_scale(config), deterministic)

    def start(self, hidden_states: Tensor, batch: StepBatch) -> TorchRun:
        return TorchRun(hidden_states, batch)

    def attend(self, run: LayerRun) -> None:
        assert isinstance(run, TorchRun)
        weights, eps = self._weights, self._config.rms_norm_eps
        started = perf_counter_ns()
        normed = rms_norm(run.hidden_states, weights.input_layernorm, eps)
        attended = self._attention.forward(normed, self._rotations[run.batch.positions], run.batch)
        run.hidden_states = run.hidden_states + attended
        run.normed = rms_norm(run.hidden_states, weights.post_attention_layernorm, eps)
        self._times.attention_ns += perf_counter_ns() - started
        if weights.gate is not None:
            started = perf_counter_ns()
            gate_logits = compute_gate_logits(run.normed, weights.gate)
            bias = weights.gate.e_score_correction_bias
            run.topk_weights, run.topk_ids = select_experts(gate_logits, bias, self._config)
            self._times.gate_ns += perf_counter_ns() - started

    def fill_cache(self, run: LayerRun) -> None:
        assert isinstance(run, TorchRun)
        started = perf_counter_ns()
        normed = rms_norm(run.hidden_states, self._weights.input_layernorm, self._config.rms_norm_eps)
        self._attention.fill_cache(normed, self._rotations[run.batch.positions], run.batch)
        self._times.attention_ns += perf_counter_ns() - started


class NativeRun(CpuStep):
    def __init__(self, kernel: CpuKernel, hidden_states: Tensor, batch: StepBatch, top_k: int) -> None:
        starts = [segment.start for segment in batch.segments]
        super().__init__(
            hidden_states.clone(memory_format=torch.contiguous_format),
            batch.positions,
            batch.slot_mapping,
            [*starts, hidden_states.shape[0]],
            batch.block_tables,
            top_k,
        )
        self._kernel = kernel

    def add(self, first: Tensor, second: Tensor | None) -> None:
        self._kernel.add_(self.hidden_states, first, second)


class NativeFront:
    """One call of the kernel. Rows never depend on their neighbours here, unless long chunks may be expanded."""

    def __init__(
        self,
        kernel: CpuKernel,
        config: ModelConfig,
        weights: CpuLayerWeights,
        cache: Tensor,
        rotations: Tensor,
        times: PartTimes,
    ) -> None:
        self._kernel = kernel
        self._times = times
        self._top_k = config.num_experts_per_tok
        self._layer = CpuLayer(kernel, config, weights, cache, rotations, compute_softmax_scale(config))

    def start(self, hidden_states: Tensor, batch: StepBatch) -> NativeRun:
        return NativeRun(self._kernel, hidden_states, batch, self._top_k)

    def attend(self, run: LayerRun) -> None:
        assert isinstance(run, NativeRun)
        self._layer.attend(run)
        attention_ns, gate_ns = run.times_ns
        self._times.attention_ns += attention_ns
        self._times.gate_ns += gate_ns

    def fill_cache(self, run: LayerRun) -> None:
        assert isinstance(run, NativeRun)
        self._layer.fill_cache(run)
        self._times.attention_ns += run.times_ns[0]


def build_front(
    config: ModelConfig,
    weights: LayerWeights,
    cache: Tensor,
    rotations: Tensor,
    times: PartTimes,
    *,
    deterministic: bool,
) -> LayerFront:
    """cache: the layer's [num_blocks, BLOCK_SIZE, width]. rotations: [positions, R / 2] complex64."""
    packed = _find_packed(weights, deterministic=deterministic)
    if packed is not None:
        kernel, native = packed
        if cache.dtype == kernel.dtype and cache.shape[-1] <= MAX_WIDTH:
            return NativeFront(kernel, config, native, cache, rotations, times)
    return TorchFront(config, weights, cache, rotations, times, deterministic=deterministic)


def _find_packed(weights: LayerWeights, *, deterministic: bool) -> tuple[CpuKernel, CpuLayerWeights] | None:
    """The layer's packed matrices, or None unless all of them are."""
    attention, gate = weights.attention, weights.gate
    qkv_a, q_b, o_proj = attention.qkv_a_proj, attention.q_b_proj, attention.o_proj
    w_uk, w_uv = attention.w_uk, attention.w_uv
    projection = None if gate is None else gate.projection
    if not (
        isinstance(qkv_a, NativeLinear)
        and isinstance(q_b, NativeLinear | None)
        and isinstance(o_proj, NativeLinear)
        and isinstance(w_uk, NativePerHead)
        and isinstance(w_uv, NativePerHead)
        and isinstance(projection, NativeLinear | None)
    ):
        return None
    q_a, kv_a = qkv_a.matrices
    return qkv_a.kernel, CpuLayerWeights(
        input_norm=weights.input_layernorm,
        q_a=q_a,
        kv_a=kv_a,
        q_a_norm=attention.q_a_layernorm,
        q_b=None if q_b is None else q_b.matrices[0],
        kv_a_norm=attention.kv_a_layernorm,
        w_uk=w_uk.matrices,
        w_uv=w_uv.matrices,
        w_k=() if deterministic else w_uk.reverse,
        o_proj=o_proj.matrices[0],
        post_norm=weights.post_attention_layernorm,
        gate=None if projection is None else projection.matrices[0],
        gate_bias=None if gate is None else gate.e_score_correction_bias,
    )
