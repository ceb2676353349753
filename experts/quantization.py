"""Block-wise FP8 weights: one float32 scale per block of rows and columns (128 x 128 as published).

W = W_fp8 * scale_inv[block]; the last block row and column may be partial. Pure functions of tensors.
"""

from __future__ import annotations

import torch

# Largest finite value of e4m3fn.
FP8_MAX = 448.0


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scale tensor of a weight of this shape; partial edge blocks count."""
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def dequantize_block(weight: torch.Tensor, scale_inv: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Multiply each block by its scale, exactly as fp32 does it.

    weight: [rows, columns] float8_e4m3fn. scale_inv: [ceil(rows / block[0]), ceil(columns / block[1])].
    Returns float32 [rows, columns].
    """
    scale_rows = scale_inv.to(torch.float32).repeat_interleave(block[1], dim=1)[:, : weight.shape[1]]
    result = weight.to(torch.float32)
    for block_row in range(scale_rows.shape[0]):
        start = block_row * block[0]
        result[start : start + block[0]].mul_(scale_rows[block_row])  # [<= block rows, columns]
    return result


def quantize_block(
    weight: torch.Tensor, block: tuple[int, int], *, power_of_two_scales: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise to FP8 with the smallest scale per block that holds its largest value.

    weight: [rows, columns] of any float dtype. power_of_two_scales: round scales up to 2^n (ue8m0).
    Returns weight float8_e4m3fn [rows, columns] and scale_inv float32 [block rows, block columns], never zero.
    """
    rows, columns = weight.shape
    block_rows, block_columns = scale_shape((rows, columns), block)
    padded = torch.zeros(block_rows * block[0], block_columns * block[1], dtype=torch.float32)
    padded[:rows, :columns] = weight
    blocks = padded.view(block_rows, block[0], block_columns, block[1])
    largest = blocks.abs().amax(dim=(1, 3))  # [block_rows, block_columns]
    scale_inv = torch.where(largest > 0, largest / FP8_MAX, torch.ones_like(largest))
    if power_of_two_scales:
        scale_inv = torch.exp2(torch.ceil(torch.log2(scale_inv)))
    quantized = (blocks / scale_inv[:, None, :, None]).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return quantized.reshape(padded.shape)[:rows, :columns].contiguous(), scale_inv
