"""The same prompts through 1, 2 and 4 expert groups, in the dtype that is served by default."""

import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch

from experts.wire import WireFormat
from router.dispatch import CombineMode
from router.server import RouterConfig, RouterServer
from tests.integration.router_client import Generation, generate
from tests.local_stack import (
    HOST,
    START_TIMEOUT_S,
    ManagedProcess,
    StackOptions,
    expert_arguments,
    stop_all,
    wait_until_ready,
)
from tests.random_checkpoint import write_random_checkpoint
from tests.router.in_process import load_groups, start_replica
from tests.tolerances import LOGPROB_BY_DTYPE

GROUP_COUNTS = (1, 2, 4)
NUM_TOKENS = 24
PROMPTS = [[7, 100, 31, 250, 99, 12, 300, 5] * 4, [42], list(range(10, 180))]

GenerationsByCount = dict[int, list[Generation]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """V3 in FP8 with logits of the size that the tolerance is made for."""
    folder = tmp_path_factory.mktemp("group-counts") / "checkpoint"
    write_random_checkpoint(folder, seed=5, fp8=True, logit_gain=1.0)
    return folder


@pytest.fixture(scope="module")
def expert_endpoints(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, list[str]]]:
    """Endpoints of the expert groups by number of groups."""
    logs = tmp_path_factory.mktemp("experts")
    started: dict[int, list[ManagedProcess]] = {num_groups: [] for num_groups in GROUP_COUNTS}
    try:
        for num_groups in GROUP_COUNTS:
            options = StackOptions(num_groups=num_groups, dtype="bfloat16")
            for index in range(num_groups):
                arguments = expert_arguments(checkpoint, options, index, port=0)
                started[num_groups].append(ManagedProcess(f"expert-{index}-of-{num_groups}", arguments, logs))
        deadline = time.monotonic() + START_TIMEOUT_S
        yield {
            num_groups: [process.wait_ready(deadline)["endpoint"] for process in group]
            for num_groups, group in started.items()
        }
    finally:
        stop_all(process for group in started.values() for process in group)


@pytest.fixture(scope="module")
def exact(checkpoint: Path, expert_endpoints: dict[int, list[str]]) -> GenerationsByCount:
    """Every prompt by number of groups, combined exactly. Experts are processes of their own."""
    return {count: run_prompts(checkpoint, endpoints, "exact") for count, endpoints in expert_endpoints.items()}


@pytest.fixture(scope="module")
def all_chosen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every token takes all experts. Where it must choose, rounding decides between experts whose scores nearly tie,
    and a token that takes another expert is another computation, not a less exact one."""
    folder = tmp_path_factory.mktemp("all-chosen") / "checkpoint"
    write_random_checkpoint(
        folder, seed=5, fp8=True, logit_gain=1.0, n_routed_experts=8, num_experts_per_tok=8, n_group=1, topk_group=1
    )
    return folder


@pytest.fixture(scope="module")
def reduced(all_chosen: Path) -> GenerationsByCount:
    """Every prompt by number of groups, pre-reduced per group. Experts are servers in this process."""
    results: GenerationsByCount = {}
    for count in GROUP_COUNTS:
        groups = load_groups(all_chosen, count, torch.bfloat16)
        servers = [start_replica(group, f"g{index}", f"g{index}-0") for index, group in enumerate(groups)]
        try:
            results[count] = run_prompts(all_chosen, [server.endpoint for server in servers], "reduced")
        finally:
            for server in servers:
                server.stop(grace_s=0)
    return results


def run_prompts(checkpoint: Path, endpoints: list[str], combine: CombineMode) -> list[Generation]:
    # Endpoints in another order than the groups': the order of the sums must not follow it.
    server = RouterServer(
        RouterConfig(
            checkpoint=str(checkpoint),
            host=HOST,
            dtype=torch.bfloat16,
            wire_format=WireFormat.BFLOAT16,
            combine=combine,
            expert_endpoints=tuple(reversed(endpoints)),
            num_threads=1,
        )
    )
    try:
        endpoint = server.start()
        server.wait_loaded(START_TIMEOUT_S)
        with grpc.insecure_channel(endpoint) as channel:
            wait_until_ready(channel, time.monotonic() + START_TIMEOUT_S)
            return [generate(channel, prompt, NUM_TOKENS) for prompt in PROMPTS]
    finally:
        server.stop()


@pytest.mark.parametrize("num_groups", [2, 4])
def test_exact_combine_is_bit_equal_across_group_counts(exact: GenerationsByCount, num_groups: int) -> None:
    assert exact[num_groups] == exact[1]


@pytest.mark.parametrize("num_groups", [2, 4])
def test_reduced_combine_agrees_within_tolerance(reduced: GenerationsByCount, num_groups: int) -> None:
    """Logprobs of the prompts: the same tokens whatever was generated, so every position can be compared."""
    for ours, others in zip(reduced[1], reduced[num_groups], strict=True):
        assert others.prompt_logprobs == pytest.approx(ours.prompt_logprobs, abs=LOGPROB_BY_DTYPE["bfloat16"])


def test_reduced_sums_do_depend_on_the_number_of_groups(reduced: GenerationsByCount) -> None:
    """Or the comparisons above would hold for a reason of their own."""
    assert reduced[1] != reduced[4]
