"""What a sequence leaves behind in every layer: RMS-normed c_kv and roped k_pe, one row per token.

One cache belongs to one sequence. Its rows of a layer lie side by side, so attention reads them in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from experts.model_config import ModelConfig


def cache_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """70,272 for DeepSeek-V3 in bf16."""
    width = config.kv_lora_rank + config.qk_rope_head_dim
    return config.num_hidden_layers * width * dtype.itemsize


def _round_up(num_tokens: int) -> int:
    """To a multiple of 64 rows: every layer starts on a cache line, as products may depend on alignment."""
    return -(-num_tokens // 64) * 64


class LatentCache:
    """Rows for up to capacity tokens of one sequence; storage grows by doubling, so short answers stay small."""

    def __init__(self, config: ModelConfig, capacity: int, dtype: torch.dtype, initial_tokens: int = 64) -> None:
        self._capacity = capacity
        width = config.kv_lora_rank + config.qk_rope_head_dim
        num_tokens = _round_up(min(capacity, initial_tokens))
        self._rows = torch.empty(config.num_hidden_layers, num_tokens, width, dtype=dtype)

    def reserve(self, num_tokens: int) -> None:
        """Make room for num_tokens in all, before a step writes them. Raises ValueError beyond the capacity."""
        if num_tokens > self._capacity:
            raise ValueError(f"{num_tokens} tokens for a cache of {self._capacity}")
        held = self._rows.shape[1]
        if num_tokens <= held:
            return
        wanted = _round_up(min(self._capacity, max(num_tokens, 2 * held)))
        grown = self._rows.new_empty(self._rows.shape[0], wanted, self._rows.shape[2])
        grown[:, :held] = self._rows
        self._rows = grown

    def layer(self, layer_id: int) -> Tensor:
        """[held, kv_lora_rank + qk_rope_head_dim]: a view; rows from the sequence's length on are not written yet."""
        return self._rows[layer_id]
