"""FP8 matrices in memory: where each projection lies, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experts.kernels.block_quantized import BlockScaledMatrix, ExpertStack
from experts.kernels.tile_table import compute_packed_bytes
from experts.quantization import quantize_block, scale_shape

BLOCK = (128, 128)
HIDDEN, INNER = 192, 160


def allocate() -> ExpertStack:
    return ExpertStack.allocate(np.array([3, 8]), HIDDEN, INNER, BLOCK, "cpu")


def test_up_starts_a_block_row_of_its_own() -> None:
    stack = allocate()
    weight, scale_inv = quantize_block(torch.randn(INNER, HIDDEN), BLOCK)
    stack.put_(8, "up_proj", weight, scale_inv)
    assert torch.equal(stack.gate_up[1, INNER:], weight.view(torch.uint8))
    assert torch.equal(stack.gate_up_scale[1, 2:], scale_inv)
    assert not stack.gate_up[0].any() and not stack.gate_up[1, :INNER].any()


def test_size_is_the_bytes_as_stored() -> None:
    one_expert = 2 * compute_packed_bytes((INNER, HIDDEN), BLOCK) + compute_packed_bytes((HIDDEN, INNER), BLOCK)
    assert allocate().size_bytes == 2 * one_expert


def test_a_foreign_expert_or_shape_is_refused() -> None:
    stack = allocate()
    weight, scale_inv = quantize_block(torch.randn(INNER, HIDDEN), BLOCK)
    with pytest.raises(ValueError, match="expert 4 is not one"):
        stack.put_(4, "up_proj", weight, scale_inv)
    with pytest.raises(ValueError, match="down_proj of expert 3"):
        stack.put_(3, "down_proj", weight, scale_inv)
    with pytest.raises(ValueError, match="up_proj scales of expert 3"):
        stack.put_(3, "up_proj", weight, scale_inv[:1])


def test_expert_ids_ascend() -> None:
    with pytest.raises(ValueError, match="ascending"):
        ExpertStack.allocate(np.array([2, 2]), HIDDEN, INNER, BLOCK, "cpu")


def test_a_block_that_is_no_step_of_the_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match="128 x 96"):
        ExpertStack.allocate(np.array([0]), HIDDEN, INNER, (128, 96), "cpu")


def test_a_matrix_keeps_the_checkpoints_bytes() -> None:
    weight, scale_inv = quantize_block(torch.randn(300, 200), BLOCK)
    matrix = BlockScaledMatrix.from_fp8(weight, scale_inv, BLOCK, "cpu")
    assert torch.equal(matrix.weight, weight.view(torch.uint8))
    assert matrix.size_bytes == compute_packed_bytes((300, 200), BLOCK)
    with pytest.raises(ValueError, match="scale_inv: expected"):
        BlockScaledMatrix(matrix.weight, torch.ones(scale_shape((300, 300), BLOCK)), BLOCK)
