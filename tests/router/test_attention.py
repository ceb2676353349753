"""Absorbed, chunked attention over the cache equals the textbook formula, however the prompt is cut."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from experts.checkpoint import Checkpoint
from experts.model_config import ModelConfig
from router import attention as attention_module
from router.attention import Attention
from router.block_pool import count_blocks
from router.latent_cache import LatentCache
from router.linear import TorchFactory
from router.norm import rms_norm
from router.rotary import apply_rotary, compute_rotations, compute_softmax_scale
from router.step_batch import TokenSpan, build_step_batch
from router.weights import LayerWeights, load_trunk_weights
from tests.random_checkpoint import read_tensors
from tests.tolerances import FLOAT32_RELATIVE_ERROR

NUM_TOKENS = 150


@pytest.fixture(scope="module")
def stored(tiny_checkpoint: Path) -> Mapping[str, torch.Tensor]:
    return read_tensors(tiny_checkpoint)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> tuple[ModelConfig, LayerWeights]:
    checkpoint = Checkpoint(tiny_checkpoint)
    return checkpoint.config, load_trunk_weights(checkpoint, torch.float32, factory=TorchFactory(torch.float32)).layers[
        0
    ]


def textbook(config: ModelConfig, stored: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Keys and values of every head, one softmax over the whole causal context (DeepSeek-V2 report, section 2.1)."""

    def read(name: str) -> torch.Tensor:
        return stored[f"model.layers.0.self_attn.{name}.weight"].float()

    rotations = compute_rotations(config, x.shape[0])
    q_a = rms_norm(x @ read("q_a_proj").T, read("q_a_layernorm"), config.rms_norm_eps)
    q = (q_a @ read("q_b_proj").T).view(x.shape[0], config.num_attention_heads, config.qk_head_dim)
    q_nope, q_pe = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
    q = torch.cat([q_nope, apply_rotary(q_pe, rotations[:, None])], dim=-1)
    c_kv, k_pe = (x @ read("kv_a_proj_with_mqa").T).split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
    c_kv = rms_norm(c_kv, read("kv_a_layernorm"), config.rms_norm_eps)
    kv = (c_kv @ read("kv_b_proj").T).view(x.shape[0], config.num_attention_heads, -1)
    k_nope, values = kv.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
    k_pe = apply_rotary(k_pe, rotations)[:, None].expand(-1, config.num_attention_heads, -1)
    keys = torch.cat([k_nope, k_pe], dim=-1)
    scores = torch.einsum("thd,chd->htc", q, keys) * compute_softmax_scale(config)
    future = torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).triu(1)
    probabilities = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
    return torch.einsum("htc,chv->thv", probabilities, values).flatten(1) @ read("o_proj").T


def in_chunks(
    config: ModelConfig, layer: LayerWeights, x: torch.Tensor, sizes: list[int], *, deterministic: bool
) -> torch.Tensor:
    """The same through Attention, the sequence cut into steps of the given sizes."""
    # Its blocks lie in no order, among those of others.
    block_ids = [11, 3, 7, 0, 9][: count_blocks(x.shape[0])]
    cache = LatentCache(config, 12, torch.float32)
    cache.layer(0).fill_(float("nan"))
    attention = Attention(config, cache.layer(0), layer.attention, compute_softmax_scale(config), deterministic)
    rotations = compute_rotations(config, x.shape[0])
    outputs: list[torch.Tensor] = []
    start = 0
    for size in sizes:
        span = slice(start, start + size)
        batch = build_step_batch([TokenSpan([0] * size, start, block_ids)])
        outputs.append(attention.forward(x[span], rotations[span], batch))
        start += size
    assert start == x.shape[0]
    return torch.cat(outputs)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("sizes", [[150], [64, 86], [149, 1], [1] * 150, [1, 100, 49]])
def test_equals_the_textbook_formula_however_the_prompt_is_cut(
    model: tuple[ModelConfig, LayerWeights],
    stored: Mapping[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    sizes: list[int],
    deterministic: bool,
) -> None:
    config, layer = model
    # Small chunks and blocks, so that this short context crosses several of both.
    monkeypatch.setattr(attention_module, "CONTEXT_CHUNK", 32)
    monkeypatch.setattr(attention_module, "QUERY_ROWS", 7 * config.num_attention_heads)
    x = torch.randn(NUM_TOKENS, config.hidden_size, generator=torch.Generator().manual_seed(0))

    found = in_chunks(config, layer, x, sizes, deterministic=deterministic)

    expected = textbook(config, stored, x)
    assert (found - expected).abs().max() <= FLOAT32_RELATIVE_ERROR * expected.abs().max()


def test_a_long_context_is_not_expanded(
    model: tuple[ModelConfig, LayerWeights], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values of all heads would take as much memory as the model: the second step must read it absorbed."""
    config, layer = model
    monkeypatch.setattr(attention_module, "EXPAND_UP_TO", 70)
    x = torch.randn(NUM_TOKENS, config.hidden_size, generator=torch.Generator().manual_seed(2))
    expanded: list[int] = []
    expand = Attention._attend_expanded  # pyright: ignore[reportPrivateUsage]

    def spy(
        attention: Attention, q_nope: torch.Tensor, q_pe: torch.Tensor, cache: torch.Tensor, *weights: torch.Tensor
    ) -> torch.Tensor:
        expanded.append(cache.shape[0])
        return expand(attention, q_nope, q_pe, cache, *weights)

    monkeypatch.setattr(Attention, "_attend_expanded", spy)
    in_chunks(config, layer, x, [64, 86], deterministic=False)
    assert expanded == [64]


def test_sequences_of_one_batch_do_not_see_each_other(
    model: tuple[ModelConfig, LayerWeights], stored: Mapping[str, torch.Tensor]
) -> None:
    config, layer = model
    cache = LatentCache(config, 4, torch.float32)
    attention = Attention(config, cache.layer(0), layer.attention, compute_softmax_scale(config), deterministic=False)
    generator = torch.Generator().manual_seed(1)
    lengths = [5, 1, 9]
    inputs = [torch.randn(length, config.hidden_size, generator=generator) for length in lengths]
    rotations = compute_rotations(config, max(lengths))
    batch = build_step_batch([TokenSpan([0] * length, 0, [3 - index]) for index, length in enumerate(lengths)])

    together = attention.forward(torch.cat(inputs), torch.cat([rotations[:length] for length in lengths]), batch)

    for x, start in zip(inputs, [0, 5, 6], strict=True):
        torch.testing.assert_close(together[start : start + len(x)], textbook(config, stored, x), rtol=1e-4, atol=1e-5)
