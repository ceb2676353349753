"""The router's weights: everything but the routed experts, read tensor by tensor and packed for its products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.checkpoint import Checkpoint
from experts.device import CPU, check_device_memory
from experts.kernels.cpu_ffn import ScaledWeight
from experts.model_config import ModelConfig
from experts.tensor_names import list_trunk_tensors
from router.attention import AttentionWeights
from router.gate import GateWeights
from router.linear import Linear, LinearFactory, Mlp, PerHead, choose_linear_factory, expand


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer: either mlp (dense), or gate and shared_experts (None if the model has none)."""

    input_layernorm: Tensor
    attention: AttentionWeights
    post_attention_layernorm: Tensor
    mlp: Mlp | None
    gate: GateWeights | None
    shared_experts: Mlp | None


@dataclass(frozen=True)
class MtpWeights:
    """The first MTP layer; further ones are not used. enorm, hnorm, norm: [hidden_size] float32. eh_proj: from the
    embedding's and the hidden state's columns, in this order. embed_tokens, head: the trunk's own where the checkpoint
    has no copies or equal ones."""

    embed_tokens: Tensor
    enorm: Tensor
    hnorm: Tensor
    eh_proj: Linear
    layer: LayerWeights
    norm: Tensor
    head: Linear


@dataclass(frozen=True)
class TrunkWeights:
    """embed_tokens: [vocab_size, hidden_size] in the compute dtype, in host memory also where device is a card: a step
    reads one row of 14 KB per token, and 1.85 GB of DeepSeek-V3's would not fit beside the rest on a card of 24 GB.
    norm: [hidden_size] float32. device: of everything else. mtp: None where it was not asked for."""

    embed_tokens: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    lm_head: Linear
    device: torch.device = CPU
    mtp: MtpWeights | None = None


def load_trunk_weights(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    *,
    factory: LinearFactory | None = None,
    device: torch.device = CPU,
    with_mtp: bool = False,
    deterministic: bool = True,
    on_layer: Callable[[float], None] | None = None,
) -> TrunkWeights:
    """Read what a router needs, tensor by tensor to where it will be used. on_layer hears the fraction read.

    factory: of products on that device; None chooses the best one. with_mtp: the MTP layer, too. deterministic: without
    what only serves results whose last bits depend on the batch.

    Raises CheckpointError naming file and tensor, NotEnoughMemory before reading any.
    """
    config = checkpoint.config
    num_layers = config.num_hidden_layers + with_mtp
    _check_memory(checkpoint, num_layers, device)
    reader = _Reader(
        checkpoint, dtype, factory or choose_linear_factory(dtype, device, expands=not deterministic), device
    )
    layers: list[LayerWeights] = []
    for layer_id in range(config.num_hidden_layers):
        layers.append(_load_layer(reader, config, layer_id))
        if on_layer is not None:
            on_layer((layer_id + 1) / (num_layers + 1))
    embed_tokens = reader.dense("model.embed_tokens")
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    lm_head = reader.linear(head)
    weights = TrunkWeights(
        embed_tokens=embed_tokens,
        layers=tuple(layers),
        norm=reader.vector("model.norm.weight"),
        lm_head=lm_head,
        device=device,
        mtp=_load_mtp(reader, config, embed_tokens, head, lm_head) if with_mtp else None,
    )
    if on_layer is not None:
        on_layer(1.0)
    return weights


def _check_memory(checkpoint: Checkpoint, num_layers: int, device: torch.device) -> None:
    """Raise NotEnoughMemory, before anything is read, if not even the weights as stored will fit."""
    if device.type == "meta":
        return
    config = checkpoint.config
    stored_bytes = sum(
        checkpoint.info(tensor.name).size_bytes
        for tensor in list_trunk_tensors(config)
        if (tensor.layer_id is None or tensor.layer_id < num_layers) and checkpoint.has(tensor.name)
    )
    if device.type == "cuda" and not config.tie_word_embeddings:
        stored_bytes -= checkpoint.info("model.embed_tokens.weight").size_bytes
    check_device_memory(
        device, stored_bytes, "the router's weights", "run the router on a machine or a card with more memory"
    )


class _Reader:
    """Tensors by their published names, in the shapes that the config demands."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, factory: LinearFactory, device: torch.device
    ) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._dtype = dtype
        self._factory = factory
        self._shapes = {tensor.name: tensor.shape for tensor in list_trunk_tensors(checkpoint.config)}

    def vector(self, name: str) -> Tensor:
        """float32, whatever is stored."""
        return self._checkpoint.read_weight(name, self._shapes[name], torch.float32).to(self._device)

    def dense(self, module: str) -> Tensor:
        """[out, in] in the compute dtype, in host memory."""
        return expand(self._stored(module)).to(self._dtype)

    def linear(self, *modules: str) -> Linear:
        return self._factory.linear(*(self._stored(module) for module in modules))

    def gate(self, module: str) -> Linear:
        return self._factory.gate(self.vector(f"{module}.weight"))

    def mlp(self, module: str) -> Mlp:
        gate, up, down = (self._stored(f"{module}.{name}") for name in ("gate_proj", "up_proj", "down_proj"))
        return self._factory.mlp(gate, up, down)

    def per_head(self, module: str, num_heads: int, split: int) -> tuple[PerHead, PerHead]:
        return self._factory.per_head(self._stored(module), num_heads, split)

    def differs(self, module: str, main: str) -> bool:
        """Whether a module that may be a copy of another, or absent, has to be read for itself."""
        if not self._checkpoint.has(f"{module}.weight"):
            return False
        return not torch.equal(expand(self._stored(module)), expand(self._stored(main)))

    def _stored(self, module: str) -> ScaledWeight:
        name = f"{module}.weight"
        info = self._checkpoint.check_stored_weight(name, self._shapes[name])
        weight = self._checkpoint.read(name)
        quantization = self._checkpoint.config.quantization
        if info.dtype != "F8_E4M3" or quantization is None:
            return ScaledWeight(weight)
        return ScaledWeight(weight, self._checkpoint.read(f"{name}_scale_inv"), quantization.weight_block_size)


def _load_layer(reader: _Reader, config: ModelConfig, layer_id: int) -> LayerWeights:
    prefix = f"model.layers.{layer_id}"
    is_moe = config.is_moe_layer(layer_id)
    gate = None
    if is_moe:
        bias = reader.vector(f"{prefix}.mlp.gate.e_score_correction_bias") if config.topk_method == "noaux_tc" else None
        gate = GateWeights(projection=reader.gate(f"{prefix}.mlp.gate"), e_score_correction_bias=bias)
    return LayerWeights(
        input_layernorm=reader.vector(f"{prefix}.input_layernorm.weight"),
        attention=_load_attention(reader, config, f"{prefix}.self_attn"),
        post_attention_layernorm=reader.vector(f"{prefix}.post_attention_layernorm.weight"),
        mlp=None if is_moe else reader.mlp(f"{prefix}.mlp"),
        gate=gate,
        shared_experts=reader.mlp(f"{prefix}.mlp.shared_experts") if is_moe and config.n_shared_experts else None,
    )


def _load_mtp(reader: _Reader, config: ModelConfig, embed_tokens: Tensor, head: str, lm_head: Linear) -> MtpWeights:
    """embed_tokens, lm_head: the trunk's. head: the latter's name."""
    layer_id = config.num_hidden_layers
    prefix = f"model.layers.{layer_id}"
    if reader.differs(f"{prefix}.embed_tokens", "model.embed_tokens"):
        embed_tokens = reader.dense(f"{prefix}.embed_tokens")
    if reader.differs(f"{prefix}.shared_head.head", head):
        lm_head = reader.linear(f"{prefix}.shared_head.head")
    return MtpWeights(
        embed_tokens=embed_tokens,
        enorm=reader.vector(f"{prefix}.enorm.weight"),
        hnorm=reader.vector(f"{prefix}.hnorm.weight"),
        eh_proj=reader.linear(f"{prefix}.eh_proj"),
        layer=_load_layer(reader, config, layer_id),
        norm=reader.vector(f"{prefix}.shared_head.norm.weight"),
        head=lm_head,
    )


def _load_attention(reader: _Reader, config: ModelConfig, prefix: str) -> AttentionWeights:
    has_q_lora = config.q_lora_rank is not None
    w_uk, w_uv = reader.per_head(f"{prefix}.kv_b_proj", config.num_attention_heads, config.qk_nope_head_dim)
    return AttentionWeights(
        qkv_a_proj=reader.linear(
            f"{prefix}.q_a_proj" if has_q_lora else f"{prefix}.q_proj", f"{prefix}.kv_a_proj_with_mqa"
        ),
        q_a_layernorm=reader.vector(f"{prefix}.q_a_layernorm.weight") if has_q_lora else None,
        q_b_proj=reader.linear(f"{prefix}.q_b_proj") if has_q_lora else None,
        kv_a_layernorm=reader.vector(f"{prefix}.kv_a_layernorm.weight"),
        w_uk=w_uk,
        w_uv=w_uv,
        o_proj=reader.linear(f"{prefix}.o_proj"),
    )
