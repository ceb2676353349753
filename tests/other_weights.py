"""Another checkpoint of the same architecture and tokenizer: trunk and experts both differ from the source's, so that
an answer made of the two is neither's."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

NOISE = 0.15


def write_other_weights(source: Path, folder: Path, seed: int = 1) -> None:
    """Every tensor that is no FP8 code gets noise: trunk weights themselves, experts by their scales."""
    shutil.copytree(source, folder)
    generator = torch.Generator().manual_seed(seed)
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if tensor.dtype in (torch.bfloat16, torch.float32):
                noise = 1 + NOISE * torch.randn(tensor.shape, generator=generator).clamp(-2, 2)
                tensors[name] = (tensor.float() * noise).to(tensor.dtype)
        save_file(tensors, path, metadata={"format": "pt"})
