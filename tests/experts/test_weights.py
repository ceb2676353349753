"""Loading a group's experts: the right numbers, nothing else read, and a digest that tells weights apart."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from experts.checkpoint import Checkpoint
from experts.expert_range import ExpertRange, split_experts
from experts.kernels.expert_kernel import TorchKernel
from experts.weights import change_hosted, load_expert_weights
from tests.random_checkpoint import dequantized_twin, read_tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_are_the_dequantised_ones_rounded_once(fp8_folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    twin = read_tensors(dequantized_twin(fp8_folder, tmp_path))
    with Checkpoint(fp8_folder) as checkpoint:
        weights = load_expert_weights(checkpoint, [ExpertRange(1, 3, 2, 5)], dtype, kernel=TorchKernel(dtype))
    assert {layer: list(experts) for layer, experts in weights.layers.items()} == {1: [2, 3, 4], 2: [2, 3, 4]}
    for layer_id, experts in weights.layers.items():
        for expert_id, matrices in experts.items():
            prefix = f"model.layers.{layer_id}.mlp.experts.{expert_id}"
            gate_up = torch.cat([twin[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up")])
            assert torch.equal(matrices.gate_up, gate_up.to(dtype))
            assert torch.equal(matrices.down, twin[f"{prefix}.down_proj.weight"].to(dtype))
    assert weights.resident_bytes == 6 * 3 * 192 * 160 * dtype.itemsize


def test_the_groups_together_hold_every_expert_mtp_layers_included(fp8_checkpoint: Checkpoint) -> None:
    groups = split_experts(fp8_checkpoint.config, 3)
    loaded = [load_expert_weights(fp8_checkpoint, group, torch.bfloat16) for group in groups]
    pairs = [(layer, expert) for group in loaded for layer, experts in group.layers.items() for expert in experts]
    assert sorted(pairs) == [(layer, expert) for layer in (1, 2, 3) for expert in range(8)]


def test_the_digest_is_over_the_stored_bytes_by_layer_expert_and_name(fp8_folder: Path) -> None:
    tensors = read_tensors(fp8_folder)
    digest = hashlib.sha256()
    for layer_id in (1, 2):
        for expert_id in (0, 1):
            prefix = f"model.layers.{layer_id}.mlp.experts.{expert_id}."
            names = sorted(name for name in tensors if name.startswith(prefix))
            stored = b"".join(tensors[name].view(torch.uint8).numpy().tobytes() for name in names)
            digest.update(hashlib.sha256(stored).digest())
    with Checkpoint(fp8_folder) as checkpoint:
        weights = load_expert_weights(checkpoint, [ExpertRange(0, 3, 0, 2)], torch.bfloat16)
    assert weights.digest == digest.hexdigest()


def test_the_digest_ignores_the_compute_dtype_and_tells_experts_apart(fp8_checkpoint: Checkpoint) -> None:
    first, second = split_experts(fp8_checkpoint.config, 2)
    bf16 = load_expert_weights(fp8_checkpoint, first, torch.bfloat16)
    fp32 = load_expert_weights(fp8_checkpoint, first, torch.float32)
    other = load_expert_weights(fp8_checkpoint, second, torch.bfloat16)
    assert bf16.digest == fp32.digest != other.digest


def test_a_group_needs_only_the_files_with_its_own_tensors(broken_folder: Path) -> None:
    with Checkpoint(broken_folder) as checkpoint:
        files_of = {
            expert_id: {checkpoint.placed_file(n) for n in checkpoint.names if f".1.mlp.experts.{expert_id}." in n}
            for expert_id in range(8)
        }
        expert_id, files = next(item for item in files_of.items() if len(item[1]) == 1)
        others = set(checkpoint.files) - files
    for file in others:
        (broken_folder / file).unlink()
    with Checkpoint(broken_folder) as checkpoint:
        weights = load_expert_weights(checkpoint, [ExpertRange(1, 2, expert_id, expert_id + 1)], torch.bfloat16)
    assert others and list(weights.layers[1]) == [expert_id]


def test_progress_rises_to_one(fp8_checkpoint: Checkpoint) -> None:
    seen: list[float] = []
    load_expert_weights(
        fp8_checkpoint, split_experts(fp8_checkpoint.config, 1)[0], torch.bfloat16, on_fraction=seen.append
    )
    assert seen == sorted(seen) and seen[-1] == 1.0


@pytest.mark.parametrize("kernel", [None, TorchKernel(torch.bfloat16)], ids=["native", "torch"])
def test_changed_weights_are_those_of_a_fresh_load_and_keep_what_was_there(
    fp8_checkpoint: Checkpoint, kernel: TorchKernel | None
) -> None:
    before = load_expert_weights(fp8_checkpoint, [ExpertRange(1, 4, 0, 4)], torch.bfloat16, kernel=kernel)
    hosted = (ExpertRange(1, 2, 2, 7), ExpertRange(2, 3, 0, 4))
    after = change_hosted(before, fp8_checkpoint, hosted)
    fresh = load_expert_weights(fp8_checkpoint, hosted, torch.bfloat16, kernel=kernel)
    assert (after.digest, after.hosted, after.resident_bytes) == (fresh.digest, fresh.hosted, fresh.resident_bytes)
    assert {layer_id: list(experts) for layer_id, experts in after.layers.items()} == {
        1: [2, 3, 4, 5, 6],
        2: [0, 1, 2, 3],
    }
    assert after.layers[1][2] is before.layers[1][2] and after.layers[2] is before.layers[2]
    rows = torch.randn(3, 192, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    pairs = (np.array([0, 1, 2], np.int32), np.array([2, 5, 6], np.int32), np.ones(3, np.float32))
    results = [
        weights.kernel.expert_ffn(rows, *pairs, weights.layers[1], exact=False).clone() for weights in (after, fresh)
    ]
    assert torch.equal(*results)


def test_experts_can_leave_without_any_arriving(fp8_checkpoint: Checkpoint) -> None:
    before = load_expert_weights(fp8_checkpoint, [ExpertRange(1, 4, 0, 4)], torch.bfloat16)
    seen: list[float] = []
    after = change_hosted(before, fp8_checkpoint, (ExpertRange(2, 3, 1, 3),), seen.append)
    assert {layer_id: list(experts) for layer_id, experts in after.layers.items()} == {2: [1, 2]}
    assert seen == []
