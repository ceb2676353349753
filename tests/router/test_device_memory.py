"""What a router takes of a card at DeepSeek-V3's real sizes: loaded as on a card, on torch's meta device.

The figure is the sum of the storages that the factory itself allocated, found by walking the loaded weights, so it
cannot drift from what is served.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from experts.checkpoint import Checkpoint, TensorInfo
from experts.kernels.block_quantized import BlockScaledMatrix
from experts.model_config import ModelConfig
from experts.quantization import scale_shape
from experts.tensor_names import list_trunk_tensors

pytest.importorskip("triton", reason="triton has no build for this platform")

from experts.kernels.tile_table import choose_kernels
from router.device_linear import DeviceFactory, Fp8PerHead
from router.server import CARD_WORKING_BYTES
from router.weights import load_trunk_weights

META = torch.device("meta")
# What the issue allows on a card of 24 GB.
MOST_BYTES = 19_500_000_000
DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "vocab_size": 129280,
    "hidden_size": 7168, "num_hidden_layers": 61, "first_k_dense_replace": 3, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "num_attention_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "max_position_embeddings": 163840, "num_nextn_predict_layers": 1, "tie_word_embeddings": False,
    "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0,
    },
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}  # fmt: skip


class MetaCheckpoint:
    """The published checkpoint's tensors, shapes and dtypes without their bytes."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._tensors = {tensor.name: tensor for tensor in list_trunk_tensors(config)}

    def check_stored_weight(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        tensor = self._tensors[name]
        assert tensor.shape == shape
        dtype = "F8_E4M3" if tensor.quantizable and "eh_proj" not in name else "BF16"
        return cast("TensorInfo", SimpleNamespace(name=name, dtype=dtype, shape=shape))

    def read(self, name: str) -> torch.Tensor:
        if name.endswith("_scale_inv"):
            assert self.config.quantization is not None
            weight = self._tensors[name.removesuffix("_scale_inv")]
            shape = scale_shape(weight.shape, self.config.quantization.weight_block_size)
            return torch.empty(shape, dtype=torch.float32, device=META)
        info = self.check_stored_weight(name, self._tensors[name].shape)
        dtype = torch.float8_e4m3fn if info.dtype == "F8_E4M3" else torch.bfloat16
        return torch.empty(info.shape, dtype=dtype, device=META)

    def read_weight(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=META)


def list_tensors(value: object) -> Iterator[torch.Tensor]:
    """Every tensor that is reachable."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:  # pyright: ignore[reportUnknownVariableType]
            yield from list_tensors(item)  # pyright: ignore[reportUnknownArgumentType]
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from list_tensors(getattr(value, field.name))


def count_bytes(value: object) -> int:
    """Of all storages, each once however many tensors share it."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in list_tensors(value)}.values())


def load(config: ModelConfig, capability: tuple[int, int]) -> Any:
    factory = DeviceFactory(META, choose_kernels(capability), torch.bfloat16)
    return load_trunk_weights(cast("Checkpoint", MetaCheckpoint(config)), torch.bfloat16, factory=factory, device=META)


@pytest.mark.parametrize("capability", [(8, 6), (8, 9)], ids=["w8a16", "w8a8"])
def test_the_router_of_deepseek_v3_fits_a_card_of_24_gb(capability: tuple[int, int]) -> None:
    config = ModelConfig.from_dict(DEEPSEEK_V3)
    weights = load(config, capability)
    on_card = count_bytes(dataclasses.replace(weights, embed_tokens=None))
    # An MTP layer is one more decoder layer with experts and eh_proj in bf16; embedding and head are the main ones.
    mtp_bytes = count_bytes(weights.layers[-1]) + 2 * 7168 * 7168 * 2
    rotations_bytes = config.max_position_embeddings * config.qk_rope_head_dim // 2 * torch.complex64.itemsize
    total = on_card + mtp_bytes + rotations_bytes
    assert total + CARD_WORKING_BYTES <= MOST_BYTES, f"{total / 1e9:.2f} GB and a step's working memory"
    # Weights as they are stored: nothing is left out, nothing expanded but the gate (fp32 for bf16).
    assert 16.5e9 <= on_card <= 17.6e9, f"{on_card / 1e9:.2f} GB"
    assert weights.embed_tokens.nbytes == 129280 * 7168 * 2


def test_the_absorbed_projection_is_stored_once_and_in_fp8() -> None:
    weights = load(ModelConfig.from_dict({**DEEPSEEK_V3, "num_hidden_layers": 1}), (8, 9))
    attention = weights.layers[0].attention
    assert isinstance(attention.w_uk, Fp8PerHead) and isinstance(attention.w_uv, Fp8PerHead)
    assert attention.w_uk.matrix is attention.w_uv.matrix
    assert isinstance(attention.w_uk.matrix, BlockScaledMatrix)
    assert attention.w_uk.matrix.size_bytes == 32768 * 512 + 4 * 256 * 4
