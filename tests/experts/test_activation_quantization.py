"""FP8 rows: the exact definition, against a slow twin in Python's own arithmetic, and what is not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experts.activation_quantization import QuantizedRows, dequantize_rows, quantize_rows

NAN_BYTE = 0x7F


def quantize_slowly(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Block by block; e4m3 by looking for the nearest of its values, ties to the even byte."""
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    finite = np.flatnonzero(np.isfinite(table))
    num_blocks = -(-x.shape[1] // 128)
    scales = np.empty((x.shape[0], num_blocks), dtype=np.float32)
    values = np.empty(x.shape, dtype=np.uint8)
    for row in range(x.shape[0]):
        for block in range(num_blocks):
            part = x[row, block * 128 : (block + 1) * 128]
            scale = np.float32(max(np.abs(part).max(), np.float32(1e-4))) / np.float32(448.0)
            scales[row, block] = scale
            for column, value in enumerate(part / scale):
                distance = np.abs(table[finite].astype(np.float64) - np.float64(value))
                nearest = finite[distance == distance.min()]
                same_sign = [byte for byte in nearest if (byte >= 128) == bool(np.signbit(value))]
                values[row, block * 128 + column] = min(same_sign, key=lambda byte: byte & 1)
    return values, scales


@pytest.mark.parametrize("num_columns", [128, 384, 200, 7])
def test_bytes_and_scales_are_exactly_those_of_the_definition(num_columns: int) -> None:
    generator = torch.Generator().manual_seed(num_columns)
    x = torch.randn(3, num_columns, generator=generator) * torch.tensor([[1e-6], [1.0], [3e4]])
    found = quantize_rows(x)
    values, scales = quantize_slowly(x.numpy())
    assert np.array_equal(found.scales.numpy(), scales)
    assert np.array_equal(found.values.view(torch.uint8).numpy(), values)


@pytest.mark.parametrize("num_columns", [256, 130])
def test_values_come_back_within_half_a_step_of_e4m3(num_columns: int) -> None:
    x = torch.randn(50, num_columns, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    rows = quantize_rows(x)
    found = dequantize_rows(rows)
    assert found.dtype == torch.float32 and found.shape == x.shape
    # Three bits of mantissa: 1/16 of a value; below e4m3's smallest normal, half of 2^-9 of the scale.
    steps = rows.scales.repeat_interleave(128, dim=1)[:, :num_columns] * 2.0**-10
    assert ((found - x.float()).abs() <= torch.maximum(x.float().abs() / 16, steps)).all()


def test_zeros_and_the_largest_value_of_a_block_are_exact() -> None:
    x = torch.zeros(2, 256)
    x[1, 5] = -448.0
    assert torch.equal(dequantize_rows(quantize_rows(x)), x)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_spoils_its_block_visibly_and_nothing_else(broken: float) -> None:
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(2))
    sound = dequantize_rows(quantize_rows(x))
    x[1, 130] = broken
    rows = quantize_rows(x)
    assert rows.scales.isfinite().all() and (rows.scales > 0).all()
    assert (rows.values.view(torch.uint8)[1, 128:256] == NAN_BYTE).all()
    found = dequantize_rows(rows)
    assert found[1, 128:256].isnan().all()
    found[1, 128:256] = sound[1, 128:256]
    assert torch.equal(found, sound)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    x = torch.randn(9, 384, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    together, alone = quantize_rows(x), [quantize_rows(x[row : row + 1]) for row in range(9)]
    assert torch.equal(together.values.view(torch.uint8), torch.cat([rows.values.view(torch.uint8) for rows in alone]))
    chosen = together.select(torch.tensor([7, 2]))
    assert isinstance(chosen, QuantizedRows) and chosen.values.dtype == torch.float8_e4m3fn
    assert torch.equal(dequantize_rows(chosen), dequantize_rows(together)[[7, 2]])
