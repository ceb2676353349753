"""The demo checkpoint with a gate that is biased towards a few experts: a load as skewed as one likes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

DEMO_CHECKPOINT = Path(__file__).resolve().parents[1] / "deploy/demo/checkpoint"
# Scores are sigmoids, so an expert with this on top is chosen by every token.
_ALWAYS = 2.0


def write_biased_checkpoint(folder: Path, hot_experts: Sequence[int]) -> Path:
    """Every token chooses these experts in every layer, beside those that it would choose anyway. Their weights in the
    sum stay those of the gate, which uses the bias only to choose."""
    shutil.copytree(DEMO_CHECKPOINT, folder)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
        biased = [name for name in tensors if name.endswith("e_score_correction_bias")]
        for name in biased:
            tensors[name][torch.tensor(hot_experts)] += _ALWAYS
        if biased:
            save_file(tensors, file, metadata={"format": "pt"})
    return folder
