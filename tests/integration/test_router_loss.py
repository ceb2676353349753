"""Routers die, or fall silent, under running streams: every stream ends with the tokens that it would have had."""

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from router.v1 import router_pb2, router_pb2_grpc
from tests.local_stack import (
    START_TIMEOUT_S,
    ExtraRouter,
    LocalStack,
    ManagedProcess,
    StackOptions,
    extra_api,
    local_stack,
    router_arguments,
    wait_until_ready,
)
from tests.tolerances import LOGPROB_BY_DTYPE

NUM_TOKENS = 120
TIMEOUT_S = 120.0

GREEDY: dict[str, Any] = {"temperature": 0}
SEEDED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 17}
PENALISED: dict[str, Any] = {**SEEDED, "frequency_penalty": 0.8, "presence_penalty": 0.5, "repetition_penalty": 1.2}
REQUESTS = [
    {"prompt": [10 + number, *range(40, 50 + number)], "max_tokens": NUM_TOKENS, "logprobs": 1, **kind}
    for number, kind in enumerate((GREEDY, GREEDY, GREEDY, SEEDED, SEEDED, PENALISED, PENALISED, PENALISED))
]


class Answer(NamedTuple):
    text: str
    tokens: list[str]
    logprobs: list[float]
    finish_reason: str


class Cluster:
    """Two routers and a front on the expert groups of a stack."""

    def __init__(self, stack: LocalStack) -> None:
        self._stack = stack
        self.routers = [self._start(port=0), self._start(port=0)]
        self.url = ""

    def restore(self) -> None:
        """Both routers up, each on its own port."""
        for index, router in enumerate(self.routers):
            if not router.process.is_running:
                self.restart(index)
        for router in self.routers:
            self._wait_ready(router)

    def restart(self, index: int) -> None:
        """Does not wait until it is ready."""
        self.routers[index] = self._start(self.routers[index].port)

    def count_running(self, index: int) -> int:
        with self.routers[index].channel() as channel:
            stub = router_pb2_grpc.RouterServiceStub(channel)
            return stub.Status(router_pb2.StatusRequest(), timeout=TIMEOUT_S).num_running

    def stop(self) -> None:
        for router in self.routers:
            router.process.stop()

    def run_all(self, disturb: Callable[[], None] = lambda: None) -> list[Answer]:
        """All requests as streams at once; disturb: called when each has had a token and none its last."""
        begun = threading.Barrier(len(REQUESTS) + 1)
        with ThreadPoolExecutor(len(REQUESTS)) as threads:
            running = [threads.submit(self._stream, body, begun) for body in REQUESTS]
            begun.wait(TIMEOUT_S)
            disturb()
            return [each.result(TIMEOUT_S) for each in running]

    def _stream(self, body: dict[str, Any], begun: threading.Barrier) -> Answer:
        answer = Answer("", [], [], "")
        body = {**body, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=TIMEOUT_S) as response:
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                (choice,) = event["choices"]
                logprobs = choice["logprobs"] or {"tokens": [], "token_logprobs": []}
                is_first = not answer.tokens
                answer = Answer(
                    answer.text + choice["text"],
                    answer.tokens + logprobs["tokens"],
                    answer.logprobs + logprobs["token_logprobs"],
                    choice["finish_reason"] or "",
                )
                if is_first and answer.tokens:
                    begun.wait(TIMEOUT_S)
        return answer

    def _start(self, port: int) -> ExtraRouter:
        arguments = router_arguments(self._stack.checkpoint, self._stack.options, self._stack.expert_ports, port)
        process = ManagedProcess("router", arguments, self._stack.log_folder)
        if port:
            return ExtraRouter(process, f"127.0.0.1:{port}")
        return ExtraRouter(process, process.wait_ready(time.monotonic() + START_TIMEOUT_S)["endpoint"])

    @staticmethod
    def _wait_ready(router: ExtraRouter) -> None:
        with router.channel() as channel:
            wait_until_ready(channel, time.monotonic() + START_TIMEOUT_S, router.process.stderr_tail)


@pytest.fixture(scope="module")
def cluster(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    options = StackOptions(num_groups=2, api=False)
    with contextlib.ExitStack() as running:
        stack = running.enter_context(local_stack(checkpoint, tmp_path_factory.mktemp("router-loss"), options))
        cluster = Cluster(stack)
        running.callback(cluster.stop)
        cluster.restore()
        waits = ("--router-dead-s", "1", "--router-wait-s", str(START_TIMEOUT_S))
        cluster.url = running.enter_context(extra_api(stack, [router.port for router in cluster.routers], waits))
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> list[Answer]:
    answers = cluster.run_all()
    assert [(len(answer.tokens), answer.finish_reason) for answer in answers] == [(NUM_TOKENS, "length")] * 8
    assert len({answer.text for answer in answers}) == len(answers)
    return answers


def assert_same(found: list[Answer], expected: list[Answer]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.text, one.tokens, one.finish_reason) == (other.text, other.tokens, other.finish_reason)
        assert one.logprobs == pytest.approx(other.logprobs, abs=LOGPROB_BY_DTYPE["float32"])


def test_one_of_two_routers_is_killed(cluster: Cluster, undisturbed: list[Answer]) -> None:
    cluster.restore()

    def kill() -> None:
        assert cluster.count_running(1) > 0
        cluster.routers[1].process.kill()

    assert_same(cluster.run_all(kill), undisturbed)


def test_one_of_two_routers_falls_silent(cluster: Cluster, undisturbed: list[Answer]) -> None:
    cluster.restore()

    def freeze() -> None:
        assert cluster.count_running(0) > 0
        cluster.routers[0].process.send_signal(signal.SIGSTOP)

    try:
        assert_same(cluster.run_all(freeze), undisturbed)
    finally:
        cluster.routers[0].process.send_signal(signal.SIGCONT)
    deadline = time.monotonic() + TIMEOUT_S
    while cluster.count_running(0) > 0:  # awake again, it finds that nobody wants its streams any more
        assert time.monotonic() < deadline


def test_all_routers_are_killed_and_one_comes_back(cluster: Cluster, undisturbed: list[Answer]) -> None:
    cluster.restore()

    def kill_all() -> None:
        assert cluster.count_running(0) + cluster.count_running(1) > 0
        for router in cluster.routers:
            router.process.kill()
        cluster.restart(1)

    assert_same(cluster.run_all(kill_all), undisturbed)
