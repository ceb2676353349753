"""The transformer without its routed experts, in the order of the DeepSeek-V3 report.

One call is one step of the engine: the new tokens of many sequences, flattened.
"""

from __future__ import annotations

from time import perf_counter_ns

import torch
from torch import Tensor

from experts.model_config import ModelConfig
from router.decoder_layer import DecoderLayer, ExpertDispatcher, run_layers
from router.device_copies import DeviceCopies, DeviceDispatcher
from router.latent_cache import LatentCache
from router.layer_order import LayerOrder
from router.linear import NativeLinear
from router.norm import rms_norm
from router.rotary import compute_rotations
from router.step_batch import StepBatch
from router.step_times import PartTimes
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
        self.times = PartTimes()
        self._copies: DeviceCopies | None = None
        if weights.device.type == "cuda":
            self._copies = DeviceCopies(weights.device)
            dispatcher = DeviceDispatcher(dispatcher, self._copies)
        rotations = compute_rotations(config, max_model_len).to(weights.device)
        self._layers = [
            DecoderLayer(config, layer_id, layer, dispatcher, cache, rotations, self.times, deterministic=deterministic)
            for layer_id, layer in enumerate(weights.layers)
        ]

    async def forward(self, batch: StepBatch, order: LayerOrder | None = None) -> Tensor:
        """Run the layers. Returns [num_tokens, hidden_size], before the final norm (the MTP module reads it there).

        Safe to run for several batches at once on one event loop, if no row of one is in the context of another or
        order has that batch come first. order: None, the batch waits for no other.
        """
        hidden_states = torch.embedding(self._weights.embed_tokens, batch.input_ids)
        if self._copies is not None:
            hidden_states, batch = self._copies.send(hidden_states), self._copies.send_batch(batch)
        return await run_layers(self._layers, hidden_states, batch, order)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: [num_rows, hidden_size] of forward. Returns [num_rows, vocab_size] float32 in host memory."""
        started = perf_counter_ns()
        weights, eps = self._weights, self._config.rms_norm_eps
        if isinstance(weights.lm_head, NativeLinear):
            normed = weights.lm_head.kernel.rms_norm(hidden_states.contiguous(), weights.norm, eps)
        else:
            normed = rms_norm(hidden_states, weights.norm, eps)
        logits = weights.lm_head(normed, torch.float32).cpu()
        self.times.head_ns += perf_counter_ns() - started
        return logits
