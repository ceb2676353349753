"""Rotary position embedding, with YaRN where the config asks for it, and the softmax scale that belongs to it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from experts.model_config import ModelConfig, YarnScaling


def compute_inv_freq(config: ModelConfig) -> Tensor:
    """[qk_rope_head_dim / 2] float32. YaRN interpolates the slow dimensions only (arXiv 2309.00071, section 3.2)."""
    dim = config.qk_rope_head_dim
    # Spelled as in the published code, so that not a bit differs at position 160,000.
    freq = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    scaling = config.rope_scaling
    if scaling is None:
        return freq
    low = math.floor(_yarn_dim(scaling.beta_fast, dim, config.rope_theta, scaling))
    high = math.ceil(_yarn_dim(scaling.beta_slow, dim, config.rope_theta, scaling))
    low, high = max(low, 0), min(high, dim - 1)
    span = max(high - low, 0.001)  # a ramp of no width would divide by zero
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return freq / scaling.factor * ramp + freq * (1 - ramp)


def _yarn_dim(num_rotations: float, dim: int, base: float, scaling: YarnScaling) -> float:
    """The dimension that turns num_rotations times over the original context."""
    context = scaling.original_max_position_embeddings
    return dim * math.log(context / (num_rotations * 2 * math.pi)) / (2 * math.log(base))


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def compute_softmax_scale(config: ModelConfig) -> float:
    """qk_head_dim^-0.5, times m^2 under YaRN with m from mscale_all_dim (1.36889^2 for DeepSeek-V3)."""
    scale = config.qk_head_dim**-0.5
    scaling = config.rope_scaling
    if scaling is not None and scaling.mscale_all_dim:
        scale *= _yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


def compute_rotations(config: ModelConfig, max_positions: int) -> Tensor:
    """[max_positions, qk_rope_head_dim / 2] complex64: the turn of each pair at each position.

    Its length is mscale / mscale_all_dim under YaRN, which is 1 for DeepSeek-V3.
    """
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), compute_inv_freq(config))
    magnitude = 1.0
    scaling = config.rope_scaling
    if scaling is not None:
        if scaling.mscale and scaling.mscale_all_dim:
            magnitude = _yarn_mscale(scaling.factor, scaling.mscale) / _yarn_mscale(
                scaling.factor, scaling.mscale_all_dim
            )
        else:
            magnitude = _yarn_mscale(scaling.factor, 1.0)
    return torch.polar(torch.full_like(angles, magnitude), angles)


def apply_rotary(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn the interleaved pairs (2i, 2i+1) of the last dimension, as the published checkpoints store them.

    x: [..., qk_rope_head_dim], any float dtype; rotations: [..., qk_rope_head_dim / 2] complex64, broadcast against x.
    Returns x's dtype.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations).flatten(-2).to(x.dtype)
