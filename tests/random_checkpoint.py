"""Tiny random DeepSeek-architecture checkpoints, written as Hugging Face publishes them.

The builder and its dequantised twin are the judges of our readers, so nothing here imports `experts` or `router`:
block quantisation, tensor names and file layout are written down a second time, from the published checkpoints.

Weights are drawn so that a comparison means something: hidden states keep unit variance, attention scores and
logits spread over several units (flat logits would agree whatever the attention did), and gate scores lie far
enough apart that two correct implementations choose the same experts.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# The largest finite value of e4m3fn; a block's scale maps its largest magnitude here.
FP8_MAX = 448.0
# Rows and columns of one scale in every published FP8 checkpoint.
FP8_BLOCK = 128

BOS_TOKEN = "<｜begin▁of▁sentence｜>"
EOS_TOKEN = "<｜end▁of▁sentence｜>"
PAD_TOKEN = "<｜▁pad▁｜>"
USER_TOKEN = "<｜User｜>"
ASSISTANT_TOKEN = "<｜Assistant｜>"
SPECIAL_TOKENS = (BOS_TOKEN, EOS_TOKEN, PAD_TOKEN, USER_TOKEN, ASSISTANT_TOKEN)

# Single bytes first merge into these; enough that text and tokens differ in length.
_MERGES = (
    ("t", "h"), ("th", "e"), ("i", "n"), ("e", "r"), ("a", "n"), ("o", "n"), ("r", "e"), ("Ġ", "the"), ("Ġ", "a"),
    ("e", "n"), ("s", "t"), ("Ġ", "s"), ("Ġ", "in"), ("Ġ", "w"), ("l", "l"), ("o", "u"), ("Ġ", "c"), ("in", "g"),
    ("an", "d"), ("Ġ", "and"), ("h", "e"), ("o", "r"),
)  # fmt: skip

CHAT_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)

_COMMON_CONFIG: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    # transformers fixes the two latent norms at 1e-6 whatever is said here, as the published models do.
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}

_CONFIGS_BY_MODEL_TYPE: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
    },
    "deepseek_v2": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        # transformers' V2 ignores norm_topk_prob; the published V2 checkpoints have it false.
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
}


def write_random_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    shards: int = 2,
    fp8: bool = False,
    ue8m0: bool = False,
    scale_dtype: torch.dtype = torch.float32,
    mtp_copies: bool = True,
    logit_gain: float = 4.0,
    **config_overrides: Any,
) -> dict[str, Any]:
    """Write a whole checkpoint folder and return its config.json.

    shards: number of safetensors files; 1 writes `model.safetensors` without an index.
    fp8: quantise what the published checkpoints quantise, in 128x128 blocks (edge blocks partial).
    ue8m0: scales are powers of two, rounded up. scale_dtype: float32 as published, or float8_e8m0fnu.
    mtp_copies: whether MTP layers carry their copies of the embedding and the head.
    logit_gain: standard deviation of the logits. 4 keeps the best token away from the second; 1 suits comparisons in
        bf16, whose step at a logit of 16 is 0.125, more than the tolerance for a logprob.
    config_overrides: fields of config.json; `model_type` picks the defaults.
    """
    config = build_config(fp8=fp8, ue8m0=ue8m0, **config_overrides)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in _draw_weights(config, generator, mtp_copies, logit_gain):
        if fp8 and _is_quantized(name):
            weight_fp8, scale_inv = _quantize(_vary_blocks(weight, generator), ue8m0=ue8m0)
            tensors[name] = weight_fp8
            tensors[f"{name}_scale_inv"] = scale_inv.to(scale_dtype)
        else:
            tensors[name] = weight
    folder.mkdir(parents=True, exist_ok=True)
    _write_shards(folder, tensors, shards)
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {"_from_model_config": True, "bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]},
    )
    write_tokenizer(folder, model_max_length=config["max_position_embeddings"])
    return config


def build_config(*, fp8: bool = False, ue8m0: bool = False, **config_overrides: Any) -> dict[str, Any]:
    """config.json as a dict, in the spelling of the published checkpoints (rope_scaling, torch_dtype)."""
    model_type = config_overrides.get("model_type", "deepseek_v3")
    config = {"model_type": model_type, **_COMMON_CONFIG, **_CONFIGS_BY_MODEL_TYPE[model_type], **config_overrides}
    config["num_key_value_heads"] = config["num_attention_heads"]
    if fp8:
        config["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        }
        if ue8m0:
            config["quantization_config"]["scale_fmt"] = "ue8m0"
    return config


def dequantized_twin(folder: Path, out: Path) -> Path:
    """Write the same model with plain float32 weights, without quantization_config or MTP layers, for transformers.

    Values are exactly what the FP8 or bf16 tensors stand for: nothing is rounded on the way.
    """
    tensors = read_tensors(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    config["torch_dtype"] = "float32"
    num_layers = config["num_hidden_layers"]
    config["num_nextn_predict_layers"] = 0
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        if name.startswith("model.layers.") and int(name.split(".")[2]) >= num_layers:
            continue
        value = tensor.to(torch.float32)
        scale_inv = tensors.get(f"{name}_scale_inv")
        if scale_inv is not None:
            value = value * _expand_scale(scale_inv.to(torch.float32), value.shape)
        plain[name] = value.contiguous()
    out.mkdir(parents=True, exist_ok=True)
    save_file(plain, out / "model.safetensors", metadata={"format": "pt"})
    _write_json(out / "config.json", config)
    write_tokenizer(out, model_max_length=config["max_position_embeddings"])
    return out


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint as stored, whatever its shard."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:  # type: ignore[no-untyped-call]
            for name in shard.keys():  # noqa: SIM118 (safe_open is no mapping)
                tensors[name] = shard.get_tensor(name)
    return tensors


def rewrite_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], *, shards: int = 2) -> None:
    """Replace the weights of a checkpoint, for tests that damage one tensor of an otherwise sound folder."""
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
        path.unlink()
    _write_shards(folder, dict(tensors), shards)


def write_tokenizer(folder: Path, *, model_max_length: int = 512) -> Tokenizer:
    """A byte-level BPE tokenizer: five special tokens, 256 bytes, a few merges. Any text can be encoded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: token_id for token_id, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    for left, right in _MERGES:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(_MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": BOS_TOKEN,
            "eos_token": EOS_TOKEN,
            "pad_token": PAD_TOKEN,
            "clean_up_tokenization_spaces": False,
            "model_max_length": model_max_length,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": CHAT_TEMPLATE,
        },
    )
    return tokenizer


def _draw_weights(
    config: dict[str, Any], generator: torch.Generator, mtp_copies: bool, logit_gain: float
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, weight) in checkpoint order; bf16 but for the gate bias, which is published in float32."""
    hidden_size: int = config["hidden_size"]
    vocab_size: int = config["vocab_size"]

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        """[rows, columns]; a unit-variance input leaves with standard deviation `gain`."""
        return (torch.randn(rows, columns, generator=generator) * (gain / math.sqrt(columns))).to(torch.bfloat16)

    def norm(size: int) -> torch.Tensor:
        return (1.0 + 0.1 * torch.randn(size, generator=generator)).to(torch.bfloat16)

    def mlp(prefix: str, intermediate_size: int) -> Iterator[tuple[str, torch.Tensor]]:
        yield f"{prefix}.gate_proj.weight", matrix(intermediate_size, hidden_size, 1.5)
        yield f"{prefix}.up_proj.weight", matrix(intermediate_size, hidden_size)
        yield f"{prefix}.down_proj.weight", matrix(hidden_size, intermediate_size)

    def attention(prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        num_heads, q_lora_rank, kv_lora_rank = (
            config["num_attention_heads"], config["q_lora_rank"], config["kv_lora_rank"],
        )  # fmt: skip
        nope, rope, v_head_dim = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
        # Gain 1.5: scores spread enough that their scale matters (the mscale^2 factor of YaRN must show).
        if q_lora_rank is None:
            yield f"{prefix}.q_proj.weight", matrix(num_heads * (nope + rope), hidden_size, 1.5)
        else:
            yield f"{prefix}.q_a_proj.weight", matrix(q_lora_rank, hidden_size)
            yield f"{prefix}.q_a_layernorm.weight", norm(q_lora_rank)
            yield f"{prefix}.q_b_proj.weight", matrix(num_heads * (nope + rope), q_lora_rank, 1.5)
        yield f"{prefix}.kv_a_proj_with_mqa.weight", matrix(kv_lora_rank + rope, hidden_size, 1.5)
        yield f"{prefix}.kv_a_layernorm.weight", norm(kv_lora_rank)
        yield f"{prefix}.kv_b_proj.weight", matrix(num_heads * (nope + v_head_dim), kv_lora_rank)
        yield f"{prefix}.o_proj.weight", matrix(hidden_size, num_heads * v_head_dim)

    def layer(layer_id: int) -> Iterator[tuple[str, torch.Tensor]]:
        prefix = f"model.layers.{layer_id}"
        yield f"{prefix}.input_layernorm.weight", norm(hidden_size)
        yield f"{prefix}.post_attention_layernorm.weight", norm(hidden_size)
        yield from attention(f"{prefix}.self_attn")
        if layer_id < config["first_k_dense_replace"]:
            yield from mlp(f"{prefix}.mlp", config["intermediate_size"])
            return
        num_experts = config["n_routed_experts"]
        yield f"{prefix}.mlp.gate.weight", matrix(num_experts, hidden_size, 2.0)
        if config["topk_method"] == "noaux_tc":
            # Mostly negative, so that many choices lie below 0: masking with 0 instead of -inf must show.
            bias = 0.3 * torch.randn(num_experts, generator=generator) - 0.6
            yield f"{prefix}.mlp.gate.e_score_correction_bias", bias
        for expert_id in range(num_experts):
            yield from mlp(f"{prefix}.mlp.experts.{expert_id}", config["moe_intermediate_size"])
        if config["n_shared_experts"]:
            yield from mlp(f"{prefix}.mlp.shared_experts", config["moe_intermediate_size"] * config["n_shared_experts"])

    embed_tokens = matrix(vocab_size, hidden_size, math.sqrt(hidden_size))
    lm_head = matrix(vocab_size, hidden_size, logit_gain)
    yield "model.embed_tokens.weight", embed_tokens
    for layer_id in range(config["num_hidden_layers"]):
        yield from layer(layer_id)
    yield "model.norm.weight", norm(hidden_size)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", lm_head
    for index in range(config.get("num_nextn_predict_layers") or 0):
        layer_id = config["num_hidden_layers"] + index
        prefix = f"model.layers.{layer_id}"
        if mtp_copies:
            yield f"{prefix}.embed_tokens.weight", embed_tokens.clone()
            yield f"{prefix}.shared_head.head.weight", lm_head.clone()
        yield f"{prefix}.enorm.weight", norm(hidden_size)
        yield f"{prefix}.hnorm.weight", norm(hidden_size)
        yield f"{prefix}.eh_proj.weight", matrix(hidden_size, 2 * hidden_size)
        yield f"{prefix}.shared_head.norm.weight", norm(hidden_size)
        yield from layer(layer_id)


def _is_quantized(name: str) -> bool:
    """Whether the published FP8 checkpoints store this tensor in FP8."""
    return name.endswith(("_proj.weight", "_proj_with_mqa.weight")) and not name.endswith("eh_proj.weight")


def _vary_blocks(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Scale every 128x128 block by a half, 1 or 2, so that no two blocks may be confused, ue8m0 scales included."""
    num_blocks = [math.ceil(size / FP8_BLOCK) for size in weight.shape]
    factors = torch.exp2(torch.randint(-1, 2, num_blocks, generator=generator).float())
    return weight.to(torch.float32) * _expand_scale(factors, weight.shape)


def _quantize(weight: torch.Tensor, *, ue8m0: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """[out, in] -> e4m3 of the same shape and float32 scale_inv [ceil(out / 128), ceil(in / 128)]."""
    values = weight.to(torch.float32)
    num_block_rows, num_block_columns = (math.ceil(size / FP8_BLOCK) for size in values.shape)
    scale_inv = torch.empty(num_block_rows, num_block_columns)
    for row in range(num_block_rows):
        for column in range(num_block_columns):
            block = values[row * FP8_BLOCK : (row + 1) * FP8_BLOCK, column * FP8_BLOCK : (column + 1) * FP8_BLOCK]
            scale = block.abs().max().item() / FP8_MAX
            scale_inv[row, column] = 2.0 ** math.ceil(math.log2(scale)) if ue8m0 else scale
    quotient = values / _expand_scale(scale_inv, values.shape)
    return quotient.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale_inv


def _expand_scale(scale_inv: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """[ceil(out / 128), ceil(in / 128)] -> [out, in]."""
    rows = scale_inv.repeat_interleave(FP8_BLOCK, dim=0)[: shape[0]]
    return rows.repeat_interleave(FP8_BLOCK, dim=1)[:, : shape[1]]


def _write_shards(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """Deal the tensors out to `shards` files in runs; with two or more, some scales leave their weight's file."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map = {
        name: f"model-{position * shards // len(names) + 1:05d}-of-{shards:05d}.safetensors"
        for position, name in enumerate(names)
    }
    scales = [name for name in names if name.endswith("_scale_inv")]
    for name in scales[::5]:
        # Every fifth scale goes to the file after its weight's, as happens at the seams of a published checkpoint.
        shard_number = int(weight_map[name.removesuffix("_scale_inv")].split("-")[1])
        weight_map[name] = f"model-{shard_number % shards + 1:05d}-of-{shards:05d}.safetensors"
    for file_name in sorted(set(weight_map.values())):
        in_file = {name: tensors[name] for name in names if weight_map[name] == file_name}
        save_file(in_file, folder / file_name, metadata={"format": "pt"})
    total_size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total_size}, "weight_map": weight_map},
    )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
