"""Activations as e4m3 with one scale per row and 128 columns: half the bytes of bf16 on a slow network.

The definition is exact, so that every machine sends the same bytes for the same row: with amax the largest magnitude
of a block in float32, scale = max(amax, 1e-4) / 448 and value = e4m3(x / scale), each operation rounded once to
nearest, ties to even. A block that holds a NaN or an infinity is sent as NaN throughout (scale 1), so that scales are
always finite and positive and a broken row stays visibly broken. A row's bytes depend on that row alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

# Columns of one scale: the published checkpoints quantise activations per 128 columns too.
BLOCK_COLUMNS = 128
# The e4m3 maximum.
FP8_MAX = 448.0
# Keeps the scale of a block of zeros away from zero; the published inference code has the same.
MIN_AMAX = 1e-4

_NAN_BYTE = 0x7F
# The value of each of the 256 bytes: a lookup is four times as fast as torch's conversion.
_VALUES: npt.NDArray[np.float32] = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()


class QuantizedRows(NamedTuple):
    """values: float8_e4m3fn [num_rows, num_columns]; scales: float32 [num_rows, ceil(num_columns / 128)]."""

    values: torch.Tensor
    scales: torch.Tensor

    def select(self, row_ids: torch.Tensor) -> QuantizedRows:
        """Return the rows with these int64 ids."""
        # index_select has no kernel for e4m3 on every version: bytes are bytes.
        values = self.values.view(torch.uint8).index_select(0, row_ids).view(torch.float8_e4m3fn)
        return QuantizedRows(values, self.scales.index_select(0, row_ids))


def count_blocks(num_columns: int) -> int:
    return -(-num_columns // BLOCK_COLUMNS)


def quantize_rows(x: torch.Tensor) -> QuantizedRows:
    """Quantise [num_rows, num_columns] of any floating dtype, on the CPU, as the module's head defines it."""
    num_rows, num_columns = x.shape
    num_blocks = count_blocks(num_columns)
    blocks = x.to(torch.float32)
    if num_columns % BLOCK_COLUMNS:
        blocks = torch.nn.functional.pad(blocks, (0, num_blocks * BLOCK_COLUMNS - num_columns))
    blocks = blocks.reshape(num_rows, num_blocks, BLOCK_COLUMNS)
    amax = blocks.abs().amax(dim=2)  # [num_rows, num_blocks]
    finite = amax.isfinite()  # amax hands NaN on
    scales = torch.where(finite, amax.clamp_min(MIN_AMAX) / FP8_MAX, 1.0)
    values = (blocks / scales.unsqueeze(2)).to(torch.float8_e4m3fn)
    if not finite.all():
        values.view(torch.uint8)[~finite] = _NAN_BYTE
    values = values.reshape(num_rows, -1)
    return QuantizedRows(values[:, :num_columns].contiguous(), scales)


def dequantize_rows(rows: QuantizedRows) -> torch.Tensor:
    """Return value * scale, float32 [num_rows, num_columns], in memory of its own."""
    num_rows, num_columns = rows.values.shape
    values = torch.from_numpy(_VALUES.take(rows.values.view(torch.uint8).numpy()))
    if num_columns % BLOCK_COLUMNS:
        return values.mul_(rows.scales.repeat_interleave(BLOCK_COLUMNS, dim=1)[:, :num_columns])
    values.view(num_rows, -1, BLOCK_COLUMNS).mul_(rows.scales.unsqueeze(2))
    return values
