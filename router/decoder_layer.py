"""One decoder layer: attention, then its dense MLP or its experts. The trunk stacks them; an MTP module holds one.

Routed experts are asked for through a dispatcher, which is passed in; the layer knows neither transport nor expert
table.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from experts.model_config import ModelConfig
from router.attention import Attention
from router.gate import GateWeights, compute_gate_logits, select_experts
from router.latent_cache import LatentCache
from router.norm import rms_norm
from router.rotary import compute_softmax_scale
from router.step_batch import StepBatch
from router.weights import LayerWeights


class PendingExperts(Protocol):
    """Frames on their way."""

    async def gather(self) -> Tensor:
        """[num_tokens, hidden_size] float32: the weighted sum of each row's routed experts."""
        ...


class ExpertDispatcher(Protocol):
    """Sends the rows of one layer to the expert groups."""

    async def scatter(
        self, layer_id: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> PendingExperts:
        """Start the calls and return while they are on their way. Raises ExpertsUnavailable."""
        ...


class DecoderLayer:
    """Safe to run for several disjoint batches at once on one event loop."""

    def __init__(
        self,
        config: ModelConfig,
        layer_id: int,
        weights: LayerWeights,
        dispatcher: ExpertDispatcher,
        cache: LatentCache,
        rotations: Tensor,
        *,
        deterministic: bool,
    ) -> None:
        """rotations: [max_model_len, qk_rope_head_dim / 2] complex64. layer_id: an MTP layer's counts on from the
        main layers'."""
        self._config = config
        self._layer_id = layer_id
        self._weights = weights
        self._dispatcher = dispatcher
        self._rotations = rotations
        scale = compute_softmax_scale(config)
        self._attention = Attention(config, cache.layer(layer_id), weights.attention, scale, deterministic)

    async def forward(self, hidden_states: Tensor, batch: StepBatch) -> Tensor:
        """hidden_states: [num_tokens, hidden_size]. Returns the same, and leaves the rows' latents in the cache.

        Attention is done before anything is awaited: router/layer_order.py counts on it.
        """
        weights, eps = self._weights, self._config.rms_norm_eps
        normed = rms_norm(hidden_states, weights.input_layernorm, eps)
        attended = self._attention.forward(normed, self._rotations[batch.positions], batch)
        hidden_states = hidden_states + attended
        normed = rms_norm(hidden_states, weights.post_attention_layernorm, eps)
        if weights.gate is None:
            assert weights.mlp is not None
            ffn = weights.mlp(normed)
        else:
            ffn = await self._moe(weights.gate, normed)
        return (hidden_states + ffn).to(hidden_states.dtype)  # summed in float32, rounded once

    async def _moe(self, gate: GateWeights, normed: Tensor) -> Tensor:
        """[num_tokens, hidden_size] float32."""
        gate_logits = compute_gate_logits(normed, gate)
        topk_weights, topk_ids = select_experts(gate_logits, gate.e_score_correction_bias, self._config)
        pending = await self._dispatcher.scatter(self._layer_id, normed, topk_ids, topk_weights)
        if self._weights.shared_experts is None:
            return await pending.gather()
        shared = self._weights.shared_experts(normed)
        return shared + await pending.gather()
