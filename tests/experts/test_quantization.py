"""Block scales, with partial blocks at the edges."""

from __future__ import annotations

import pytest
import torch

from experts.quantization import FP8_MAX, dequantize_block, quantize_block, scale_shape


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (576, 300), (127, 129), (64, 512)])
@pytest.mark.parametrize("power_of_two_scales", [False, True])
def test_round_trip_is_within_half_a_step_of_e4m3(shape: tuple[int, int], power_of_two_scales: bool) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    quantized, scale_inv = quantize_block(weight, (128, 128), power_of_two_scales=power_of_two_scales)
    assert quantized.dtype == torch.float8_e4m3fn and quantized.shape == shape
    assert tuple(scale_inv.shape) == scale_shape(shape, (128, 128))
    restored = dequantize_block(quantized, scale_inv, (128, 128))
    # 3 bits of mantissa: half a step is 2^-4 of the value; below 2^-6 of the scale the steps stop shrinking.
    smallest_step = scale_inv.max() * 2**-9
    assert bool(((restored - weight).abs() <= weight.abs() * 2**-4 + smallest_step).all())
    if power_of_two_scales:
        assert torch.equal(torch.frexp(scale_inv).mantissa, torch.full_like(scale_inv, 0.5))


def test_every_element_is_multiplied_by_the_scale_of_its_own_block() -> None:
    weight = torch.ones(5, 7).to(torch.float8_e4m3fn)
    scale_inv = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    restored = dequantize_block(weight, scale_inv, (2, 3))
    expected = torch.tensor([[scale_inv[r // 2, c // 3] for c in range(7)] for r in range(5)])
    assert torch.equal(restored, expected)


def test_a_block_of_zeros_gets_a_scale_that_is_not_zero() -> None:
    quantized, scale_inv = quantize_block(torch.zeros(4, 4), (2, 2))
    assert bool((scale_inv > 0).all()) and not quantized.to(torch.float32).any()


def test_the_largest_value_of_a_block_becomes_the_largest_of_the_format() -> None:
    quantized, _ = quantize_block(torch.tensor([[3.0, -6.0]]), (128, 128))
    assert quantized.to(torch.float32).tolist() == [[FP8_MAX / 2, -FP8_MAX]]
