"""Multi-head latent attention (DeepSeek-V2 report, section 2.1) over the latent cache, in torch.

For machines and dtypes that the CPU kernel (experts/kernels/cpu_layer.py) does not serve, and the reference that it is
tested against.

Absorbed form: keys and values are never expanded. W_UK moves into the query and W_UV behind the softmax, so a step
reads 576 values per token of context (DeepSeek-V3) whatever the number of heads:

    q_abs = q_nope @ W_UK;   score = (q_abs . c_kv + q_pe . k_pe) * scale;   o = (softmax(score) @ c_kv) @ W_UV^T

Letters in shapes: T tokens of the step, n new tokens of a sequence, C context, H heads, L kv_lora_rank, R rope dims.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from experts.model_config import ModelConfig
from router.block_pool import count_blocks
from router.cuda_attention import attend_tokens
from router.linear import Linear, PerHead, TorchPerHead
from router.norm import rms_norm
from router.rotary import apply_rotary
from router.step_batch import StepBatch

# The context is read in chunks at fixed absolute positions, so that a row's sums are grouped in the same way in
# prefill, decode and re-prefill, and scores stay in the cache.
CONTEXT_CHUNK = 512
# Rows of queries (tokens x heads) that are scored at once: 4096 x 512 float32 are 8 MiB.
QUERY_ROWS = 4096
# Longer contexts are read absorbed: 128 heads expand 8192 tokens to 0.7 GB of keys and values in bf16, and 163,840
# tokens to 14 GB.
EXPAND_UP_TO = 8192
# Fewer new tokens than this are cheaper absorbed, even where expanding is allowed.
EXPAND_FROM = 64


@dataclass(frozen=True)
class AttentionWeights:
    """One layer's attention; kv_b_proj is kept split per head.

    qkv_a_proj: hidden_size -> q_lora_rank + kv_lora_rank + qk_rope_head_dim, or with q_lora_rank None
        -> num_heads * qk_head_dim + kv_lora_rank + qk_rope_head_dim: one product for everything made of x.
    w_uk: qk_nope_head_dim -> kv_lora_rank;  w_uv: kv_lora_rank -> v_head_dim.
    """

    qkv_a_proj: Linear
    q_a_layernorm: Tensor | None
    q_b_proj: Linear | None
    kv_a_layernorm: Tensor
    w_uk: PerHead
    w_uv: PerHead
    o_proj: Linear


class Attention:
    """MLA of one layer. Writes the new rows to the layer's cache, then attends causally."""

    def __init__(
        self,
        config: ModelConfig,
        cache: Tensor,
        weights: AttentionWeights,
        softmax_scale: float,
        deterministic: bool,
    ) -> None:
        """cache: this layer's [num_blocks, BLOCK_SIZE, L + R].

        deterministic: every token is computed alone, with the products that decode makes, so that its bits do not
        depend on the rows beside it. Otherwise tokens share products, and long prefills expand keys and values."""
        self._config = config
        self._cache = cache
        self._weights = weights
        self._scale = softmax_scale
        self._deterministic = deterministic

    def forward(self, hidden_states: Tensor, rotations: Tensor, batch: StepBatch) -> Tensor:
        """hidden_states: [T, hidden_size] normed; rotations: [T, R / 2] complex64. Returns [T, hidden_size]."""
        config, weights = self._config, self._weights
        num_tokens, num_heads = hidden_states.shape[0], config.num_attention_heads
        q = self.fill_cache(hidden_states, rotations, batch)
        if weights.q_a_layernorm is not None and weights.q_b_proj is not None:
            q = weights.q_b_proj(rms_norm(q, weights.q_a_layernorm, config.rms_norm_eps))
        q = q.reshape(num_tokens, num_heads, config.qk_head_dim)  # [T, H, qk_head_dim]
        q_nope, q_pe = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        q_pe = apply_rotary(q_pe, rotations.unsqueeze(1))
        queries = torch.cat([self._per_head(q_nope, weights.w_uk), q_pe], dim=-1)  # [T, H, L + R]
        latents = queries.new_empty(num_tokens, num_heads, config.kv_lora_rank)  # [T, H, L]
        expanded: list[tuple[slice, Tensor]] = []
        expand = None
        if (
            not self._deterministic
            and isinstance(weights.w_uk, TorchPerHead)
            and isinstance(weights.w_uv, TorchPerHead)
        ):
            expand = weights.w_uk.weight, weights.w_uv.weight
        if queries.is_cuda:
            return weights.o_proj(self._attend_on_card(queries, batch).reshape(num_tokens, -1))
        for index, segment in enumerate(batch.segments):
            span = slice(segment.start, segment.start + segment.num_new)
            context_len = segment.context_len + segment.num_new
            block_ids = batch.block_tables[index, : count_blocks(context_len)]
            cache = self._cache[block_ids].flatten(0, 1)
            if expand is not None and segment.num_new >= EXPAND_FROM and context_len <= EXPAND_UP_TO:
                expanded.append((span, self._attend_expanded(q_nope[span], q_pe[span], cache[:context_len], *expand)))
            else:
                self._attend_absorbed(queries[span], cache[:context_len], out=latents[span])
        values = self._per_head(latents, weights.w_uv)  # [T, H, v_head_dim]
        for span, rows_of_span in expanded:
            values[span] = rows_of_span
        return weights.o_proj(values.reshape(num_tokens, -1))

    def fill_cache(self, hidden_states: Tensor, rotations: Tensor, batch: StepBatch) -> Tensor:
        """Write the rows' latents to the cache. Returns what the same product gives for the queries,
        [T, q_lora_rank or H * qk_head_dim]."""
        config, weights = self._config, self._weights
        projected = weights.qkv_a_proj(hidden_states)
        q_width = projected.shape[-1] - config.kv_lora_rank - config.qk_rope_head_dim
        q, c_kv, k_pe = projected.split([q_width, config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        c_kv = rms_norm(c_kv, weights.kv_a_layernorm, config.rms_norm_eps)
        rows = torch.cat([c_kv, apply_rotary(k_pe, rotations)], dim=-1)  # [T, L + R]
        self._cache.view(-1, rows.shape[1])[batch.slot_mapping] = rows
        return q

    def _attend_on_card(self, queries: Tensor, batch: StepBatch) -> Tensor:
        """queries: [T, H, L + R]. Returns [T, H, v_head_dim]."""
        latents = attend_tokens(queries, self._cache, batch, self._scale, self._config.kv_lora_rank)
        return self._weights.w_uv(latents)

    def _per_head(self, rows: Tensor, product: PerHead) -> Tensor:
        """rows: [T, H, in]. Returns [T, H, out]."""
        if not self._deterministic or not isinstance(product, TorchPerHead):
            return product(rows)
        # Products may depend on alignment too: always from memory of its own.
        return torch.cat([product(row.clone(memory_format=torch.contiguous_format)) for row in rows.split(1)])

    def _attend_absorbed(self, queries: Tensor, cache: Tensor, out: Tensor) -> None:
        """queries: [n, H, L + R], cache: [C, L + R], out: [n, H, L]; the last query sees the whole cache."""
        num_new, num_heads, _ = queries.shape
        first_position = cache.shape[0] - num_new
        block = 1 if self._deterministic else max(1, QUERY_ROWS // num_heads)
        for start in range(0, num_new, block):
            stop = min(start + block, num_new)
            visible = first_position + stop
            queries_of_block = queries[start:stop].clone() if self._deterministic else queries[start:stop]
            out[start:stop] = self._attend_block(queries_of_block, cache[:visible], first_position + start)

    def _attend_block(self, queries: Tensor, cache: Tensor, first_position: int) -> Tensor:
        """Softmax over the context chunk by chunk, with a running maximum and sum (arXiv 1805.02867)."""
        num_new, num_heads, width = queries.shape
        rank = self._config.kv_lora_rank
        flat = queries.reshape(num_new * num_heads, width)
        total: Tensor | None = None
        for start in range(0, cache.shape[0], CONTEXT_CHUNK):
            chunk = cache[start : start + CONTEXT_CHUNK]
            scores = torch.mm(flat, chunk.t()).float().mul_(self._scale)  # [n * H, chunk]
            last = start + chunk.shape[0] - 1
            if last > first_position:
                positions = torch.arange(start, last + 1, device=cache.device)
                asking = torch.arange(first_position, first_position + num_new, device=cache.device)
                hidden = positions > asking.unsqueeze(1)
                scores.view(num_new, num_heads, -1).masked_fill_(hidden.unsqueeze(1), float("-inf"))
            peak = scores.amax(dim=-1, keepdim=True)
            if total is None:
                weights = torch.sub(scores, peak, out=scores).exp_()
                maximum, total = peak, weights.sum(dim=-1, keepdim=True)
                mixed = torch.mm(weights.to(chunk.dtype), chunk[:, :rank]).float()
                continue
            raised = torch.maximum(maximum, peak)
            weights = torch.sub(scores, raised, out=scores).exp_()
            fade = (maximum - raised).exp_()
            maximum, total = raised, total * fade + weights.sum(dim=-1, keepdim=True)
            mixed = mixed * fade + torch.mm(weights.to(chunk.dtype), chunk[:, :rank]).float()
        assert total is not None  # a query always sees itself
        return (mixed / total).to(queries.dtype).view(num_new, num_heads, rank)

    def _attend_expanded(self, q_nope: Tensor, q_pe: Tensor, cache: Tensor, w_uk: Tensor, w_uv: Tensor) -> Tensor:
        """Keys and values of every head from the cache, then ordinary attention. Returns [n, H, v_head_dim]."""
        config = self._config
        num_new, context_len = q_nope.shape[0], cache.shape[0]
        c_kv, k_pe = cache.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        k_nope = torch.matmul(c_kv, w_uk.transpose(1, 2))  # [H, C, qk_nope_head_dim]
        keys = torch.cat([k_nope, k_pe.expand(config.num_attention_heads, -1, -1)], dim=-1)
        values = torch.matmul(c_kv, w_uv)  # [H, C, v_head_dim]
        query = torch.cat([q_nope, q_pe], dim=-1).transpose(0, 1)  # [H, n, qk_head_dim]
        first_position = context_len - num_new
        if first_position == 0:
            attended = functional.scaled_dot_product_attention(
                query[None], keys[None], values[None], is_causal=True, scale=self._scale
            )
        else:
            positions = torch.arange(context_len, device=cache.device)
            seen = positions <= positions[first_position:].unsqueeze(1)
            attended = functional.scaled_dot_product_attention(
                query[None], keys[None], values[None], attn_mask=seen, scale=self._scale
            )
        return attended[0].transpose(0, 1)
