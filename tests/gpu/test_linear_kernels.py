"""The router's matrices on a card at the published sizes."""

from __future__ import annotations

import pytest
import torch

from experts.kernels.block_quantized import BlockScaledMatrix
from experts.kernels.tile_table import KernelChoice, WeightPath
from experts.kernels.triton_linear import HeadRows, block_scaled_linear, head_linear
from experts.quantization import quantize_block
from tests.experts.random_experts import relative_error, round_activations
from tests.experts.reference import dequantize_reference
from tests.tolerances import KERNEL_RELATIVE_ERROR

BLOCK = (128, 128)


def make_matrix(rows: int, columns: int) -> tuple[BlockScaledMatrix, torch.Tensor]:
    """The matrix on the card, and its float32 values there."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * columns**-0.5
    quantized, scale_inv = quantize_block(weight, BLOCK)
    matrix = BlockScaledMatrix.from_fp8(quantized, scale_inv, BLOCK, "cuda")
    return matrix, dequantize_reference(quantized, scale_inv, BLOCK).to("cuda")


@pytest.mark.parametrize("shape", [(576, 7168), (1536, 7168), (7168, 16384)], ids=["kv_a", "q_a", "o_proj"])
@pytest.mark.parametrize("num_rows", [1, 16, 130])
def test_projections_match_and_rows_keep_their_bits(
    choice: KernelChoice, shape: tuple[int, int], num_rows: int
) -> None:
    matrix, values = make_matrix(*shape)
    x = torch.randn(num_rows, shape[1], device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    result = block_scaled_linear(x, matrix, choice)
    seen = x if choice.path is WeightPath.W8A16 else round_activations(x, 128)
    assert relative_error(result, seen @ values.T) <= KERNEL_RELATIVE_ERROR
    assert torch.equal(block_scaled_linear(x[-1:], matrix, choice), result[-1:])
    in_bf16 = block_scaled_linear(x, matrix, choice, out_dtype=torch.bfloat16)
    assert torch.equal(in_bf16, result.to(torch.bfloat16))


@pytest.mark.parametrize("num_rows", [1, 70])
def test_the_absorbed_projection_is_read_in_place(choice: KernelChoice, num_rows: int) -> None:
    num_heads, nope, v, rank = 128, 128, 128, 512
    matrix, values = make_matrix(num_heads * (nope + v), rank)
    by_head = values.view(num_heads, nope + v, rank)
    queries = torch.randn(num_rows, num_heads, nope + 64, device="cuda")[..., :nope]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    absorbed = head_linear(queries, matrix, HeadRows(num_heads, nope + v, 0, nope), choice, transposed=True)
    # The result and the scaled queries; the matrix in fp16 would be 32 MiB.
    assert torch.cuda.max_memory_allocated() - before <= absorbed.nbytes + 8 * 2**20
    expected = torch.einsum("thn,hnl->thl", queries, by_head[:, :nope])
    assert relative_error(absorbed, expected) <= KERNEL_RELATIVE_ERROR
    latents = torch.randn(num_rows, num_heads, rank, device="cuda")
    out = head_linear(latents, matrix, HeadRows(num_heads, nope + v, nope, v), choice, transposed=False)
    expected = torch.einsum("thl,hvl->thv", latents, by_head[:, nope:])
    assert relative_error(out, expected) <= KERNEL_RELATIVE_ERROR
    alone = head_linear(latents[-1:], matrix, HeadRows(num_heads, nope + v, nope, v), choice, transposed=False)
    assert torch.equal(alone, out[-1:])
