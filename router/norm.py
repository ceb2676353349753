"""RMSNorm, computed in float32 whatever the model's dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """hidden_states: [..., d], any float dtype; weight: [d] float32. Returns hidden_states' dtype."""
    return torch.nn.functional.rms_norm(hidden_states.float(), weight.shape, weight, eps).to(hidden_states.dtype)
