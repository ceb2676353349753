"""What reaches the expert groups, counted at the groups themselves: real servers and a real router in this process."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import torch

from experts.checkpoint import Checkpoint
from experts.expert_range import ExpertRange
from experts.group import ExpertGroup
from experts.server import ExpertServer, ReplicaIdentity
from experts.weights import load_expert_weights
from experts.wire import ComputeFrame, WireFormat
from router.server import RouterConfig, RouterServer
from tests.integration.router_client import generate
from tests.local_stack import HOST, START_TIMEOUT_S, wait_until_ready
from tests.random_checkpoint import read_tensors, rewrite_tensors, write_random_checkpoint

NUM_LAYERS = 3
FIRST_MOE_LAYER = 1


class RecordingGroup(ExpertGroup):
    """Computes like any group and remembers what it was asked for."""

    frames: list[ComputeFrame]

    @property
    def frame_function(self) -> None:
        return None

    def compute(self, frame: ComputeFrame) -> torch.Tensor:
        self.frames.append(frame)
        return super().compute(frame)


Hosted = tuple[ExpertRange, ...]
StartGroups = Callable[[Path, list[Hosted]], tuple[grpc.Channel, list[RecordingGroup]]]

BY_EXPERTS: list[Hosted] = [(ExpertRange(1, NUM_LAYERS, 0, 8),), (ExpertRange(1, NUM_LAYERS, 8, 16),)]
BY_LAYERS: list[Hosted] = [(ExpertRange(1, 2, 0, 16),), (ExpertRange(2, NUM_LAYERS, 0, 16),)]


@pytest.fixture
def start_groups() -> Iterator[StartGroups]:
    """Start a group for each share of the experts, and a router for them. Called as often as a test likes."""
    with contextlib.ExitStack() as running:

        def start(checkpoint: Path, shares: list[Hosted]) -> tuple[grpc.Channel, list[RecordingGroup]]:
            groups: list[RecordingGroup] = []
            endpoints: list[str] = []
            for index, hosted in enumerate(shares):
                with Checkpoint(checkpoint) as reader:
                    group = RecordingGroup(load_expert_weights(reader, hosted, torch.float32))
                group.frames = []
                server = ExpertServer(group, ReplicaIdentity(f"g{index}", f"g{index}-0", 1 + index))
                endpoints.append(server.start())
                running.callback(server.stop, 0.0)
                groups.append(group)
            router = RouterServer(
                RouterConfig(
                    checkpoint=str(checkpoint),
                    host=HOST,
                    dtype=torch.float32,
                    wire_format=WireFormat.FLOAT32,
                    combine="exact",
                    expert_endpoints=tuple(endpoints),
                    num_threads=1,
                )
            )
            running.callback(router.stop)
            channel = running.enter_context(grpc.insecure_channel(router.start()))
            router.wait_loaded(START_TIMEOUT_S)
            wait_until_ready(channel, time.monotonic() + START_TIMEOUT_S)
            return channel, groups

        yield start


def write_biased_checkpoint(folder: Path, disfavoured: slice) -> None:
    """No gate groups; the disfavoured experts are never among the best four."""
    write_random_checkpoint(folder, n_group=1, topk_group=1, num_hidden_layers=NUM_LAYERS)
    tensors = read_tensors(folder)
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensor[disfavoured] = -1000.0
    rewrite_tensors(folder, tensors)


def test_a_group_that_no_row_chose_receives_no_frame(tmp_path: Path, start_groups: StartGroups) -> None:
    write_biased_checkpoint(tmp_path, disfavoured=slice(8, 16))
    channel, (chosen, avoided) = start_groups(tmp_path, BY_EXPERTS)

    generation = generate(channel, [5, 6, 7, 8], max_tokens=6)

    assert len(generation.token_ids) == 6
    assert avoided.frames == []
    # One frame per step and MoE layer: the prompt's step gives the first token.
    assert len(chosen.frames) == 6 * (NUM_LAYERS - FIRST_MOE_LAYER)


def test_all_rows_to_one_expert_set(tmp_path: Path, start_groups: StartGroups) -> None:
    """Every token chooses the same four experts: one frame carries every row once."""
    write_biased_checkpoint(tmp_path, disfavoured=slice(4, 16))
    channel, (chosen, _) = start_groups(tmp_path, BY_EXPERTS)

    generate(channel, list(range(50, 70)), max_tokens=1)

    for frame in chosen.frames:
        assert frame.hidden_states.shape[0] == 20
        assert frame.pair_experts.tolist() == [0, 1, 2, 3] * 20


def test_rows_are_sent_once_and_to_the_groups_that_host_their_experts(
    tmp_path: Path, start_groups: StartGroups
) -> None:
    write_random_checkpoint(tmp_path, num_hidden_layers=NUM_LAYERS)
    channel, groups = start_groups(tmp_path, BY_EXPERTS)

    generate(channel, list(range(50, 70)), max_tokens=1)

    num_pairs = 0
    for index, group in enumerate(groups):
        assert [frame.layer_id for frame in group.frames] == [1, 2]
        for frame in group.frames:
            assert set(frame.pair_experts.tolist()) <= set(range(8 * index, 8 * index + 8))
            assert sorted(set(frame.pair_rows.tolist())) == list(range(frame.hidden_states.shape[0]))
            num_pairs += len(frame.pair_experts)
    assert num_pairs == 2 * 20 * 4


def test_a_split_by_layers_answers_like_a_split_by_experts(tmp_path: Path, start_groups: StartGroups) -> None:
    write_random_checkpoint(tmp_path, num_hidden_layers=NUM_LAYERS)
    by_layers, groups = start_groups(tmp_path, BY_LAYERS)
    by_experts, _ = start_groups(tmp_path, BY_EXPERTS)

    assert generate(by_layers, [5, 6, 7, 8], 12) == generate(by_experts, [5, 6, 7, 8], 12)
    assert [{frame.layer_id for frame in group.frames} for group in groups] == [{1}, {2}]
