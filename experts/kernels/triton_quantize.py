"""Host side of quantising activations for the FP8 products: memory, launch, and the type each weight path reads."""

from __future__ import annotations

from typing import NamedTuple

import torch

from experts.kernels.tile_table import WeightPath
from experts.kernels.triton_launch import count_blocks, launch
from experts.kernels.triton_rows import quantize_rows_kernel

# Scale blocks that one program takes.
_BLOCKS_PER_PROGRAM = 8


class QuantizedRows(NamedTuple):
    """values: float8_e4m3fn or fp16, as the rows [num_rows, num_heads, num_columns]. scales: float32 [num_rows,
    num_heads, num_blocks]."""

    values: torch.Tensor
    scales: torch.Tensor


def quantize_rows(
    x: torch.Tensor,
    path: WeightPath,
    block: int,
    *,
    count: torch.Tensor | None = None,
    head_rows: int = 0,
    first_row: int = 0,
) -> QuantizedRows:
    """Scale every row per block of columns, for the weight path's tensor cores.

    x: [num_rows, num_heads, num_columns] of any float dtype, columns contiguous. count: int32 [1] on the device, rows
    in use (the rest stays unwritten), or None for all. head_rows, first_row: where a head's inputs begin among the
    rows of a transposed weight; its blocks then begin where the weight's do. Zero for any other weight.
    """
    num_rows, num_heads, num_columns = x.shape
    to_fp8 = path is WeightPath.W8A8
    # A run of num_columns that starts inside a block may touch one block more.
    num_blocks = count_blocks(num_columns, block) + starts_inside(head_rows, first_row, block)
    values = torch.empty(x.shape, dtype=torch.uint8 if to_fp8 else torch.float16, device=x.device)
    scales = torch.empty(num_rows, num_heads, num_blocks, dtype=torch.float32, device=x.device)
    if num_rows > 0:
        launch(
            quantize_rows_kernel,
            (num_rows * num_heads, count_blocks(num_blocks, _BLOCKS_PER_PROGRAM)),
            x,
            values,
            scales,
            count,
            num_columns,
            num_blocks,
            num_heads,
            x.stride(0),
            x.stride(1),
            head_rows,
            first_row,
            TO_FP8=to_fp8,
            BLOCK=block,
            NUM_BLOCKS=_BLOCKS_PER_PROGRAM,
        )
    return QuantizedRows(values.view(torch.float8_e4m3fn) if to_fp8 else values, scales)


def view_weight(weight: torch.Tensor, path: WeightPath) -> torch.Tensor:
    """The stored bytes (uint8) as the type that the kernels of a path load."""
    return weight.view(torch.float8_e4m3fn) if path is WeightPath.W8A8 else weight


def starts_inside(head_rows: int, first_row: int, block: int) -> bool:
    """Whether any head's rows may begin inside a scale block."""
    return head_rows % block != 0 or first_row % block != 0
