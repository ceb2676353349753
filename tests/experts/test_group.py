"""A whole group against the judge, from stored bytes to the rounded answer; and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from experts.checkpoint import Checkpoint
from experts.errors import BadFrame, NotHosted, Overloaded
from experts.expert_range import ExpertRange, split_experts
from experts.group import ExpertGroup
from experts.kernels.expert_kernel import TorchKernel
from experts.weights import load_expert_weights
from experts.wire import ComputeFrame, decode_request, encode_request
from tests.experts.reference import expert_ffn_reference
from tests.tolerances import KERNEL_RELATIVE_ERROR

NUM_EXPERTS = 8
NUM_CHOSEN = 4


def make_frame(**overrides: Any) -> ComputeFrame:
    """6 rows, each choosing 4 of 8 experts, as decoded from the wire: unaligned, read-only memory."""
    generator = torch.Generator().manual_seed(5)
    num_rows = overrides.pop("num_rows", 6)
    wire_dtype = overrides.pop("wire_dtype", torch.bfloat16)
    chosen = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:NUM_CHOSEN] for _ in range(num_rows)])
    request: dict[str, Any] = {
        "frame_id": 1,
        "incarnation": 1,
        "table_version": 1,
        "layer_id": 1,
        "hidden_states": torch.randn(num_rows, 192, generator=generator).to(wire_dtype),
        "pair_rows": torch.arange(num_rows, dtype=torch.int32).repeat_interleave(NUM_CHOSEN),
        "pair_experts": chosen.sort(dim=1).values.reshape(-1).to(torch.int32),
        "pair_weights": torch.rand(num_rows * NUM_CHOSEN, generator=generator) + 0.1,
        "exact": False,
        "deadline_ms": 1000,
        **overrides,
    }
    return decode_request(encode_request(**request))


def keep_pairs(frame: ComputeFrame, experts: ExpertRange) -> ComputeFrame:
    """The frame that a router would send to the group with these experts."""
    kept = (frame.pair_experts >= experts.expert_start) & (frame.pair_experts < experts.expert_end)
    rows = np.unique(frame.pair_rows[kept])
    return decode_request(
        encode_request(
            frame_id=1,
            incarnation=1,
            table_version=1,
            layer_id=frame.layer_id,
            hidden_states=frame.hidden_states[torch.from_numpy(rows).long()],
            pair_rows=torch.from_numpy(np.searchsorted(rows, frame.pair_rows[kept]).astype(np.int32)),
            pair_experts=torch.from_numpy(frame.pair_experts[kept]),
            pair_weights=torch.from_numpy(frame.pair_weights[kept]),
            exact=frame.exact,
            deadline_ms=1000,
        )
    )


def load_group(checkpoint: Checkpoint, dtype: torch.dtype, num_groups: int = 1, index: int = 0) -> ExpertGroup:
    return ExpertGroup(load_expert_weights(checkpoint, split_experts(checkpoint.config, num_groups)[index], dtype))


def judge(checkpoint: Checkpoint, frame: ComputeFrame) -> torch.Tensor:
    """float32 [num_result_rows, hidden] straight from the checkpoint."""
    config = checkpoint.config
    sizes = {"gate": (160, 192), "up": (160, 192), "down": (192, 160)}
    matrices = {
        expert: tuple(
            checkpoint.read_weight(
                f"model.layers.{frame.layer_id}.mlp.experts.{expert}.{name}_proj.weight", shape, torch.float32
            )
            for name, shape in sizes.items()
        )
        for expert in range(config.n_routed_experts)
    }
    pairs = [torch.from_numpy(part.copy()) for part in (frame.pair_rows, frame.pair_experts, frame.pair_weights)]
    return expert_ffn_reference(frame.hidden_states, *pairs, matrices, exact=frame.exact)  # type: ignore[arg-type]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("num_rows", [1, 6, 40])
def test_fp32_on_an_fp32_wire_agrees_with_the_judge(fp8_checkpoint: Checkpoint, exact: bool, num_rows: int) -> None:
    frame = make_frame(exact=exact, wire_dtype=torch.float32, num_rows=num_rows)
    found = load_group(fp8_checkpoint, torch.float32).compute(frame)
    expected = judge(fp8_checkpoint, frame)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


def test_fp32_on_a_bf16_wire_is_rounded_once_at_the_end(fp8_checkpoint: Checkpoint) -> None:
    frame = make_frame(wire_dtype=torch.bfloat16)
    group = load_group(fp8_checkpoint, torch.float32)
    wide = make_frame(wire_dtype=torch.float32, hidden_states=frame.hidden_states.to(torch.float32))
    assert torch.equal(group.compute(frame), group.compute(wide).to(torch.bfloat16))


def test_bf16_agrees_with_the_judge_within_the_rounding_of_bf16(fp8_checkpoint: Checkpoint) -> None:
    frame = make_frame()
    found = load_group(fp8_checkpoint, torch.bfloat16).compute(frame)
    expected = judge(fp8_checkpoint, frame)
    assert found.dtype == torch.bfloat16
    # Weights, inner values and the answer are rounded to 8 bits each; the norm averages those out.
    assert float((found.float() - expected).norm() / expected.norm()) <= 4 * KERNEL_RELATIVE_ERROR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_groups", [2, 4])
def test_exact_answers_of_several_groups_are_bit_equal_to_those_of_one(
    fp8_checkpoint: Checkpoint, dtype: torch.dtype, num_groups: int
) -> None:
    frame = make_frame(exact=True, num_rows=9)
    whole = load_group(fp8_checkpoint, dtype).compute(frame)
    for index, (experts,) in enumerate(split_experts(fp8_checkpoint.config, num_groups)):
        part = load_group(fp8_checkpoint, dtype, num_groups, index).compute(keep_pairs(frame, experts))
        mine = (frame.pair_experts >= experts.expert_start) & (frame.pair_experts < experts.expert_end)
        assert torch.equal(part, whole[torch.from_numpy(mine)])


def test_the_same_frame_gives_the_same_bits_again(fp8_checkpoint: Checkpoint) -> None:
    group = load_group(fp8_checkpoint, torch.bfloat16)
    first = group.compute(make_frame())
    assert all(torch.equal(group.compute(make_frame()), first) for _ in range(5))


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"layer_id": 0}, NotHosted, "layer 0 is not hosted here"),
        ({"layer_id": 99}, NotHosted, "layer 99 is not hosted here"),
        ({"hidden_states": torch.zeros(6, 64)}, BadFrame, "hidden size: expected 192, got 64"),
    ],
)
def test_refuses_what_it_cannot_compute(
    fp8_checkpoint: Checkpoint, overrides: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_group(fp8_checkpoint, torch.bfloat16).compute(make_frame(**overrides))


def test_refuses_experts_of_another_group_and_beyond_the_model(fp8_checkpoint: Checkpoint) -> None:
    group = load_group(fp8_checkpoint, torch.bfloat16, num_groups=4, index=1)
    with pytest.raises(NotHosted, match=r"layer 1: experts \[.*\] are not hosted here"):
        group.compute(make_frame())
    beyond = make_frame(
        num_rows=1, pair_rows=torch.zeros(1, dtype=torch.int32), pair_weights=torch.ones(1),
        pair_experts=torch.tensor([2**31 - 1], dtype=torch.int32),
    )  # fmt: skip
    with pytest.raises(NotHosted, match="2147483647"):
        group.compute(beyond)


def test_a_card_that_fails_ends_the_process_and_one_out_of_memory_sheds_the_frame(
    fp8_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[bool] = []
    hosted = split_experts(fp8_checkpoint.config, 1)[0]
    weights = load_expert_weights(fp8_checkpoint, hosted, torch.bfloat16, kernel=TorchKernel(torch.bfloat16))
    group = ExpertGroup(weights, end_process=lambda: ended.append(True))
    for error, raised in ((torch.OutOfMemoryError("full"), Overloaded), (torch.AcceleratorError("lost"), Exception)):
        assert not ended

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(weights.kernel, "expert_ffn", fail)
        with pytest.raises(raised):
            group.compute(make_frame())
    assert ended == [True]


def test_hosts_several_rectangles(fp8_checkpoint: Checkpoint) -> None:
    hosted = (ExpertRange(1, 2, 0, 8), ExpertRange(2, 3, 4, 6))
    group = ExpertGroup(load_expert_weights(fp8_checkpoint, hosted, torch.bfloat16))
    assert group.compute(make_frame(layer_id=1)).shape == (6, 192)
    with pytest.raises(NotHosted):
        group.compute(make_frame(layer_id=2))


def test_the_numerics_id_tells_compute_dtypes_apart(fp8_checkpoint: Checkpoint) -> None:
    ids = {load_group(fp8_checkpoint, dtype).numerics_id for dtype in (torch.float32, torch.bfloat16)}
    assert len(ids) == 2
