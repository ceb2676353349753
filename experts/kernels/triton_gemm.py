"""Triton kernels that multiply rows by block-scaled FP8 weights: one expert's tile, or one matrix or head.

Letters: N outputs (weight rows), K inputs (weight columns), M rows of the batch. Products are formed the other way
round, weight tile [N, K] times activations [K, M]: so few rows fill the narrow side of the tensor core's instruction.
Each scale block of K is one dot product from zero, multiplied by both scales and added in fp32, blocks ascending. That
is the one order for a row, whatever the tile and its neighbours; see tile_table.py for what it rests on.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_e4m3(byte):
    """Decode e4m3 bits (uint8) to fp16 of value / 256, exactly: zeros and subnormals included, NaN stays NaN.

    The exponents' bias differs by 8, hence the 256; e4m3 subnormals land on fp16 subnormals.
    """
    # Sign-extended, the sign fills bits 7 to 15; shifted, it fills 14 and 15, and 14 is cleared.
    shifted = byte.to(tl.int8, bitcast=True).to(tl.int16) << 7
    is_nan = (shifted & 0x3F80) == 0x3F80
    half = tl.where(is_nan, 0x7E00, shifted & -0x4080)
    return half.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _add_block(total, weight_ptrs, in_weight, activations, weight_scale, row_scale, BY_BITS: tl.constexpr):
    """Return total + (weight @ activations) * scales. weight_ptrs: [N, K] to e4m3, or to its bytes if BY_BITS."""
    if BY_BITS:
        weight = decode_e4m3(tl.load(weight_ptrs, mask=in_weight, other=0))
    else:
        weight = tl.load(weight_ptrs, mask=in_weight, other=0.0)
    product = tl.dot(weight, activations)  # [N, M] float32
    return tl.fma(product, weight_scale[:, None] * row_scale[None, :], total)


@triton.jit
def gate_up_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    out_ptr,
    tile_expert_ptr,
    tile_first_ptr,
    tile_rows_ptr,
    slot_row_ptr,
    hidden_size,
    inner_size,
    num_k_blocks,
    num_scale_rows,
    BY_BITS: tl.constexpr,
    GROUP_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """silu(gate(x)) * up(x) for one tile of one expert's rows and BLOCK_N of its inner channels.

    Program (tile, group of inner channels). x: quantised [num_rows, hidden_size], read through slot_row; x_scale:
    [num_rows, num_k_blocks]. weight: [num_experts, 2 * inner_size, hidden_size], gate first; weight_scale:
    [num_experts, 2 * num_scale_rows, num_k_blocks], where gate and up have num_scale_rows = ceil(inner_size / GROUP_N)
    rows each, so that up starts a block of its own. out: float32 [num_slots, inner_size].
    """
    tile = tl.program_id(0)
    num_rows = tl.load(tile_rows_ptr + tile)
    if num_rows == 0:
        return
    expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    slots = tl.load(tile_first_ptr + tile) + m
    in_m = m < num_rows
    rows = tl.load(slot_row_ptr + slots, mask=in_m, other=0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < inner_size
    k = tl.arange(0, BLOCK_K)

    gate_ptrs = weight_ptr + expert * 2 * inner_size * hidden_size + n[:, None] * hidden_size + k[None, :]
    up_ptrs = gate_ptrs + inner_size * hidden_size
    gate_scale_ptrs = weight_scale_ptr + (expert * 2 * num_scale_rows + n // GROUP_N) * num_k_blocks
    up_scale_ptrs = gate_scale_ptrs + num_scale_rows * num_k_blocks
    x_ptrs = x_ptr + rows[None, :] * hidden_size + k[:, None]  # [K, M]
    x_scale_ptrs = x_scale_ptr + rows * num_k_blocks

    gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(num_k_blocks):
        in_k = k < hidden_size - block * BLOCK_K
        in_weight = in_n[:, None] & in_k[None, :]
        x = tl.load(x_ptrs, mask=in_m[None, :] & in_k[:, None], other=0.0)
        x_scale = tl.load(x_scale_ptrs + block, mask=in_m, other=0.0)
        gate_scale = tl.load(gate_scale_ptrs + block, mask=in_n, other=0.0)
        up_scale = tl.load(up_scale_ptrs + block, mask=in_n, other=0.0)
        gate = _add_block(gate, gate_ptrs, in_weight, x, gate_scale, x_scale, BY_BITS)
        up = _add_block(up, up_ptrs, in_weight, x, up_scale, x_scale, BY_BITS)
        gate_ptrs += BLOCK_K
        up_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
    activated = gate / (1.0 + tl.exp(-gate)) * up
    out_ptrs = out_ptr + slots[None, :].to(tl.int64) * inner_size + n[:, None]
    tl.store(out_ptrs, activated, mask=in_n[:, None] & in_m[None, :])


@triton.jit
def down_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    out_ptr,
    tile_expert_ptr,
    tile_first_ptr,
    tile_rows_ptr,
    slot_pair_ptr,
    pair_weight_ptr,
    hidden_size,
    inner_size,
    num_k_blocks,
    num_scale_rows,
    BY_BITS: tl.constexpr,
    GROUP_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """down(x) times the pair's weight for one tile of one expert's slots and BLOCK_N of the hidden channels.

    Program (tile, group of hidden channels). x: quantised [num_slots, inner_size]; x_scale: [num_slots, num_k_blocks].
    weight: [num_experts, hidden_size, inner_size]; weight_scale: [num_experts, num_scale_rows, num_k_blocks].
    out: float32 [num_pairs, hidden_size], each slot written to its pair's place: no two programs write the same.
    """
    tile = tl.program_id(0)
    num_rows = tl.load(tile_rows_ptr + tile)
    if num_rows == 0:
        return
    expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    slots = tl.load(tile_first_ptr + tile) + m
    in_m = m < num_rows
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < hidden_size
    k = tl.arange(0, BLOCK_K)

    weight_ptrs = weight_ptr + expert * hidden_size * inner_size + n[:, None] * inner_size + k[None, :]
    weight_scale_ptrs = weight_scale_ptr + (expert * num_scale_rows + n // GROUP_N) * num_k_blocks
    x_ptrs = x_ptr + slots[None, :] * inner_size + k[:, None]  # [K, M]
    x_scale_ptrs = x_scale_ptr + slots * num_k_blocks

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(num_k_blocks):
        in_k = k < inner_size - block * BLOCK_K
        x = tl.load(x_ptrs, mask=in_m[None, :] & in_k[:, None], other=0.0)
        x_scale = tl.load(x_scale_ptrs + block, mask=in_m, other=0.0)
        weight_scale = tl.load(weight_scale_ptrs + block, mask=in_n, other=0.0)
        in_weight = in_n[:, None] & in_k[None, :]
        total = _add_block(total, weight_ptrs, in_weight, x, weight_scale, x_scale, BY_BITS)
        weight_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
    pairs = tl.load(slot_pair_ptr + slots, mask=in_m, other=0)
    pair_weights = tl.load(pair_weight_ptr + pairs, mask=in_m, other=0.0)
    out_ptrs = out_ptr + pairs[None, :].to(tl.int64) * hidden_size + n[:, None]
    tl.store(out_ptrs, total * pair_weights[None, :], mask=in_n[:, None] & in_m[None, :])


@triton.jit(do_not_specialize=["num_rows", "first_row"])
def linear_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    out_ptr,
    num_rows,
    num_outputs,
    num_inputs,
    num_heads,
    num_x_blocks,
    weight_columns,
    num_scale_columns,
    head_rows,
    first_row,
    out_row_stride,
    out_head_stride,
    TRANSPOSED: tl.constexpr,
    STARTS_INSIDE: tl.constexpr,
    BY_BITS: tl.constexpr,
    GROUP_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One matrix, or one slice of rows of it per head, times rows of the batch.

    Program (tile of rows, group of outputs, head). weight: the stored matrix, [any, weight_columns] bytes with scales
    [any, num_scale_columns]; head h owns its rows from base = h * head_rows + first_row. x: quantised [num_rows,
    num_heads, num_inputs], contiguous; x_scale: [num_rows, num_heads, num_x_blocks].
    Not TRANSPOSED: outputs are stored rows, inputs stored columns; scale blocks are GROUP_N by BLOCK_K.
    TRANSPOSED: inputs are stored rows, outputs stored columns (x @ weight[base:]); scale blocks are BLOCK_K by GROUP_N,
    and blocks of inputs start where the stored scale blocks do, base % BLOCK_K before the first input; that is 0 for
    all heads unless STARTS_INSIDE.
    out: [num_rows, num_heads, num_outputs] by strides, in its own type, rounded once.
    """
    head = tl.program_id(2)
    base = head * head_rows + first_row
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = m < num_rows
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < num_outputs
    k = tl.arange(0, BLOCK_K)

    x_rows = m.to(tl.int64) * num_heads + head
    x_start = x_ptr + x_rows[None, :] * num_inputs
    x_scale_start = x_scale_ptr + x_rows * num_x_blocks
    shift = base % BLOCK_K if STARTS_INSIDE else 0
    if TRANSPOSED:
        weight_start = weight_ptr + base * weight_columns + n[:, None]
        scale_start = weight_scale_ptr + base // BLOCK_K * num_scale_columns + n // GROUP_N
    else:
        weight_start = weight_ptr + (base + n)[:, None] * weight_columns
        scale_start = weight_scale_ptr + (base + n) // GROUP_N * num_scale_columns

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(tl.cdiv(num_inputs + shift, BLOCK_K)):
        inputs = block * BLOCK_K - shift + k
        in_k = inputs < num_inputs
        if STARTS_INSIDE:
            in_k = in_k & (inputs >= 0)
        x = tl.load(x_start + inputs[:, None], mask=in_m[None, :] & in_k[:, None], other=0.0)
        x_scale = tl.load(x_scale_start + block, mask=in_m, other=0.0)
        if TRANSPOSED:
            weight_ptrs = weight_start + inputs[None, :] * weight_columns
            weight_scale_ptrs = scale_start + block * num_scale_columns
        else:
            weight_ptrs = weight_start + inputs[None, :]
            weight_scale_ptrs = scale_start + block
        weight_scale = tl.load(weight_scale_ptrs, mask=in_n, other=0.0)
        in_weight = in_n[:, None] & in_k[None, :]
        total = _add_block(total, weight_ptrs, in_weight, x, weight_scale, x_scale, BY_BITS)
    out_ptrs = out_ptr + m[None, :].to(tl.int64) * out_row_stride + head * out_head_stride + n[:, None]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=in_n[:, None] & in_m[None, :])
