"""An expert group on a card, from the checkpoint's bytes to the answer in host memory, against the same on the CPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experts.checkpoint import Checkpoint
from experts.device import resolve_device
from experts.errors import NotEnoughMemory
from experts.expert_range import split_experts
from experts.group import ExpertGroup
from experts.kernels.expert_kernel import TorchKernel
from experts.weights import load_expert_weights
from experts.wire import ComputeFrame, WireFormat, decode_request, encode_request
from router.dispatch import to_wire
from tests.random_checkpoint import write_random_checkpoint

SIZES: dict[str, Any] = {"hidden_size": 512, "moe_intermediate_size": 384, "n_routed_experts": 8, "n_group": 2}
# W8A8 rounds rows and inner values to e4m3's 4 bits, which the norm averages out.
FP8_ERROR = 0.04


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("checkpoint") / "fp8"
    write_random_checkpoint(folder, fp8=True, topk_group=1, **SIZES)
    return Checkpoint(folder)


@pytest.fixture(scope="module")
def group(checkpoint: Checkpoint) -> ExpertGroup:
    return load(checkpoint, torch.bfloat16)


def load(checkpoint: Checkpoint, dtype: torch.dtype) -> ExpertGroup:
    hosted = split_experts(checkpoint.config, 1)[0]
    return ExpertGroup(load_expert_weights(checkpoint, hosted, dtype, device=resolve_device("cuda")))


def make_frame(num_rows: int, *, layer_id: int = 1, exact: bool = False, wire: str = "bfloat16") -> ComputeFrame:
    generator = torch.Generator().manual_seed(num_rows)
    chosen = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(num_rows)])
    wire_format = WireFormat(wire)
    return decode_request(
        encode_request(
            frame_id=1, incarnation=1, table_version=1, layer_id=layer_id, exact=exact, deadline_ms=1000,
            hidden_states=to_wire(torch.randn(num_rows, 512, generator=generator), wire_format),
            pair_rows=torch.arange(num_rows, dtype=torch.int32).repeat_interleave(2),
            pair_experts=chosen.sort(dim=1).values.flatten().to(torch.int32),
            pair_weights=torch.rand(2 * num_rows, generator=generator) + 0.1,
            reply_dtype=wire_format.reply_dtype,
        )
    )  # fmt: skip


def compute_on_cpu(checkpoint: Checkpoint, frame: ComputeFrame) -> torch.Tensor:
    hosted = split_experts(checkpoint.config, 1)[0]
    kernel = TorchKernel(torch.float32)
    return ExpertGroup(load_expert_weights(checkpoint, hosted, torch.float32, kernel=kernel)).compute(frame)


def relative_norm(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("wire", ["bfloat16", "float32", "fp8", "fp8-both"])
@pytest.mark.parametrize("exact", [False, True], ids=["reduced", "exact"])
@pytest.mark.parametrize("num_rows", [1, 30, 300], ids=["one row", "a graph's size", "more than a graph takes"])
def test_answers_agree_with_the_cpu(
    checkpoint: Checkpoint, group: ExpertGroup, num_rows: int, exact: bool, wire: str
) -> None:
    frame = make_frame(num_rows, exact=exact, wire=wire)
    found = group.compute(frame)
    assert found.device.type == "cpu"
    assert found.dtype == (torch.float32 if wire == "fp8-both" else WireFormat(wire).reply_dtype)
    assert relative_norm(found, compute_on_cpu(checkpoint, frame)) <= FP8_ERROR


def test_float32_is_computed_in_float32(checkpoint: Checkpoint) -> None:
    frame = make_frame(5, wire="float32")
    found = load(checkpoint, torch.float32).compute(frame)
    assert relative_norm(found, compute_on_cpu(checkpoint, frame)) <= 1e-5


def test_frames_begun_before_others_are_waited_for_keep_their_bits(group: ExpertGroup) -> None:
    frames = [make_frame(num_rows, layer_id=layer_id) for num_rows in (1, 3, 40) for layer_id in (1, 2)]
    alone = [group.compute(frame) for frame in frames]
    for _ in range(20):
        pending = [group.begin(frame) for frame in frames]
        for result, expected in zip(reversed(pending), reversed(alone), strict=True):
            assert torch.equal(result.wait(), expected)


def test_threads_that_take_turns_get_their_own_answers(group: ExpertGroup) -> None:
    frames = [make_frame(num_rows) for num_rows in (1, 2, 5, 9)]
    alone = [group.compute(frame) for frame in frames]
    with ThreadPoolExecutor(1) as other_thread:
        for _ in range(20):
            for frame, expected in zip(frames, alone, strict=True):
                assert torch.equal(other_thread.submit(group.compute, frame).result(timeout=30), expected)


def test_the_card_holds_the_weights_and_the_host_none(checkpoint: Checkpoint) -> None:
    hosted = split_experts(checkpoint.config, 1)[0]
    before = torch.cuda.memory_allocated()
    weights = load_expert_weights(checkpoint, hosted, torch.bfloat16, device=torch.device("cuda", 0))
    # Graphs and their memory come on top of the weights.
    assert torch.cuda.memory_allocated() - before >= weights.resident_bytes
    layer = weights.layers[1]
    assert layer.stack.gate_up.device.type == "cuda" and layer.graph is not None  # type: ignore[attr-defined]
    raw = checkpoint.read(f"model.layers.1.mlp.experts.{list(layer)[3]}.down_proj.weight").view(torch.uint8)
    assert np.array_equal(layer.stack.down[3].cpu().numpy(), raw.numpy())  # type: ignore[attr-defined]


def test_a_card_too_small_is_refused_before_loading(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (2**20, 2**34))
    with pytest.raises(NotEnoughMemory, match=r"on cuda:0, 0\.00 GB are available"):
        load(checkpoint, torch.bfloat16)


def test_a_checkpoint_in_bf16_is_served_by_torch(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "bf16", topk_group=1, **SIZES)
    with Checkpoint(tmp_path / "bf16") as bf16:
        frame = make_frame(7)
        assert relative_norm(load(bf16, torch.bfloat16).compute(frame), compute_on_cpu(bf16, frame)) <= 0.01
