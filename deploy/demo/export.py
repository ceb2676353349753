"""Write a trained DemoModel as a Hugging Face folder in the published DeepSeek-V3 form, and read it back.

FP8 blocks, several shards, and on purpose a few scales in another shard than their weights, because the published
checkpoint is allowed to do that and a loader must cope. It knows the names and the number format, nothing of training.
The MTP layer's own copies of embedding and head are left out: they equal the main ones, to which loaders fall back.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from data import BOS, CHAT_TEMPLATE, EOS, PAD
from model import DemoConfig, DemoModel
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

FP8_MAX = 448.0  # the largest e4m3fn number
BLOCK = 128  # rows and columns that share a scale in the published checkpoint
NUM_SHARDS = 3
# 2-D weights the published checkpoint keeps in bf16.
NOT_FP8 = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight", "eh_proj.weight")
# These layers' o_proj scales are written to the next shard.
SCALES_APART = "self_attn.o_proj.weight_scale_inv"


def is_fp8(name: str, tensor: Tensor) -> bool:
    return tensor.dim() >= 2 and not name.endswith(NOT_FP8)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight: [..., out, in]. Returns it as float8_e4m3fn, and scales [..., ceil(out/128), ceil(in/128)] float32."""
    out, width = weight.shape[-2:]
    padding = (0, -width % BLOCK, 0, -out % BLOCK)
    blocks = torch.nn.functional.pad(weight.float(), padding)
    blocks = blocks.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))  # [..., rows, 128, columns, 128]
    scale = blocks.abs().amax((-1, -3)).clamp(min=1e-12) / FP8_MAX
    scaled = (blocks / scale[..., :, None, :, None]).flatten(-2).flatten(-3, -2)
    return scaled[..., :out, :width].to(torch.float8_e4m3fn), scale


def dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    """The inverse of `quantize`, in float32."""
    out, width = weight.shape[-2:]
    spread = scale.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
    return weight.float() * spread[..., :out, :width]


def published_tensors(model_state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as stored: experts apart, FP8 with scales, the rest bf16 and the correction bias float32."""
    for name, tensor in model_state.items():
        if name.endswith("e_score_correction_bias"):
            yield name, tensor.float()
            continue
        if not is_fp8(name, tensor):
            yield name, tensor.to(torch.bfloat16)
            continue
        weight, scale = quantize(tensor)
        if tensor.dim() == 2:
            yield name, weight
            yield f"{name}_scale_inv", scale
            continue
        prefix, projection = name.rsplit(".", 1)  # ...mlp.experts, gate_proj
        for expert_id in range(tensor.shape[0]):
            yield f"{prefix}.{expert_id}.{projection}.weight", weight[expert_id]
            yield f"{prefix}.{expert_id}.{projection}.weight_scale_inv", scale[expert_id]


def export(
    folder: Path, config: DemoConfig, model_state: dict[str, Tensor], tokenizer: Tokenizer, context_size: int
) -> None:
    """Write the whole folder. Shards are replaced one by one: do it while nobody loads."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in published_tensors(model_state)}
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(NUM_SHARDS)]
    written = 0
    for name, tensor in tensors.items():
        shard_id = min(written * NUM_SHARDS // total, NUM_SHARDS - 1)
        if name.endswith(SCALES_APART):
            shard_id = (shard_id + 1) % NUM_SHARDS
        shards[shard_id][name] = tensor
        written += tensor.nbytes
    weight_map = {}
    for shard_id, shard in enumerate(shards):
        file = f"model-{shard_id + 1:05}-of-{NUM_SHARDS:05}.safetensors"
        # A new file and a rename, so that a reader with the old one mapped keeps what it has.
        save_file(shard, folder / f".{file}", metadata={"format": "pt"})
        (folder / f".{file}").chmod(0o644)
        (folder / f".{file}").replace(folder / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "config.json", config.to_published())
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": 2,
            "do_sample": True,
            "temperature": 0.6,
            "top_p": 0.95,
        },
    )
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": context_size,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def load_dequantized(folder: Path) -> dict[str, Tensor]:
    """Every published tensor but the scales, by its published name, FP8 ones multiplied out, all in float32."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file: safe_open(folder / file, framework="pt") for file in sorted(set(weight_map.values()))}
    tensors = {}
    for name, file in weight_map.items():
        if name.endswith("_scale_inv"):
            continue
        tensor = files[file].get_tensor(name)
        scale_name = f"{name}_scale_inv"
        if scale_name in weight_map:
            tensor = dequantize(tensor, files[weight_map[scale_name]].get_tensor(scale_name))
        tensors[name] = tensor.float()
    return tensors


def load_model(folder: Path) -> DemoModel:
    """The exported checkpoint as a float32 DemoModel: what a serving engine sees, in this folder's arithmetic."""
    published = json.loads((folder / "config.json").read_text())
    config = DemoConfig(**{field: published[field] for field in DemoConfig.__dataclass_fields__})
    tensors = load_dequantized(folder)
    model = DemoModel(config).eval()
    state = {}
    for name in model.state_dict():
        if ".mlp.experts." in name:
            prefix, projection = name.rsplit(".", 1)
            experts = range(config.n_routed_experts)
            state[name] = torch.stack([tensors[f"{prefix}.{expert_id}.{projection}.weight"] for expert_id in experts])
        else:
            state[name] = tensors[name]
    model.load_state_dict(state)
    return model


def _write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
