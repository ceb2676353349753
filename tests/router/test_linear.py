"""The router's products: native and torch agree, and the native one gives a row the same bits in any company."""

import pytest
import torch
from torch.nn import functional

from experts.kernels.cpu_ffn import ScaledWeight
from experts.quantization import quantize_block
from router.linear import LinearFactory, NativeFactory, TorchFactory, choose_linear_factory
from tests.tolerances import FLOAT32_RELATIVE_ERROR, KERNEL_RELATIVE_ERROR

FP8_BLOCK = (128, 128)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fp8(rows: int, columns: int, seed: int) -> tuple[ScaledWeight, torch.Tensor]:
    """A quantised weight and the exact float32 values it stands for."""
    weight, scale_inv = quantize_block(random(rows, columns, seed=seed), FP8_BLOCK)
    stored = ScaledWeight(weight, scale_inv, FP8_BLOCK)
    blocks = scale_inv.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return stored, weight.float() * blocks


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def factories(dtype: torch.dtype) -> list[LinearFactory]:
    chosen = choose_linear_factory(dtype)
    return [TorchFactory(dtype)] if isinstance(chosen, TorchFactory) else [chosen, TorchFactory(dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_side_by_side_are_those_of_the_stored_values(dtype: torch.dtype) -> None:
    (first, first_exact), (second, second_exact) = fp8(192, 160, seed=1), fp8(72, 160, seed=2)
    x = random(5, 160, seed=3, dtype=dtype)
    expected = x.float() @ torch.cat([first_exact, second_exact]).T
    for factory in factories(dtype):
        found = factory.linear(first, second)(x, torch.float32)
        # torch rounds expanded weights and sums to bf16 (8 bits).
        assert relative(found, expected) <= (FLOAT32_RELATIVE_ERROR if dtype == torch.float32 else 1e-2)
        assert factory.linear(first, second)(x).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_mlp_is_swiglu_between_its_matrices(dtype: torch.dtype) -> None:
    (gate, gate_exact), (up, up_exact), (down, down_exact) = fp8(96, 64, 1), fp8(96, 64, 2), fp8(64, 96, 3)
    x = random(4, 64, seed=4, dtype=dtype)
    inner = functional.silu(x.float() @ gate_exact.T) * (x.float() @ up_exact.T)
    for factory in factories(dtype):
        found = factory.mlp(gate, up, down)(x)
        assert found.dtype == torch.float32
        error = relative(found, inner @ down_exact.T)
        assert error <= (FLOAT32_RELATIVE_ERROR if dtype == torch.float32 else 10 * KERNEL_RELATIVE_ERROR)


def test_the_gate_computes_in_float32_even_in_a_bfloat16_model() -> None:
    weight, x = random(16, 256, seed=1), random(3, 256, seed=2, dtype=torch.bfloat16)
    for factory in factories(torch.bfloat16):
        found = factory.gate(weight)(x.float())
        assert found.dtype == torch.float32
        assert relative(found, x.double() @ weight.double().T) <= FLOAT32_RELATIVE_ERROR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    factory = choose_linear_factory(dtype)
    if not isinstance(factory, NativeFactory):
        pytest.skip("no native CPU kernel here: no compiler, and none prebuilt")
    weight, _ = fp8(192, 256, seed=5)
    linear = factory.linear(weight)
    x = random(33, 256, seed=6, dtype=dtype)
    together = linear(x)
    for count in (1, 2, 7, 16, 32):
        assert torch.equal(linear(x[:count]), together[:count])
        assert torch.equal(linear(x[-count:]), together[-count:])
