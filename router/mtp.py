"""The checkpoint's multi-token-prediction module: from a token's state and the next token, the one after that.

DeepSeek-V3 report, section 2.2: hidden' = eh_proj(concat[enorm(embed(next token)), hnorm(hidden)]), then a whole
decoder layer, whose routed experts are served by the expert groups under the module's own layer id. Row i of its latent
cache is made of hidden state i and the embedding of token i + 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from experts.device import CPU
from experts.model_config import ModelConfig
from router.decoder_layer import DecoderLayer, ExpertDispatcher
from router.device_copies import DeviceCopies, DeviceDispatcher
from router.latent_cache import LatentCache
from router.linear import NativeLinear
from router.norm import rms_norm
from router.rotary import compute_rotations
from router.step_batch import StepBatch
from router.step_times import PartTimes
from router.weights import MtpWeights


class MtpModule:
    """Safe to run for several disjoint batches at once on one event loop."""

    def __init__(
        self,
        config: ModelConfig,
        weights: MtpWeights,
        dispatcher: ExpertDispatcher,
        cache: LatentCache,
        *,
        max_model_len: int,
        deterministic: bool,
        device: torch.device = CPU,
    ) -> None:
        self._eps = config.rms_norm_eps
        self._weights = weights
        self._copies: DeviceCopies | None = None
        if device.type == "cuda":
            self._copies = DeviceCopies(device)
            dispatcher = DeviceDispatcher(dispatcher, self._copies)
        self._layer = DecoderLayer(
            config,
            config.num_hidden_layers,
            weights.layer,
            dispatcher,
            cache,
            compute_rotations(config, max_model_len).to(device),
            PartTimes(),
            deterministic=deterministic,
            gives_turn=True,  # the tokens of the step before are handed out
        )

    async def forward(self, hidden_states: Tensor, batch: StepBatch) -> Tensor:
        """Returns [num_tokens, hidden_size]: states for compute_logits, or for a second application.

        hidden_states: [num_tokens, hidden_size], of the trunk before its final norm, or what this returned. batch: row
        i has hidden state i's position, and the token behind it as input id."""
        embedded = torch.embedding(self._weights.embed_tokens, batch.input_ids)
        if self._copies is not None:
            embedded, batch = self._copies.send(embedded), self._copies.send_batch(batch)
        normed = [
            self._norm(embedded, self._weights.enorm),
            self._norm(hidden_states, self._weights.hnorm),
        ]
        return await self._layer.forward(self._weights.eh_proj(torch.cat(normed, dim=-1)), batch)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: [num_rows, hidden_size] of forward. Returns [num_rows, vocab_size] float32, of the token two
        behind each row's position."""
        return self._weights.head(self._norm(hidden_states, self._weights.norm), torch.float32).cpu()

    def _norm(self, hidden_states: Tensor, weight: Tensor) -> Tensor:
        """One native call for torch's three where there is the kernel."""
        if isinstance(self._weights.head, NativeLinear):
            return self._weights.head.kernel.rms_norm(hidden_states.contiguous(), weight, self._eps)
        return rms_norm(hidden_states, weight, self._eps)
