"""The model's shape: a checked, frozen reading of a Hugging Face config.json.

Both sides read it: the router for attention and the gate, an expert group for the sizes of its experts.
It knows nothing of tensors or files other than config.json and generation_config.json, and must not import
torch, so that the HTTP process can use it. Whatever it accepts is served as the config says; everything else
is refused by name here, before a byte of weights is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from experts.errors import ConfigError

ModelType = Literal["deepseek_v3", "deepseek_v2"]
TopkMethod = Literal["noaux_tc", "greedy", "group_limited_greedy"]
ScoringFunc = Literal["sigmoid", "softmax"]

# Kimi-K2 is published with a model_type of its own, yet names DeepseekV3ForCausalLM as its architecture.
_MODEL_TYPES: Mapping[str, ModelType] = {
    "deepseek_v3": "deepseek_v3",
    "kimi_k2": "deepseek_v3",
    "deepseek_v2": "deepseek_v2",
}
_ARCHITECTURES: Mapping[ModelType, str] = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
}
# A method comes with the score that its formula is defined for; transformers writes neither for a V3 model.
_SCORING_OF_METHOD: Mapping[str, ScoringFunc] = {
    "noaux_tc": "sigmoid",
    "greedy": "softmax",
    "group_limited_greedy": "softmax",
}
_ROPE_TYPES = ("default", "yarn")
_LFS_POINTER_START = "version https://git-lfs.github.com/spec/"


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN parameters, named as in config.json."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclass(frozen=True, slots=True)
class Fp8Quantization:
    """Block-wise FP8 e4m3 weights: one float scale per weight_block_size = (rows, columns)."""

    weight_block_size: tuple[int, int]
    scale_fmt: str | None
    """"ue8m0" when scales are powers of two; None when the config does not say."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and choices of one model; field names are those of config.json."""

    model_type: ModelType
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    moe_layer_freq: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    """0 when the model has none (null in config.json)."""
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    topk_method: TopkMethod
    scoring_func: ScoringFunc
    norm_topk_prob: bool
    routed_scaling_factor: float
    num_attention_heads: int
    q_lora_rank: int | None
    """None: queries are projected directly by q_proj."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: YarnScaling | None
    """None: plain rotary embedding."""
    max_position_embeddings: int
    num_nextn_predict_layers: int
    """Number of MTP layers, stored behind the main layers."""
    tie_word_embeddings: bool
    attention_bias: bool
    quantization: Fp8Quantization | None
    """None: no tensor of the checkpoint is quantised."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @staticmethod
    def from_folder(folder: str | Path) -> ModelConfig:
        """Read config.json and, where present, generation_config.json. Raises ConfigError."""
        folder = Path(folder)
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder (give the folder of a Hugging Face checkpoint)")
        config = load_json_object(folder / "config.json")
        generation_path = folder / "generation_config.json"
        generation = load_json_object(generation_path) if generation_path.exists() else {}
        return ModelConfig.from_dict(config, generation)

    @staticmethod
    def from_dict(config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> ModelConfig:
        """Check the content of config.json. generation_config adds ids that end a text. Raises ConfigError."""
        return _read_model_config(
            _Fields(config, "config.json"), _Fields(generation_config or {}, "generation_config.json")
        )

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_layers_total(self) -> int:
        """Main layers and MTP layers."""
        return self.num_hidden_layers + self.num_nextn_predict_layers

    def is_moe_layer(self, layer_id: int) -> bool:
        return layer_id >= self.first_k_dense_replace and layer_id % self.moe_layer_freq == 0

    @property
    def moe_layer_ids(self) -> tuple[int, ...]:
        """Layers with routed experts, MTP layers included, ascending."""
        return tuple(layer_id for layer_id in range(self.num_layers_total) if self.is_moe_layer(layer_id))


def load_json_object(path: Path) -> dict[str, Any]:
    """Load a JSON file that holds one object. Raises ConfigError naming the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path.name}: missing from {path.parent} (copy the whole checkpoint folder)") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name}: cannot be read: {error}") from error
    if text.startswith(_LFS_POINTER_START):
        raise ConfigError(f"{path.name}: is a Git LFS pointer, not the file itself (run `git lfs pull` in the folder)")
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path.name}: is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path.name}: must hold a JSON object, found {type(value).__name__}")
    return cast("dict[str, Any]", value)


class _Fields:
    """Typed access to a JSON object whose every refusal names file, field, value and what was expected."""

    def __init__(self, values: Mapping[str, Any], file: str, prefix: str = "") -> None:
        self._values = values
        self._file = file
        self._prefix = prefix

    def get(self, name: str) -> Any:
        """The raw value; None when absent, as config.json writes null for "none"."""
        return self._values.get(name)

    def refuse(self, name: str, expected: str) -> ConfigError:
        found = f"is {json.dumps(self._values[name])[:80]}" if name in self._values else "is missing"
        return ConfigError(f"{self._file}: {self._prefix}{name} {found}; {expected}")

    def integer(self, name: str, *, minimum: int = 1, default: int | None = None) -> int:
        value = self.optional_integer(name, minimum=minimum)
        if value is None:
            if default is None:
                raise self.refuse(name, f"expected an integer of at least {minimum}")
            return default
        return value

    def optional_integer(self, name: str, *, minimum: int = 1) -> int | None:
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.refuse(name, f"expected an integer of at least {minimum}")
        return value

    def number(self, name: str, *, default: float | None = None, minimum: float = 0.0) -> float:
        value = self.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < minimum:
            raise self.refuse(name, f"expected a number of at least {minimum:g}")
        return float(value)

    def boolean(self, name: str, *, default: bool) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(name, "expected true or false")
        return value

    def choice(self, name: str, supported: tuple[str, ...], *, default: str | None = None) -> str:
        value = self.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or value not in supported:
            raise self.refuse(name, f"supported: {', '.join(supported)}")
        return value

    def table(self, name: str) -> _Fields | None:
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.refuse(name, "expected an object or null")
        return _Fields(cast("dict[str, Any]", value), self._file, f"{self._prefix}{name}.")

    def token_ids(self, name: str) -> tuple[int, ...]:
        value = self.get(name)
        if value is None:
            return ()
        items = cast("list[Any]", value) if isinstance(value, list) else [value]
        if not all(_is_count(item) for item in items):
            raise self.refuse(name, "expected a token id or a list of token ids")
        return tuple(items)


def _is_count(value: Any) -> bool:
    """Tell a JSON integer from 0 on; true and false are integers to Python, but none here."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _read_model_config(config: _Fields, generation: _Fields) -> ModelConfig:
    model_type = _MODEL_TYPES[config.choice("model_type", tuple(_MODEL_TYPES))]
    _check_architecture(config, model_type)
    config.choice("hidden_act", ("silu",), default="silu")
    for flag, wanted in (("attention_bias", False), ("mlp_bias", False), ("rope_interleave", True)):
        if config.boolean(flag, default=wanted) is not wanted:
            raise config.refuse(flag, f"only {json.dumps(wanted)} is supported")

    topk_method, scoring_func = _read_gate_choice(config, model_type)
    rope_theta, rope_scaling = _read_rope(config)
    num_nextn_predict_layers = config.optional_integer("num_nextn_predict_layers", minimum=0)
    if num_nextn_predict_layers is None:
        # transformers 5 writes the same count under a name of its own.
        num_nextn_predict_layers = config.integer("num_mtp_layers", minimum=0, default=0)
    eos_token_ids = dict.fromkeys([*config.token_ids("eos_token_id"), *generation.token_ids("eos_token_id")])

    result = ModelConfig(
        model_type=model_type,
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        num_hidden_layers=config.integer("num_hidden_layers"),
        first_k_dense_replace=config.integer("first_k_dense_replace", minimum=0),
        moe_layer_freq=config.integer("moe_layer_freq", default=1),
        intermediate_size=config.integer("intermediate_size"),
        moe_intermediate_size=config.integer("moe_intermediate_size"),
        n_routed_experts=config.integer("n_routed_experts"),
        n_shared_experts=config.integer("n_shared_experts", minimum=0, default=0),
        num_experts_per_tok=config.integer("num_experts_per_tok"),
        n_group=config.integer("n_group", default=1),
        topk_group=config.integer("topk_group", default=1),
        topk_method=topk_method,
        scoring_func=scoring_func,
        norm_topk_prob=config.boolean("norm_topk_prob", default=model_type == "deepseek_v3"),
        routed_scaling_factor=config.number("routed_scaling_factor", default=1.0),
        num_attention_heads=config.integer("num_attention_heads"),
        q_lora_rank=config.optional_integer("q_lora_rank"),
        kv_lora_rank=config.integer("kv_lora_rank"),
        qk_nope_head_dim=config.integer("qk_nope_head_dim"),
        qk_rope_head_dim=config.integer("qk_rope_head_dim", minimum=2),
        v_head_dim=config.integer("v_head_dim"),
        rms_norm_eps=config.number("rms_norm_eps", default=1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position_embeddings=config.integer("max_position_embeddings"),
        num_nextn_predict_layers=num_nextn_predict_layers,
        tie_word_embeddings=config.boolean("tie_word_embeddings", default=False),
        attention_bias=False,
        quantization=_read_quantization(config),
        bos_token_id=config.optional_integer("bos_token_id", minimum=0),
        eos_token_ids=tuple(eos_token_ids),
    )
    _check_consistency(config, result)
    return result


def _check_architecture(config: _Fields, model_type: ModelType) -> None:
    architectures = config.get("architectures")
    if architectures is not None and architectures != [_ARCHITECTURES[model_type]]:
        raise config.refuse("architectures", f'supported for {model_type}: ["{_ARCHITECTURES[model_type]}"]')


def _read_gate_choice(config: _Fields, model_type: ModelType) -> tuple[TopkMethod, ScoringFunc]:
    default_method = "noaux_tc" if model_type == "deepseek_v3" else "greedy"
    method: Any = config.choice("topk_method", tuple(_SCORING_OF_METHOD), default=default_method)
    scoring_func = _SCORING_OF_METHOD[method]
    if config.choice("scoring_func", ("sigmoid", "softmax"), default=scoring_func) != scoring_func:
        raise config.refuse("scoring_func", f"supported with topk_method {method}: {scoring_func}")
    return method, scoring_func


def _read_rope(config: _Fields) -> tuple[float, YarnScaling | None]:
    """Read base and scaling, published as rope_theta and rope_scaling, newer as rope_parameters."""
    parameters = config.table("rope_parameters")
    base = parameters if parameters is not None and parameters.get("rope_theta") is not None else config
    rope_theta = base.number("rope_theta", default=10000.0, minimum=1.0)
    scaling = parameters if parameters is not None else config.table("rope_scaling")
    if scaling is None:
        return rope_theta, None
    type_field = "rope_type" if scaling.get("rope_type") is not None else "type"
    if scaling.choice(type_field, _ROPE_TYPES, default="default") == "default":
        return rope_theta, None
    if scaling.get("attention_factor") is not None:
        raise scaling.refuse("attention_factor", "not supported; it follows from mscale and mscale_all_dim")
    if scaling.boolean("truncate", default=True) is not True:
        raise scaling.refuse("truncate", "only true is supported")
    # Defaults as in the published modeling code; without mscale_all_dim the softmax scale is not corrected.
    return rope_theta, YarnScaling(
        factor=scaling.number("factor", minimum=1.0),
        original_max_position_embeddings=scaling.integer("original_max_position_embeddings"),
        beta_fast=scaling.number("beta_fast", default=32.0),
        beta_slow=scaling.number("beta_slow", default=1.0),
        mscale=scaling.number("mscale", default=1.0),
        mscale_all_dim=scaling.number("mscale_all_dim", default=0.0),
    )


def _read_quantization(config: _Fields) -> Fp8Quantization | None:
    quantization = config.table("quantization_config")
    if quantization is None:
        return None
    quantization.choice("quant_method", ("fp8",))
    quantization.choice("fmt", ("e4m3",), default="e4m3")
    quantization.choice("activation_scheme", ("dynamic",), default="dynamic")
    block = quantization.get("weight_block_size")
    sizes = cast("list[Any]", block) if isinstance(block, list) else []
    if len(sizes) != 2 or not all(_is_count(size) and size > 0 for size in sizes):
        raise quantization.refuse("weight_block_size", "expected [rows, columns], as [128, 128]")
    scale_fmt = quantization.choice("scale_fmt", ("ue8m0", "float"), default="float")
    return Fp8Quantization((sizes[0], sizes[1]), None if scale_fmt == "float" else scale_fmt)


def _check_consistency(config: _Fields, result: ModelConfig) -> None:
    if result.qk_rope_head_dim % 2:
        raise config.refuse("qk_rope_head_dim", "expected an even number")
    if result.n_routed_experts % result.n_group:
        raise config.refuse("n_group", f"expected a divisor of n_routed_experts = {result.n_routed_experts}")
    if result.topk_group > result.n_group:
        raise config.refuse("topk_group", f"expected at most n_group = {result.n_group}")
    experts_per_gate_group = result.n_routed_experts // result.n_group
    if result.topk_method == "noaux_tc" and result.n_group > 1 and experts_per_gate_group < 2:
        raise config.refuse(
            "n_group", "noaux_tc scores a gate group by its two best experts; expected at least 2 in each"
        )
    eligible = result.n_routed_experts
    if result.topk_method != "greedy":
        eligible = experts_per_gate_group * result.topk_group
    if result.num_experts_per_tok > eligible:
        raise config.refuse(
            "num_experts_per_tok", f"expected at most the {eligible} experts that the gate may choose from"
        )
    for token_id in (result.bos_token_id, *result.eos_token_ids):
        if token_id is not None and token_id >= result.vocab_size:
            raise ConfigError(f"config.json: token id {token_id} is not below vocab_size = {result.vocab_size}")
