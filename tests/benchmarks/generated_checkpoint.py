"""The checkpoint that the engine benchmark generates: DeepSeek-V3's architecture, FP8 with block scales, any size.

Not a benchmark itself. Billions of parameters in seconds: FP8 codes are looked up by random 16-bit numbers in a table
of the normal distribution's quantiles, so that zeros and subnormals are as rare as in a quantised real matrix. Gains
are those of tests/random_checkpoint.py, so that tokens spread over the experts, but what a layer adds is small beside
the hidden state, as in a trained model: of 128 random experts several are always nearly as good as the eighth best, and
which of them two implementations take decides nothing then.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.random_checkpoint import FP8_BLOCK, FP8_MAX, write_tokenizer

# Standard deviation of the codes: the largest of a 128 x 128 block of normal values lies at about 4.5 of it.
CODE_STD = FP8_MAX / 4.7
# Of what attention, MLPs and experts add to the hidden state.
ADDED_GAIN = 0.2
# Raised whenever the weights would come out differently.
VERSION = 2


def prepare_checkpoint(cache: Path, config: dict[str, Any]) -> Path:
    """A folder with this config below cache, written once: it has its final name only when it is complete."""
    digest = hashlib.sha256(json.dumps([VERSION, config], sort_keys=True).encode()).hexdigest()[:12]
    folder = cache / f"generated-{digest}"
    if folder.exists():
        return folder
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.unfinished")
    print(f"generating {folder}", file=sys.stderr, flush=True)
    try:
        write_checkpoint(unfinished, config)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def write_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    """One safetensors file per layer, one for embedding, norm and head."""
    folder.mkdir(parents=True)
    draw = _Weights(config)
    files: dict[str, Iterator[tuple[str, torch.Tensor]]] = {
        f"layer-{layer_id:03d}.safetensors": draw.layer(layer_id) for layer_id in range(config["num_hidden_layers"])
    }
    files["ends.safetensors"] = draw.ends()
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for file_name, tensors in files.items():
        in_file = dict(tensors)
        save_file(in_file, folder / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(in_file, file_name))
        total_bytes += sum(tensor.nbytes for tensor in in_file.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(folder, model_max_length=config["max_position_embeddings"])


def count_weight_bytes(folder: Path) -> int:
    return int(json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"])


def read_dequantized(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, weight) of every tensor, FP8 ones multiplied by their scales and rounded to bf16."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
            names = list(file.keys())
            scaled = {name.removesuffix("_scale_inv") for name in names if name.endswith("_scale_inv")}
            for name in names:
                if name.endswith("_scale_inv"):
                    continue
                weight = file.get_tensor(name)
                if name in scaled:
                    weight = dequantize(weight, file.get_tensor(f"{name}_scale_inv"))
                yield name, weight


def dequantize(weight: torch.Tensor, scale_inv: torch.Tensor) -> torch.Tensor:
    """weight: [out, in] e4m3; scale_inv: [ceil(out / 128), ceil(in / 128)] float32. Returns bf16."""
    rows = scale_inv.repeat_interleave(FP8_BLOCK, dim=0)[: weight.shape[0]]
    return (weight.float() * rows.repeat_interleave(FP8_BLOCK, dim=1)[:, : weight.shape[1]]).bfloat16()


class _Weights:
    """Draws (name, tensor) from one seed, in the order in which the files are written."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._bits = np.random.Generator(np.random.SFC64(0))
        self._generator = torch.Generator().manual_seed(0)
        quantiles = torch.special.ndtri((torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)) * CODE_STD
        codes = quantiles.clamp(-FP8_MAX, FP8_MAX).float().to(torch.float8_e4m3fn)
        self._codes = codes.view(torch.uint8).numpy()

    def layer(self, layer_id: int) -> Iterator[tuple[str, torch.Tensor]]:
        config = self._config
        prefix = f"model.layers.{layer_id}"
        hidden_size = config["hidden_size"]
        yield f"{prefix}.input_layernorm.weight", self._norm(hidden_size)
        yield f"{prefix}.post_attention_layernorm.weight", self._norm(hidden_size)
        yield from self._attention(f"{prefix}.self_attn")
        if layer_id < config["first_k_dense_replace"]:
            yield from self._mlp(f"{prefix}.mlp", config["intermediate_size"])
            return
        num_experts = config["n_routed_experts"]
        yield f"{prefix}.mlp.gate.weight", self._plain(num_experts, hidden_size, 2.0)
        # Small beside the scores: a random bias of their size would send every token to the same few experts.
        bias = 0.02 * torch.randn(num_experts, generator=self._generator)
        yield f"{prefix}.mlp.gate.e_score_correction_bias", bias
        for expert_id in range(num_experts):
            yield from self._mlp(f"{prefix}.mlp.experts.{expert_id}", config["moe_intermediate_size"])
        shared_size = config["moe_intermediate_size"] * config["n_shared_experts"]
        yield from self._mlp(f"{prefix}.mlp.shared_experts", shared_size)

    def ends(self) -> Iterator[tuple[str, torch.Tensor]]:
        vocab_size, hidden_size = self._config["vocab_size"], self._config["hidden_size"]
        yield "model.embed_tokens.weight", self._plain(vocab_size, hidden_size, math.sqrt(hidden_size))
        yield "model.norm.weight", self._norm(hidden_size)
        yield "lm_head.weight", self._plain(vocab_size, hidden_size, 1.0)

    def _attention(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        config = self._config
        hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
        q_lora_rank, kv_lora_rank = config["q_lora_rank"], config["kv_lora_rank"]
        nope, rope, v_head_dim = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
        yield from self._matrix(f"{prefix}.q_a_proj", q_lora_rank, hidden_size)
        yield f"{prefix}.q_a_layernorm.weight", self._norm(q_lora_rank)
        yield from self._matrix(f"{prefix}.q_b_proj", num_heads * (nope + rope), q_lora_rank, 1.5)
        yield from self._matrix(f"{prefix}.kv_a_proj_with_mqa", kv_lora_rank + rope, hidden_size, 1.5)
        yield f"{prefix}.kv_a_layernorm.weight", self._norm(kv_lora_rank)
        yield from self._matrix(f"{prefix}.kv_b_proj", num_heads * (nope + v_head_dim), kv_lora_rank)
        yield from self._matrix(f"{prefix}.o_proj", hidden_size, num_heads * v_head_dim, ADDED_GAIN)

    def _mlp(self, prefix: str, intermediate_size: int) -> Iterator[tuple[str, torch.Tensor]]:
        hidden_size = self._config["hidden_size"]
        yield from self._matrix(f"{prefix}.gate_proj", intermediate_size, hidden_size, 1.5)
        yield from self._matrix(f"{prefix}.up_proj", intermediate_size, hidden_size)
        yield from self._matrix(f"{prefix}.down_proj", hidden_size, intermediate_size, ADDED_GAIN)

    def _matrix(self, name: str, rows: int, columns: int, gain: float = 1.0) -> Iterator[tuple[str, torch.Tensor]]:
        """An FP8 matrix and its scales; a unit-variance input leaves with about `gain` as standard deviation."""
        indices = np.frombuffer(self._bits.bytes(2 * rows * columns), dtype=np.uint16)
        weight = torch.from_numpy(self._codes[indices].reshape(rows, columns)).view(torch.float8_e4m3fn)
        blocks = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
        spread = torch.exp2(torch.rand(*blocks, generator=self._generator) - 0.5)
        yield f"{name}.weight", weight
        yield f"{name}.weight_scale_inv", spread * (gain / (math.sqrt(columns) * CODE_STD))

    def _plain(self, rows: int, columns: int, gain: float) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=self._generator) * (gain / math.sqrt(columns))).bfloat16()

    def _norm(self, size: int) -> torch.Tensor:
        return (1.0 + 0.1 * torch.randn(size, generator=self._generator)).bfloat16()
