"""Triton kernels that touch rows of activations only: quantising per scale block, adding a row's pairs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _encode_e4m3(value):
    """Round float32 in [-448, 448] to e4m3 bits, to nearest even. Returns uint8.

    By bits on every target: Triton's interpreter rounds its own conversion wrongly, and one formula is one thing to
    test. Values below 2^-6 are subnormal there, multiples of 2^-9: adding 2^14 leaves their number in the low bits.
    """
    bits = value.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    # 20 = 23 - 3 mantissa bits dropped; 960 = (127 - 7) << 3, the difference of the exponents' bias.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
    shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.uint32, bitcast=True) - 0x46800000
    return (sign | tl.where(magnitude < 0x3C800000, subnormal, normal)).to(tl.uint8)


@triton.jit(do_not_specialize=["first_row"])
def quantize_rows_kernel(
    x_ptr,
    quantized_ptr,
    scale_ptr,
    count_ptr,
    num_columns,
    num_blocks,
    num_heads,
    x_row_stride,
    x_head_stride,
    head_rows,
    first_row,
    TO_FP8: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    """Scale each run of BLOCK columns of a row by itself: to e4m3 bits (TO_FP8), else to fp16 by a power of two.

    Program (row * num_heads + head, group of NUM_BLOCKS blocks). x: [num_rows, num_heads, num_columns] of any float
    type, columns contiguous. quantized: the same shape, contiguous, uint8 or fp16. scale: float32 [num_rows, num_heads,
    num_blocks]. count_ptr: int32 [1], rows in use, or None for all. Blocks start shift columns before column 0, where
    shift = (head * head_rows + first_row) % BLOCK: so they match scale blocks of a weight whose rows start inside one.
    A block that holds NaN or infinity gets the scale NaN, which reaches every result of that row.
    fp16: the weights are multiplied as value / 256 (see decode_e4m3), so the scale holds the factor 256.
    """
    index = tl.program_id(0)
    row = index // num_heads
    head = index % num_heads
    if count_ptr is not None:  # noqa: SIM102 (decided while compiling; the other while running)
        if row >= tl.load(count_ptr):
            return
    shift = (head * head_rows + first_row) % BLOCK
    blocks = tl.program_id(1) * NUM_BLOCKS + tl.arange(0, NUM_BLOCKS)
    columns = blocks[:, None] * BLOCK - shift + tl.arange(0, BLOCK)[None, :]  # [NUM_BLOCKS, BLOCK]
    inside = (columns >= 0) & (columns < num_columns)
    x_start = x_ptr + row.to(tl.int64) * x_row_stride + head * x_head_stride
    x = tl.load(x_start + columns, mask=inside, other=0.0).to(tl.float32)
    # Magnitudes compared as integers: the order is that of the numbers, and NaN comes out largest.
    largest_bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)  # [NUM_BLOCKS]
    is_finite = largest_bits < 0x7F800000
    largest = tl.where(is_finite, largest_bits, 0).to(tl.float32, bitcast=True)
    start = quantized_ptr + index.to(tl.int64) * num_columns
    if TO_FP8:
        # 1e-4 as in the published quantiser; 448 is the e4m3 maximum.
        scale = tl.div_rn(tl.maximum(largest, 1e-4), 448.0)
        scaled = tl.div_rn(x, tl.broadcast_to(scale[:, None], (NUM_BLOCKS, BLOCK)))
        scaled = tl.where(is_finite[:, None], tl.minimum(tl.maximum(scaled, -448.0), 448.0), 0.0)
        tl.store(start + columns, _encode_e4m3(scaled), mask=inside)
    else:
        # The power of two at or below the largest magnitude, at least 2^-100: |scaled| < 2.
        exponent = tl.maximum(largest.to(tl.int32, bitcast=True) & 0x7F800000, 27 << 23)
        power = exponent.to(tl.float32, bitcast=True)
        scaled = tl.div_rn(x, tl.broadcast_to(power[:, None], (NUM_BLOCKS, BLOCK)))
        tl.store(start + columns, tl.where(is_finite[:, None], scaled, 0.0).to(tl.float16), mask=inside)
        scale = power * 256.0
    nan = tl.full((NUM_BLOCKS,), 0x7FC00000, tl.int32).to(tl.float32, bitcast=True)
    tl.store(
        scale_ptr + index.to(tl.int64) * num_blocks + blocks,
        tl.where(is_finite, scale, nan),
        mask=blocks < num_blocks,
    )


@triton.jit
def combine_pairs_kernel(
    pairs_ptr,
    row_first_ptr,
    out_ptr,
    num_columns,
    BLOCK: tl.constexpr,
):
    """Add each row's weighted pairs in ascending pair order, which is ascending expert order, in fp32.

    Program (row, group of BLOCK columns). pairs: float32 [num_pairs, num_columns], row r's at row_first[r] to
    row_first[r + 1]. out: [num_rows, num_columns] in its own type, rounded once; a row without pairs is zero.
    """
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    first = tl.load(row_first_ptr + row)
    end = tl.load(row_first_ptr + row + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    pair_ptrs = pairs_ptr + first.to(tl.int64) * num_columns + columns
    for _ in range(first, end):
        total += tl.load(pair_ptrs, mask=inside, other=0.0)
        pair_ptrs += num_columns
    tl.store(out_ptr + row.to(tl.int64) * num_columns + columns, total.to(out_ptr.dtype.element_ty), mask=inside)
