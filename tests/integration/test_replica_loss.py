"""One of two replicas of a group is killed, stopped or cut off while streams run: same tokens, nobody is told."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from router.v1 import router_pb2
from tests.integration.router_client import Generation, generate
from tests.local_stack import START_TIMEOUT_S, LocalStack, StackOptions, local_stack, wait_until

NUM_STREAMS = 4
NUM_TOKENS = 60
PROMPTS = [list(range(20 + 3 * number, 60 + number)) for number in range(NUM_STREAMS)]
PROXIED = 0


@pytest.fixture(scope="module")
def replicated_stack(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    options = StackOptions(num_groups=2, num_replicas=2, proxied_expert=PROXIED, api=False, deterministic=True)
    with local_stack(checkpoint, tmp_path_factory.mktemp("replicated"), options) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(replicated_stack: LocalStack) -> list[Generation]:
    with replicated_stack.router_channel() as channel:
        return [generate(channel, prompt, NUM_TOKENS) for prompt in PROMPTS]


def wait_whole(stack: LocalStack) -> None:
    wait_until(
        lambda: len(stack.status().connected_replica_ids) == len(stack.experts),
        time.monotonic() + START_TIMEOUT_S,
        stack.describe_failure,
    )


def run_until(stack: LocalStack, disturb: Callable[[], None], is_found: Callable[[router_pb2.StatusResponse], bool]):
    """Streams one after another, in threads, while a fault comes and until it is found, and once more. Returns each
    stream's number and what it gave."""
    over = threading.Event()

    def stream(number: int) -> list[tuple[int, Generation]]:
        found: list[tuple[int, Generation]] = []
        with stack.router_channel() as channel:
            is_last = False
            while not is_last:
                is_last = over.is_set()
                found.append((number, generate(channel, PROMPTS[number], NUM_TOKENS)))
        return found

    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        streams = [pool.submit(stream, number) for number in range(NUM_STREAMS)]
        try:
            disturb()
            wait_until(lambda: is_found(stack.status()), time.monotonic() + START_TIMEOUT_S, stack.describe_failure)
        finally:
            over.set()
        return [pair for future in streams for pair in future.result()]


def check(found: list[tuple[int, Generation]], undisturbed: list[Generation]) -> None:
    assert len(found) >= NUM_STREAMS
    for number, generation in found:
        assert generation == undisturbed[number]


@pytest.mark.parametrize("killed", [1, 2])
def test_a_killed_replica_is_not_noticed(
    replicated_stack: LocalStack, undisturbed: list[Generation], killed: int
) -> None:
    stack = replicated_stack
    wait_whole(stack)
    found = run_until(
        stack, stack.experts[killed].kill, lambda status: len(status.connected_replica_ids) < len(stack.experts)
    )
    stack.restart_expert(killed)
    check(found, undisturbed)


def test_a_stopped_replica_is_found_by_its_heartbeats(
    replicated_stack: LocalStack, undisturbed: list[Generation]
) -> None:
    stack = replicated_stack
    wait_whole(stack)
    num_missed = stack.status().dispatch.num_missed_heartbeats
    stopped = stack.experts[3]
    try:
        found = run_until(
            stack,
            lambda: stopped.send_signal(signal.SIGSTOP),
            lambda status: len(status.connected_replica_ids) < len(stack.experts),
        )
    finally:
        stopped.send_signal(signal.SIGCONT)
    check(found, undisturbed)
    assert stack.status().dispatch.num_missed_heartbeats >= num_missed + 3
    wait_whole(stack)  # the same process, by itself


@pytest.mark.parametrize("direction", ["to_server", "to_client"])
def test_a_replica_whose_network_loses_one_direction_is_found(
    replicated_stack: LocalStack, undisturbed: list[Generation], direction: str
) -> None:
    stack, proxy = replicated_stack, replicated_stack.expert_proxy
    assert proxy is not None and direction in ("to_server", "to_client")
    wait_whole(stack)
    try:
        found = run_until(
            stack,
            lambda: proxy.black_hole(direction),
            lambda status: len(status.connected_replica_ids) < len(stack.experts),
        )
    finally:
        proxy.restore()
    check(found, undisturbed)
    wait_whole(stack)
