"""The demo model in plain torch: a trainable twin of the DeepSeek-V3 architecture, in the order of the paper.

It exists because serving engines run the absorbed, cached form of attention and routed experts, which is awkward to
differentiate. This file has neither cache nor kernels: attention is expanded, and experts are computed all at once and
weighted with zeros for those not chosen, which on a CPU with matrix units is quicker to train than sorting tokens,
and drops none. It knows nothing of files; `export.py` maps its parameters to the published names, which it follows
except that a layer's routed experts are stacked in one tensor.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DemoConfig:
    """Sizes, spelled as in config.json. kv_a_proj's 160 rows leave a partial FP8 block, on purpose."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 5
    first_k_dense_replace: int = 1
    intermediate_size: int = 768
    moe_intermediate_size: int = 128
    n_routed_experts: int = 16
    n_shared_experts: int = 1
    num_experts_per_tok: int = 4
    n_group: int = 4
    topk_group: int = 2
    routed_scaling_factor: float = 2.5
    num_attention_heads: int = 8
    q_lora_rank: int = 128
    kv_lora_rank: int = 128
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 32
    v_head_dim: int = 32
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 4096
    num_nextn_predict_layers: int = 1
    bos_token_id: int = 0
    eos_token_id: int = 1

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def to_published(self) -> dict:
        """The config.json of the checkpoint: these sizes and the constants of the architecture."""
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            **asdict(self),
            "num_key_value_heads": self.num_attention_heads,
            "head_dim": self.qk_rope_head_dim,
            "moe_layer_freq": 1,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "rope_scaling": None,
            "rope_interleave": True,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "tie_word_embeddings": False,
            "use_cache": True,
            "pad_token_id": 2,
            "torch_dtype": "bfloat16",
            "quantization_config": {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": [128, 128],
            },
        }


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return (x * self.weight.float()).to(hidden_states.dtype)


def rotary_table(config: DemoConfig, num_positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin, each [num_positions, qk_rope_head_dim / 2] float32."""
    dims = torch.arange(0, config.qk_rope_head_dim, 2).float()
    inv_freq = config.rope_theta ** (-dims / config.qk_rope_head_dim)
    angles = torch.outer(torch.arange(num_positions).float(), inv_freq)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the interleaved pairs (2i, 2i + 1) of x [batch, seq, heads, qk_rope_head_dim] by its position's angle."""
    pairs = x.float().unflatten(-1, (-1, 2))  # [batch, seq, heads, qk_rope_head_dim / 2, 2]
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q, k: [batch, heads, seq, qk_head_dim]; v: [batch, heads, seq, v_head_dim]. Returns v's shape.

    The fused kernel wants one head size: pad v with zeros and cut them off again."""
    padded = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
    return F.scaled_dot_product_attention(q, k, padded, is_causal=True, scale=scale)[..., : v.shape[-1]]


class Attention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2 report, section 2.1), expanded to ordinary heads."""

    def __init__(self, config: DemoConfig):
        super().__init__()
        c = self.config = config
        heads = c.num_attention_heads
        self.q_a_proj = nn.Linear(c.hidden_size, c.q_lora_rank, bias=False)
        self.q_a_layernorm = RMSNorm(c.q_lora_rank, c.rms_norm_eps)
        self.q_b_proj = nn.Linear(c.q_lora_rank, heads * c.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, c.rms_norm_eps)
        self.kv_b_proj = nn.Linear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * c.v_head_dim, c.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c, heads = self.config, self.config.num_attention_heads
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states))).unflatten(-1, (heads, -1))
        q_nope, q_pe = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        kv = self.kv_a_proj_with_mqa(hidden_states)
        latent, k_pe = kv.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (heads, -1))
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        q_pe = rotate(q_pe, cos, sin)
        k_pe = rotate(k_pe.unsqueeze(-2), cos, sin).expand(-1, -1, heads, -1)
        q = torch.cat([q_nope, q_pe], -1).transpose(1, 2)  # [batch, heads, seq, qk_head_dim]
        k = torch.cat([k_nope, k_pe], -1).transpose(1, 2)
        out = causal_attention(q, k, v.transpose(1, 2), c.qk_head_dim**-0.5)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """Choose experts per token (DeepSeek-V3 report, 2.1.2): biased scores choose, unbiased weight."""

    def __init__(self, config: DemoConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        # A buffer: moved by the balancing rule of train.py, never by a gradient.
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, hidden_size]. Returns float32 [num_tokens, n_routed_experts], zero if not chosen."""
        c = self.config
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        choice = scores.detach() + self.e_score_correction_bias
        groups = choice.unflatten(-1, (c.n_group, -1))  # [num_tokens, n_group, n_routed_experts / n_group]
        best_groups = groups.topk(2, -1).values.sum(-1).topk(c.topk_group, -1).indices
        kept = torch.zeros_like(groups[..., 0]).scatter(1, best_groups, 1.0) > 0
        choice = groups.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
        topk_ids = choice.topk(c.num_experts_per_tok, -1).indices
        weights = scores * torch.zeros_like(scores).scatter(1, topk_ids, 1.0)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * c.routed_scaling_factor


class Experts(nn.Module):
    """All routed experts of a layer. The unchosen get weight zero: exact, dropless, and three large products."""

    def __init__(self, config: DemoConfig):
        super().__init__()
        e, h, i = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(e, i, h))
        self.up_proj = nn.Parameter(torch.empty(e, i, h))
        self.down_proj = nn.Parameter(torch.empty(e, h, i))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        inner = F.silu(F.linear(x, self.gate_proj.flatten(0, 1))) * F.linear(x, self.up_proj.flatten(0, 1))
        inner = (inner.unflatten(-1, (weights.shape[-1], -1)) * weights.unsqueeze(-1)).to(x.dtype).flatten(-2)
        return F.linear(inner, self.down_proj.transpose(0, 1).flatten(1))


class MoE(nn.Module):
    def __init__(self, config: DemoConfig):
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        self.shared_experts = Mlp(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the output and the number of tokens each expert got, [n_routed_experts]."""
        tokens = x.flatten(0, 1)
        weights = self.gate(tokens)
        return (self.experts(tokens, weights) + self.shared_experts(tokens)).view_as(x), (weights > 0).sum(0)


class Layer(nn.Module):
    def __init__(self, config: DemoConfig, layer_id: int):
        super().__init__()
        c = config
        self.self_attn = Attention(c)
        dense = layer_id < c.first_k_dense_replace
        self.mlp = Mlp(c.hidden_size, c.intermediate_size) if dense else MoE(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor | None]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out = self.mlp(self.post_attention_layernorm(x))
        out, load = out if isinstance(out, tuple) else (out, None)
        return x + out, load


class SharedHead(nn.Module):
    """Only the norm: the head itself is the main one, shared with the trunk."""

    def __init__(self, config: DemoConfig):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MtpLayer(Layer):
    """Multi-token prediction (DeepSeek-V3 report, section 2.2): from the trunk's state and token t+1, predict t+2."""

    def __init__(self, config: DemoConfig, layer_id: int):
        super().__init__(config, layer_id)
        c = config
        self.enorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.hnorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * c.hidden_size, c.hidden_size, bias=False)
        self.shared_head = SharedHead(c)


class Trunk(nn.Module):
    def __init__(self, config: DemoConfig):
        super().__init__()
        c = config
        last = c.num_hidden_layers
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        layers = [Layer(c, layer_id) for layer_id in range(last)]
        layers += [MtpLayer(c, last + depth) for depth in range(c.num_nextn_predict_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class DemoModel(nn.Module):
    """Parameter names are the published ones but for the stacked experts."""

    def __init__(self, config: DemoConfig):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        cos, sin = rotary_table(config, config.max_position_embeddings)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def hidden(self, input_ids: Tensor, next_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """input_ids, next_ids: [batch, seq], the second one token later.

        Returns the head's inputs for token t+1 and (MTP) t+2, each [batch, seq, hidden_size], and the loads
        [num MoE layers + 1, n_routed_experts]. The MTP layer reads the trunk's state *before* model.norm."""
        trunk = self.model
        cos, sin = self.cos[: input_ids.shape[1]], self.sin[: input_ids.shape[1]]
        x, loads = trunk.embed_tokens(input_ids), []
        for layer in trunk.layers[: self.config.num_hidden_layers]:
            x, load = layer(x, cos, sin)
            loads += [] if load is None else [load]
        mtp = trunk.layers[self.config.num_hidden_layers]
        following = mtp.enorm(trunk.embed_tokens(next_ids))
        y, load = mtp(mtp.eh_proj(torch.cat([following, mtp.hnorm(x)], -1)), cos, sin)
        return trunk.norm(x), mtp.shared_head.norm(y), torch.stack([*loads, load])

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tokens: [batch, seq + 2]. Returns mean loss of t+1, mean MTP loss of t+2, and the loads of `hidden`."""
        main, mtp, loads = self.hidden(tokens[:, :-2], tokens[:, 1:-1])
        return self._loss(main, tokens[:, 1:-1]), self._loss(mtp, tokens[:, 2:]), loads

    def _loss(self, hidden_states: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.lm_head(hidden_states).flatten(0, 1).float(), targets.flatten())

    def init_weights_(self, generator: torch.Generator) -> None:
        """Normal, fan-in scaled; what writes to the residual stream starts smaller, by depth."""
        depth = (2 * len(self.model.layers)) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                continue
            std = 0.7 * parameter.shape[-1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                std *= depth
            if name == "model.embed_tokens.weight":
                std = 0.3
            if name == "lm_head.weight":
                std = 0.005
            with torch.no_grad():
                parameter.normal_(0.0, std, generator=generator)
