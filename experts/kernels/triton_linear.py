"""The router's FP8 matrices on a GPU: a plain linear map, and one slice of a matrix per attention head.

Dequantised, the router's matrices fit no 24 GB card (they are 15.2 GB in FP8), so the absorbed kv_b_proj stays FP8
too: its heads are slices of its rows, read in place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from experts.kernels.block_quantized import BlockScaledMatrix
from experts.kernels.tile_table import KernelChoice, WeightPath
from experts.kernels.triton_gemm import linear_kernel
from experts.kernels.triton_launch import count_blocks, launch
from experts.kernels.triton_quantize import quantize_rows, starts_inside, view_weight


class HeadRows(NamedTuple):
    """Rows of a stored matrix that belong to each head: head h owns num_rows from h * head_rows + first_row.

    Of kv_b_proj, per head nope rows and then v rows: W_UK is HeadRows(num_heads, nope + v, 0, nope), W_UV is
    HeadRows(num_heads, nope + v, nope, v).
    """

    num_heads: int
    head_rows: int
    first_row: int
    num_rows: int


def block_scaled_linear(
    x: torch.Tensor, matrix: BlockScaledMatrix, choice: KernelChoice, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x @ W^T. x: [num_rows, columns of W] of any float dtype, columns contiguous, on W's device.

    Returns [num_rows, rows of W] in out_dtype (x's own if None), rounded once from fp32. A row's bits do not depend on
    the other rows. Raises ValueError for sizes that do not match.
    """
    rows, columns = matrix.weight.shape
    if x.shape[1] != columns:
        raise ValueError(f"x: expected [num_rows, {columns}], got {tuple(x.shape)}")
    heads = HeadRows(num_heads=1, head_rows=0, first_row=0, num_rows=rows)
    return _launch(x.unsqueeze(1), matrix, heads, choice, out_dtype, transposed=False).squeeze(1)


def head_linear(
    x: torch.Tensor,
    matrix: BlockScaledMatrix,
    heads: HeadRows,
    choice: KernelChoice,
    *,
    transposed: bool,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Per head x_h @ W_h^T, or x_h @ W_h if transposed, where W_h are the head's rows of the matrix.

    x: [num_rows, num_heads, columns of W, or heads.num_rows if transposed], last dimension contiguous.
    Returns [num_rows, num_heads, heads.num_rows, or columns of W if transposed] in out_dtype (x's own if None).
    Always the weight path W8A16: the matrices are small, and queries rounded to FP8 would blur every score.
    Heads may begin inside a scale block. Raises ValueError for sizes that do not match.
    """
    rows, columns = matrix.weight.shape
    num_inputs = heads.num_rows if transposed else columns
    if x.shape[1:] != (heads.num_heads, num_inputs):
        raise ValueError(f"x: expected [num_rows, {heads.num_heads}, {num_inputs}], got {tuple(x.shape)}")
    last_row = (heads.num_heads - 1) * heads.head_rows + heads.first_row + heads.num_rows
    if last_row > rows:
        raise ValueError(f"heads reach to row {last_row} of a matrix of {rows} rows")
    if transposed and matrix.block[0] not in (32, 64, 128):
        raise ValueError(f"scale blocks of {matrix.block[0]} rows: transposed takes 32, 64 or 128")
    decoded = KernelChoice(choice.capability, WeightPath.W8A16)
    return _launch(x, matrix, heads, decoded, out_dtype, transposed=transposed)


def _launch(
    x: torch.Tensor,
    matrix: BlockScaledMatrix,
    heads: HeadRows,
    choice: KernelChoice,
    out_dtype: torch.dtype | None,
    *,
    transposed: bool,
) -> torch.Tensor:
    """x: [num_rows, num_heads, inputs]. Returns [num_rows, num_heads, outputs]."""
    num_rows, num_heads, num_inputs = x.shape
    columns = matrix.weight.shape[1]
    num_outputs = columns if transposed else heads.num_rows
    input_block, output_block = matrix.block if transposed else (matrix.block[1], matrix.block[0])
    out = torch.empty(num_rows, num_heads, num_outputs, dtype=out_dtype or x.dtype, device=x.device)
    if num_rows == 0:
        return out
    quantized = quantize_rows(
        x,
        choice.path,
        input_block,
        head_rows=heads.head_rows if transposed else 0,
        first_row=heads.first_row if transposed else 0,
    )
    tile = choice.choose_tiles(num_rows).down
    launch(
        linear_kernel,
        (count_blocks(num_rows, tile.block_rows), count_blocks(num_outputs, tile.block_outputs), num_heads),
        quantized.values,
        quantized.scales,
        view_weight(matrix.weight, choice.path),
        matrix.scale_inv,
        out,
        num_rows,
        num_outputs,
        num_inputs,
        num_heads,
        quantized.scales.shape[2],
        columns,
        matrix.scale_inv.shape[1],
        heads.head_rows,
        heads.first_row,
        out.stride(0),
        out.stride(1),
        TRANSPOSED=transposed,
        STARTS_INSIDE=transposed and starts_inside(heads.head_rows, heads.first_row, input_block),
        BY_BITS=choice.path is WeightPath.W8A16,
        GROUP_N=output_block,
        BLOCK_M=tile.block_rows,
        BLOCK_N=tile.block_outputs,
        BLOCK_K=input_block,
        **tile.launch_options,
    )
    return out
