"""The transformer without its routed experts, in the order of the DeepSeek-V3 report.

One call is one step of the engine: the new tokens of many sequences, flattened.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from experts.model_config import ModelConfig
from router.decoder_layer import DecoderLayer, ExpertDispatcher
from router.latent_cache import LatentCache
from router.layer_order import LayerOrder
from router.norm import rms_norm
from router.rotary import compute_rotations
from router.step_batch import StepBatch
from router.weights import TrunkWeights


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
        rotations = compute_rotations(config, max_model_len)
        self._layers = [
            DecoderLayer(config, layer_id, layer, dispatcher, cache, rotations, deterministic=deterministic)
            for layer_id, layer in enumerate(weights.layers)
        ]

    async def forward(self, batch: StepBatch, order: LayerOrder | None = None) -> Tensor:
        """Run the layers. Returns [num_tokens, hidden_size], before the final norm (the MTP module reads it there).

        Safe to run for several batches at once on one event loop, if no row of one is in the context of another or
        order has that batch come first. order: None, the batch waits for no other.
        """
        hidden_states = functional.embedding(batch.input_ids, self._weights.embed_tokens)
        for layer_id, layer in enumerate(self._layers):
            if order is not None:
                await order.enter(layer_id)
            hidden_states = await layer.forward(hidden_states, batch)
        return hidden_states

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: [num_rows, hidden_size] of forward. Returns [num_rows, vocab_size] float32."""
        normed = rms_norm(hidden_states, self._weights.norm, self._config.rms_norm_eps)
        return self._weights.lm_head(normed, torch.float32)
