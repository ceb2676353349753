"""The transformer without its routed experts, in the order of the DeepSeek-V3 report.

One call is one step of the engine: the new tokens of many sequences, flattened. Routed experts are asked for through
a dispatcher, which is passed in; the trunk knows neither transport nor expert table.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from experts.model_config import ModelConfig
from router.attention import Attention
from router.gate import compute_gate_logits, select_experts
from router.latent_cache import LatentCache
from router.norm import rms_norm
from router.rotary import compute_rotations, compute_softmax_scale
from router.step_batch import StepBatch
from router.weights import LayerWeights, TrunkWeights


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


class Trunk:
    """Embedding, layers, final norm and head."""

    def __init__(
        self,
        config: ModelConfig,
        weights: TrunkWeights,
        dispatcher: ExpertDispatcher,
        cache: LatentCache,
        *,
        max_model_len: int,
        deterministic: bool,
    ) -> None:
        self._config = config
        self._weights = weights
        self._dispatcher = dispatcher
        self._rotations = compute_rotations(config, max_model_len)  # [max_model_len, R / 2] complex64
        scale = compute_softmax_scale(config)
        self._attention = [
            Attention(config, cache.layer(layer_id), layer.attention, scale, deterministic)
            for layer_id, layer in enumerate(weights.layers)
        ]

    async def forward(self, batch: StepBatch) -> Tensor:
        """Run the layers. Returns [num_tokens, hidden_size], before the final norm (the MTP module reads it there)."""
        eps = self._config.rms_norm_eps
        rotations = self._rotations[batch.positions]
        hidden_states = functional.embedding(batch.input_ids, self._weights.embed_tokens)
        for layer_id, layer in enumerate(self._weights.layers):
            normed = rms_norm(hidden_states, layer.input_layernorm, eps)
            hidden_states = hidden_states + self._attention[layer_id].forward(normed, rotations, batch)
            normed = rms_norm(hidden_states, layer.post_attention_layernorm, eps)
            ffn = layer.mlp(normed) if layer.mlp is not None else await self._moe(layer_id, layer, normed)
            hidden_states = (hidden_states + ffn).to(hidden_states.dtype)  # summed in float32, rounded once
        return hidden_states

    async def _moe(self, layer_id: int, layer: LayerWeights, normed: Tensor) -> Tensor:
        """[num_tokens, hidden_size] float32."""
        assert layer.gate is not None
        gate_logits = compute_gate_logits(normed, layer.gate)
        topk_weights, topk_ids = select_experts(gate_logits, layer.gate.e_score_correction_bias, self._config)
        pending = await self._dispatcher.scatter(layer_id, normed, topk_ids, topk_weights)
        if layer.shared_experts is None:
            return await pending.gather()
        shared = layer.shared_experts(normed)
        return shared + await pending.gather()

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: [num_rows, hidden_size] of forward. Returns [num_rows, vocab_size] float32."""
        normed = rms_norm(hidden_states, self._weights.norm, self._config.rms_norm_eps)
        return self._weights.lm_head(normed, torch.float32)
