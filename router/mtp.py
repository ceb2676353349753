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

    async def forward(self, hidden_states: Tensor, batch: StepBatch, context: StepBatch | None = None) -> Tensor:
        """Returns [num_tokens, hidden_size]: states for compute_logits, or for a second application.

        hidden_states: of the trunk before its final norm, or what this returned. batch: row i has hidden state i's
        position, and the token behind it as input id. context: the same of rows that come first in hidden_states and
        are there for the cache alone."""
        if context is None:
            return await self._layer.forward(self._combine(hidden_states, batch.input_ids), self._send(batch))
        num_before = len(context.input_ids)
        combined = self._combine(hidden_states, torch.cat([context.input_ids, batch.input_ids]))
        self._layer.fill_cache(combined[:num_before], self._send(context))
        return await self._layer.forward(combined[num_before:], self._send(batch))

    def fill_cache(self, hidden_states: Tensor, batch: StepBatch) -> None:
        """What forward does for the cache, with the same arguments. It takes no experts."""
        self._layer.fill_cache(self._combine(hidden_states, batch.input_ids), self._send(batch))

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: [num_rows, hidden_size] of forward. Returns [num_rows, vocab_size] float32, of the token two
        behind each row's position."""
        return self._weights.head(self._norm(hidden_states, self._weights.norm), torch.float32).cpu()

    def _combine(self, hidden_states: Tensor, input_ids: Tensor) -> Tensor:
        """[num_tokens, hidden_size]: what the module's layer takes."""
        weights, eh_proj = self._weights, self._weights.eh_proj
        if isinstance(eh_proj, NativeLinear) and weights.embed_tokens.dtype == eh_proj.kernel.dtype:
            norms = (weights.enorm, weights.hnorm)
            return eh_proj.kernel.join(
                eh_proj.matrices[0], weights.embed_tokens, input_ids, hidden_states.contiguous(), norms, self._eps
            )
        embedded = torch.embedding(self._weights.embed_tokens, input_ids)
        if self._copies is not None:
            embedded = self._copies.send(embedded)
        normed = [self._norm(embedded, weights.enorm), self._norm(hidden_states, weights.hnorm)]
        return eh_proj(torch.cat(normed, dim=-1))

    def _send(self, batch: StepBatch) -> StepBatch:
        return batch if self._copies is None else self._copies.send_batch(batch)

    def _norm(self, hidden_states: Tensor, weight: Tensor) -> Tensor:
        """One native call for torch's three where there is the kernel."""
        if isinstance(self._weights.head, NativeLinear):
            return self._weights.head.kernel.rms_norm(hidden_states.contiguous(), weight, self._eps)
        return rms_norm(hidden_states, weight, self._eps)
