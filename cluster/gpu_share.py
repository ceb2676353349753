"""How much of a card each actor asks Ray for. A pure function of what the Ray cluster has."""

from __future__ import annotations

import math
from typing import Literal

from cluster.errors import StartError

# Ray counts GPUs in steps of 0.0001.
_STEPS = 10_000


def compute_gpu_share(device: Literal["auto", "cpu", "cuda"], num_gpus: float, num_actors: int) -> float:
    """GPUs of one router or expert group replica: whole cards if there is one for each, else equal parts of one.

    num_gpus: in the whole Ray cluster. Ray gives each process the card it reserved and shows it no other. Whether the
    weights fit is for each process to say, which sees its card. Returns 0 to compute on CPUs: with "auto" where there
    is no card. Raises StartError for "cuda" without any.
    """
    if device == "cpu" or (device == "auto" and num_gpus < 1):
        return 0.0
    if num_gpus < 1:
        raise StartError(
            "device is cuda, but no node of this Ray cluster has a GPU that Ray knows of "
            "(check nvidia-smi and CUDA_VISIBLE_DEVICES there, or use --device cpu)"
        )
    actors_per_card = math.ceil(num_actors / math.floor(num_gpus))
    return 1.0 if actors_per_card == 1 else math.floor(_STEPS / actors_per_card) / _STEPS
