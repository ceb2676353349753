"""Which tensors a checkpoint must hold, with which shapes: the published naming, derived from the config alone.

The loaders of both sides and `check` read the same list. It knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from experts.model_config import ModelConfig


class TensorOwner(Enum):
    """Which process reads the tensor."""

    TRUNK = "trunk"
    EXPERTS = "experts"


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """One tensor that the config demands.

    quantizable: a matrix that may be FP8, then with scales under scale_name; otherwise it is stored plain.
    substitute: tensor to use when this one is absent; None if it must be present.
    layer_id, expert_id: None where the tensor belongs to no layer or to no routed expert.
    """

    name: str
    shape: tuple[int, ...]
    owner: TensorOwner
    quantizable: bool
    substitute: str | None = None
    layer_id: int | None = None
    expert_id: int | None = None

    @property
    def scale_name(self) -> str:
        return f"{self.name}_scale_inv"


def list_trunk_tensors(config: ModelConfig) -> Iterator[ExpectedTensor]:
    """Yield everything that a router reads: all but the routed experts, MTP layers included."""
    hidden = config.hidden_size
    yield _plain("model.embed_tokens.weight", (config.vocab_size, hidden))
    for layer_id in range(config.num_layers_total):
        if layer_id >= config.num_hidden_layers:
            yield from _list_mtp_tensors(config, layer_id)
        yield from _list_attention_tensors(config, layer_id)
        yield from _list_mlp_tensors(config, layer_id)
    yield _plain("model.norm.weight", (hidden,))
    head_substitute = "model.embed_tokens.weight" if config.tie_word_embeddings else None
    yield _plain("lm_head.weight", (config.vocab_size, hidden), substitute=head_substitute)


def list_expert_tensors(config: ModelConfig, layer_id: int, expert_id: int) -> tuple[ExpectedTensor, ...]:
    """The three matrices of one routed expert, sorted by name: down, gate, up."""
    prefix = f"model.layers.{layer_id}.mlp.experts.{expert_id}"
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    shapes = {"down_proj": (hidden, inner), "gate_proj": (inner, hidden), "up_proj": (inner, hidden)}
    return tuple(
        ExpectedTensor(
            f"{prefix}.{name}.weight",
            shape,
            TensorOwner.EXPERTS,
            quantizable=True,
            layer_id=layer_id,
            expert_id=expert_id,
        )
        for name, shape in shapes.items()
    )


def list_all_tensors(config: ModelConfig) -> Iterator[ExpectedTensor]:
    """Yield every tensor of the checkpoint but the scales."""
    yield from list_trunk_tensors(config)
    for layer_id in config.moe_layer_ids:
        for expert_id in range(config.n_routed_experts):
            yield from list_expert_tensors(config, layer_id, expert_id)


def _list_attention_tensors(config: ModelConfig, layer_id: int) -> Iterator[ExpectedTensor]:
    layer = f"model.layers.{layer_id}"
    attention = f"{layer}.self_attn"
    hidden, heads = config.hidden_size, config.num_attention_heads
    yield _plain(f"{layer}.input_layernorm.weight", (hidden,), layer_id)
    query_size = heads * config.qk_head_dim
    if config.q_lora_rank is None:
        yield _matrix(f"{attention}.q_proj.weight", (query_size, hidden), layer_id)
    else:
        yield _matrix(f"{attention}.q_a_proj.weight", (config.q_lora_rank, hidden), layer_id)
        yield _plain(f"{attention}.q_a_layernorm.weight", (config.q_lora_rank,), layer_id)
        yield _matrix(f"{attention}.q_b_proj.weight", (query_size, config.q_lora_rank), layer_id)
    latent_size = config.kv_lora_rank + config.qk_rope_head_dim
    yield _matrix(f"{attention}.kv_a_proj_with_mqa.weight", (latent_size, hidden), layer_id)
    yield _plain(f"{attention}.kv_a_layernorm.weight", (config.kv_lora_rank,), layer_id)
    key_value_size = heads * (config.qk_nope_head_dim + config.v_head_dim)
    yield _matrix(f"{attention}.kv_b_proj.weight", (key_value_size, config.kv_lora_rank), layer_id)
    yield _matrix(f"{attention}.o_proj.weight", (hidden, heads * config.v_head_dim), layer_id)
    yield _plain(f"{layer}.post_attention_layernorm.weight", (hidden,), layer_id)


def _list_mlp_tensors(config: ModelConfig, layer_id: int) -> Iterator[ExpectedTensor]:
    mlp = f"model.layers.{layer_id}.mlp"
    if not config.is_moe_layer(layer_id):
        yield from _list_ffn_tensors(mlp, config.hidden_size, config.intermediate_size, layer_id)
        return
    yield _plain(f"{mlp}.gate.weight", (config.n_routed_experts, config.hidden_size), layer_id)
    if config.topk_method == "noaux_tc":
        yield _plain(f"{mlp}.gate.e_score_correction_bias", (config.n_routed_experts,), layer_id)
    if config.n_shared_experts:
        inner = config.n_shared_experts * config.moe_intermediate_size
        yield from _list_ffn_tensors(f"{mlp}.shared_experts", config.hidden_size, inner, layer_id)


def _list_ffn_tensors(prefix: str, hidden: int, inner: int, layer_id: int) -> Iterator[ExpectedTensor]:
    yield _matrix(f"{prefix}.gate_proj.weight", (inner, hidden), layer_id)
    yield _matrix(f"{prefix}.up_proj.weight", (inner, hidden), layer_id)
    yield _matrix(f"{prefix}.down_proj.weight", (hidden, inner), layer_id)


def _list_mtp_tensors(config: ModelConfig, layer_id: int) -> Iterator[ExpectedTensor]:
    """What an MTP layer has besides an ordinary decoder layer. Its embedding and head are copies of the main ones."""
    layer = f"model.layers.{layer_id}"
    hidden = config.hidden_size
    copy_shape = (config.vocab_size, hidden)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    yield _plain(f"{layer}.embed_tokens.weight", copy_shape, layer_id, substitute="model.embed_tokens.weight")
    yield _plain(f"{layer}.enorm.weight", (hidden,), layer_id)
    yield _plain(f"{layer}.hnorm.weight", (hidden,), layer_id)
    yield _matrix(f"{layer}.eh_proj.weight", (hidden, 2 * hidden), layer_id)
    yield _plain(f"{layer}.shared_head.norm.weight", (hidden,), layer_id)
    yield _plain(f"{layer}.shared_head.head.weight", copy_shape, layer_id, substitute=head)


def _plain(
    name: str, shape: tuple[int, ...], layer_id: int | None = None, *, substitute: str | None = None
) -> ExpectedTensor:
    return ExpectedTensor(name, shape, TensorOwner.TRUNK, quantizable=False, substitute=substitute, layer_id=layer_id)


def _matrix(name: str, shape: tuple[int, ...], layer_id: int) -> ExpectedTensor:
    return ExpectedTensor(name, shape, TensorOwner.TRUNK, quantizable=True, layer_id=layer_id)
