"""Rotary tables, YaRN and the softmax scale against transformers and against the published figures."""

from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3RotaryEmbedding,
    apply_rotary_pos_emb_interleave,
    yarn_apply_mscale,
)

from experts.model_config import ModelConfig
from router.rotary import apply_rotary, compute_inv_freq, compute_rotations, compute_softmax_scale
from tests.random_checkpoint import build_config
from tests.tolerances import FLOAT32_RELATIVE_ERROR

PUBLISHED_YARN = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
# DeepSeek-V2-Lite's; the scale of cos and sin stays 1 because both are equal.
V2_LITE_YARN = {**PUBLISHED_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}
UNEQUAL_YARN = {**PUBLISHED_YARN, "factor": 8, "mscale": 1.0, "mscale_all_dim": 0.5}
YARN_WITHOUT_MSCALE = {
    "type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
ROPE_SCALINGS = [None, PUBLISHED_YARN, V2_LITE_YARN, UNEQUAL_YARN, YARN_WITHOUT_MSCALE]
IDS = ["plain", "published", "v2-lite", "unequal-mscale", "without-mscale"]

SIZES: dict[str, Any] = {"qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "max_position_embeddings": 163840}


def both_configs(rope_scaling: dict[str, Any] | None) -> tuple[ModelConfig, DeepseekV3Config]:
    config = build_config(**SIZES, rope_scaling=rope_scaling)
    return ModelConfig.from_dict(config), DeepseekV3Config.from_dict(config)


@pytest.mark.parametrize("rope_scaling", ROPE_SCALINGS, ids=IDS)
def test_inv_freq_agrees_with_transformers(rope_scaling: dict[str, Any] | None) -> None:
    ours, theirs = both_configs(rope_scaling)

    inv_freq = compute_inv_freq(ours)

    expected = DeepseekV3RotaryEmbedding(theirs).inv_freq
    torch.testing.assert_close(inv_freq, expected, rtol=FLOAT32_RELATIVE_ERROR, atol=0)


@pytest.mark.parametrize("rope_scaling", ROPE_SCALINGS, ids=IDS)
def test_softmax_scale_agrees_with_transformers(rope_scaling: dict[str, Any] | None) -> None:
    ours, theirs = both_configs(rope_scaling)

    assert compute_softmax_scale(ours) == pytest.approx(yarn_apply_mscale(theirs.rope_parameters, 192**-0.5))


@pytest.mark.parametrize("rope_scaling", ROPE_SCALINGS, ids=IDS)
def test_rotated_products_agree_with_transformers(rope_scaling: dict[str, Any] | None) -> None:
    """transformers leaves the pairs de-interleaved, which no dot product of query and key can see."""
    ours, theirs = both_configs(rope_scaling)
    generator = torch.Generator().manual_seed(5)
    positions = torch.tensor([0, 1, 63, 64, 1000, 4095])
    query = torch.randn(1, 1, positions.numel(), 64, generator=generator)
    key = torch.randn(1, 1, positions.numel(), 64, generator=generator)
    cos, sin = DeepseekV3RotaryEmbedding(theirs)(query, positions.unsqueeze(0))
    their_query, their_key = apply_rotary_pos_emb_interleave(query, key, cos, sin)

    rotations = compute_rotations(ours, 4096)[positions]
    our_query, our_key = apply_rotary(query, rotations), apply_rotary(key, rotations)

    # Angles of some 4,000 radians carry an absolute error of 4,000 * 2^-24.
    torch.testing.assert_close(our_query @ our_key.mT, their_query @ their_key.mT, rtol=0, atol=2e-2)
    torch.testing.assert_close(
        our_query[..., :4, :] @ our_key[..., :4, :].mT,
        their_query[..., :4, :] @ their_key[..., :4, :].mT,
        rtol=0,
        atol=2e-4,
    )


def test_published_softmax_scale() -> None:
    """192^-0.5 * 1.36889^2: forgetting the square of mscale is the classic bug."""
    ours, _ = both_configs(PUBLISHED_YARN)

    assert compute_softmax_scale(ours) == pytest.approx(0.135234, abs=1e-6)


def test_published_ramp_lies_between_dimensions_10_and_23() -> None:
    """Fast dimensions keep their frequency, slow ones are divided by the factor, those between are mixed."""
    ours, _ = both_configs(PUBLISHED_YARN)
    plain, _ = both_configs(None)

    ratio = compute_inv_freq(plain) / compute_inv_freq(ours)

    torch.testing.assert_close(ratio[:11], torch.ones(11))
    torch.testing.assert_close(ratio[23:], torch.full((9,), 40.0))
    assert bool(((ratio[11:23] > 1) & (ratio[11:23] < 40)).all())


def test_pairs_are_interleaved() -> None:
    """At position 1 the first pair (dims 0 and 1) turns by 1 radian: inv_freq[0] is 1."""
    ours, _ = both_configs(None)
    x = torch.zeros(1, 64)
    x[0, 0] = 1.0

    turned = apply_rotary(x, compute_rotations(ours, 2)[1:])

    torch.testing.assert_close(turned[0, :2], torch.tensor([0.5403023, 0.8414710]))
    assert not turned[0, 2:].any()


def test_dtype_is_kept() -> None:
    ours, _ = both_configs(None)

    assert apply_rotary(torch.ones(1, 64, dtype=torch.bfloat16), compute_rotations(ours, 1)).dtype == torch.bfloat16
