"""What config.json may say, and that everything else is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experts.errors import ConfigError
from experts.model_config import Fp8Quantization, ModelConfig, YarnScaling
from tests.random_checkpoint import build_config

PUBLISHED_YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def test_reads_the_published_v3_config() -> None:
    config = ModelConfig.from_dict(
        {
            "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "vocab_size": 129280,
            "hidden_size": 7168, "num_hidden_layers": 61, "first_k_dense_replace": 3, "intermediate_size": 18432,
            "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
            "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
            "norm_topk_prob": True, "routed_scaling_factor": 2.5, "num_attention_heads": 128, "q_lora_rank": 1536,
            "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
            "rms_norm_eps": 1e-6, "rope_theta": 10000, "max_position_embeddings": 163840,
            "rope_scaling": PUBLISHED_YARN, "num_nextn_predict_layers": 1, "tie_word_embeddings": False,
            "bos_token_id": 0, "eos_token_id": 1, "quantization_config": {
                "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                "weight_block_size": [128, 128], "scale_fmt": "ue8m0",
            },
        },
        {"eos_token_id": [1, 7]},
    )  # fmt: skip
    assert config.qk_head_dim == 192
    assert config.num_layers_total == 62
    assert config.moe_layer_ids == tuple(range(3, 62))
    assert config.rope_scaling == YarnScaling(40.0, 4096, 32.0, 1.0, 1.0, 1.0)
    assert config.quantization == Fp8Quantization((128, 128), "ue8m0")
    assert config.eos_token_ids == (1, 7)


def test_what_transformers_leaves_out_of_a_v3_config_has_the_published_meaning() -> None:
    values = build_config()
    for name in ("topk_method", "scoring_func", "num_nextn_predict_layers", "rope_scaling", "rope_theta"):
        del values[name]
    values["rope_parameters"] = {**PUBLISHED_YARN, "rope_type": "yarn", "rope_theta": 50000.0}
    values["num_mtp_layers"] = 2
    config = ModelConfig.from_dict(values)
    assert (config.topk_method, config.scoring_func) == ("noaux_tc", "sigmoid")
    assert config.rope_theta == 50000.0
    assert config.rope_scaling is not None and config.rope_scaling.factor == 40.0
    assert config.num_nextn_predict_layers == 2


def test_v2_lite_and_kimi_k2_are_served() -> None:
    v2 = ModelConfig.from_dict(build_config(model_type="deepseek_v2"))
    assert (v2.q_lora_rank, v2.topk_method, v2.scoring_func, v2.norm_topk_prob) == (None, "greedy", "softmax", False)
    kimi = ModelConfig.from_dict({**build_config(n_group=1, topk_group=1), "model_type": "kimi_k2"})
    assert kimi.model_type == "deepseek_v3"


def test_moe_layer_freq_skips_layers() -> None:
    config = ModelConfig.from_dict(build_config(num_hidden_layers=6, first_k_dense_replace=1, moe_layer_freq=2))
    assert config.moe_layer_ids == (2, 4)


def test_null_shared_experts_means_none() -> None:
    assert ModelConfig.from_dict(build_config(n_shared_experts=None)).n_shared_experts == 0


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "llama"}, 'model_type is "llama"; supported: deepseek_v3, kimi_k2, deepseek_v2'),
    ({"architectures": ["LlamaForCausalLM"]}, "architectures"),
    ({"topk_method": "random"}, 'topk_method is "random"; supported: noaux_tc, greedy, group_limited_greedy'),
    ({"scoring_func": "softmax"}, "scoring_func"),
    ({"hidden_act": "gelu"}, 'hidden_act is "gelu"; supported: silu'),
    ({"attention_bias": True}, "attention_bias is true; only false is supported"),
    ({"rope_interleave": False}, "rope_interleave is false"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, 'rope_scaling.type is "linear"; supported: default, yarn'),
    ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.factor is missing"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type"),
    ({"quantization_config": {"quant_method": "awq"}}, 'quantization_config.quant_method is "awq"; supported: fp8'),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config.weight_block_size is missing"),
    (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 0]}},
        "quantization_config.weight_block_size",
    ),
    (
        {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": [1, 1]}},
        "activation_scheme",
    ),
    ({"hidden_size": "64"}, 'hidden_size is "64"; expected an integer of at least 1'),
    ({"hidden_size": True}, "hidden_size"),
    ({"hidden_size": None}, "hidden_size"),
    ({"n_group": 3}, "n_group is 3; expected a divisor of n_routed_experts = 16"),
    ({"topk_group": 5}, "topk_group"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9; expected at most the 8 experts"),
    ({"eos_token_id": 320}, "token id 320 is not below vocab_size"),
    ({"eos_token_id": ["x"]}, "eos_token_id"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refuses_by_name(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict({**build_config(), **overrides})
    assert message in str(caught.value)
    assert str(caught.value).startswith("config.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json: missing"),
        ("{", "config.json: is not valid JSON"),
        ("[]", "config.json: must hold a JSON object, found list"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "config.json: is a Git LFS pointer"),
    ],
)
def test_refuses_a_broken_config_file(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_folder(tmp_path)


def test_generation_config_adds_end_tokens(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(build_config(eos_token_id=1)))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}))
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (1, 5)


def test_importing_it_does_not_import_torch() -> None:
    code = "import sys, experts.model_config, experts.checkpoint, experts.check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
