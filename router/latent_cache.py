"""What tokens leave behind in every layer: RMS-normed c_kv and roped k_pe, one row per token, in blocks.

One cache serves all sequences of a router. It knows only storage: which block belongs to whom is BlockPool's business.
"""

from __future__ import annotations

import torch
from torch import Tensor

from experts.model_config import ModelConfig
from router.block_pool import BLOCK_SIZE


def cache_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """71,424 for DeepSeek-V3 in bf16: 61 layers and an MTP layer of 576 values."""
    width = config.kv_lora_rank + config.qk_rope_head_dim
    return config.num_layers_total * width * dtype.itemsize


class LatentCache:
    """Rows for num_blocks blocks in every layer. The system gives memory to a block when it is first written."""

    def __init__(
        self, config: ModelConfig, num_blocks: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        """device: None: the CPU."""
        width = config.kv_lora_rank + config.qk_rope_head_dim
        self._rows = torch.empty(config.num_layers_total, num_blocks, BLOCK_SIZE, width, dtype=dtype, device=device)

    @property
    def num_blocks(self) -> int:
        return self._rows.shape[1]

    def layer(self, layer_id: int) -> Tensor:
        """[num_blocks, BLOCK_SIZE, kv_lora_rank + qk_rope_head_dim]: a view. MTP layers lie under their layer ids,
        from num_hidden_layers on."""
        return self._rows[layer_id]
