"""The router's service on its own thread, as clients see it: answers to everything, with or without experts."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import torch

from router.errors import NotReady
from router.server import RouterConfig, RouterServer
from router.v1 import router_pb2, router_pb2_grpc
from router.weights import TrunkWeights
from tests.router.in_process import DEADLINE_S

PROMPT = [0, 5, 9]


@contextlib.contextmanager
def serving(folder: Path, expert_wait_s: float) -> Iterator[router_pb2_grpc.RouterServiceStub]:
    """A router without any expert."""
    server = RouterServer(
        RouterConfig(checkpoint=str(folder), dtype=torch.float32, max_model_len=64, expert_wait_s=expert_wait_s)
    )
    endpoint = server.start()
    try:
        server.wait_loaded(DEADLINE_S)
        with grpc.insecure_channel(endpoint) as channel:
            yield router_pb2_grpc.RouterServiceStub(channel)
    finally:
        server.stop()


def generate_request(**fields: object) -> router_pb2.GenerateRequest:
    return router_pb2.GenerateRequest(**{"prompt_token_ids": PROMPT, "max_tokens": 4, **fields})  # pyright: ignore


def wait_status(
    stub: router_pb2_grpc.RouterServiceStub, reached: Callable[[router_pb2.StatusResponse], bool]
) -> router_pb2.StatusResponse:
    """Ask until the router is where the test wants it."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not reached(status := stub.Status(router_pb2.StatusRequest(), timeout=DEADLINE_S)):
        assert time.monotonic() < deadline_s, status
    return status


def test_without_experts_a_request_waits_and_is_told_what_is_missing(tiny_checkpoint: Path) -> None:
    with serving(tiny_checkpoint, expert_wait_s=0.3) as stub:
        for _ in range(2):  # the second one finds the engine alive, and has nothing to wait for any more
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.Generate(generate_request(), timeout=DEADLINE_S))
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert "no expert group" in str(caught.value.details())
        status = stub.Status(router_pb2.StatusRequest(), timeout=DEADLINE_S)
        assert not status.ready and status.num_running == 0 and status.unserved_ms >= 300
        assert status.message.endswith(" s now")
        assert status.message.startswith("no expert group hosts layer 1, expert 0")


def test_requests_cancelled_in_a_step_and_in_the_queue_are_forgotten(tiny_checkpoint: Path) -> None:
    with serving(tiny_checkpoint, expert_wait_s=DEADLINE_S) as stub:
        stepping = stub.Generate(generate_request())
        wait_status(stub, lambda status: status.num_running == 1)  # its step waits for experts from now on
        waiting = stub.Generate(generate_request())
        wait_status(stub, lambda status: status.num_waiting == 1)
        waiting.cancel()
        wait_status(stub, lambda status: (status.num_running, status.num_waiting) == (1, 0))
        stepping.cancel()
        wait_status(stub, lambda status: (status.num_running, status.num_waiting) == (0, 0))
        drained = stub.Drain(router_pb2.DrainRequest(timeout_ms=1000), timeout=DEADLINE_S)
        assert drained.num_running == 0
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(generate_request(), timeout=DEADLINE_S))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE and "draining" in str(caught.value.details())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_token_ids": []}, "the prompt has no tokens"),
        ({"max_tokens": 62}, "together more than the context of 64"),
        ({"stop_token_ids": [320], "min_tokens": 1}, "stop token id 320 is outside the vocabulary of 320"),
        ({"sampling": router_pb2.SamplingParams(temperature=float("nan"))}, "temperature must be between 0 and"),
        ({"sampling": router_pb2.SamplingParams(repetition_penalty=0.0)}, "repetition_penalty must be between 0.01"),
        ({"sampling": router_pb2.SamplingParams(logit_bias={1: 101.0})}, "logit_bias must be between -100 and 100"),
        ({"num_answer_tokens": 4}, "4 answer tokens in a prompt of 3"),
    ],
    ids=["empty prompt", "too long", "stop id", "NaN", "repetition", "bias", "answer"],
)
def test_bad_requests_are_invalid_arguments(tiny_checkpoint: Path, fields: dict[str, object], message: str) -> None:
    with serving(tiny_checkpoint, expert_wait_s=1.0) as stub:
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(generate_request(**fields), timeout=DEADLINE_S))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert message in str(caught.value.details())


def test_a_malformed_expert_table_is_refused_and_an_older_one_too(tiny_checkpoint: Path) -> None:
    malformed = router_pb2.ExpertTable(version=9)
    malformed.groups.add(name="g0").hosted.add(layer_start=1, layer_end=1, expert_start=0, expert_end=4)
    with serving(tiny_checkpoint, expert_wait_s=1.0) as stub:

        def push(table: router_pb2.ExpertTable) -> int:
            return stub.UpdateExpertTable(router_pb2.UpdateExpertTableRequest(table=table), timeout=DEADLINE_S).version

        assert push(router_pb2.ExpertTable(version=5)) == 5
        with pytest.raises(grpc.RpcError) as caught:
            push(malformed)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as caught:
            push(router_pb2.ExpertTable(version=4))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert push(router_pb2.ExpertTable(version=5)) == 5


def test_a_router_that_is_stopped_while_it_loads_stops_loading(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, ended = threading.Event(), threading.Event()

    def load_for_ever(*_: object, on_layer: Callable[[float], None], **__: object) -> TrunkWeights:
        try:
            while True:
                on_layer(0.5)
                loading.set()
        except NotReady:
            ended.set()
            raise

    monkeypatch.setattr("router.server.load_trunk_weights", load_for_ever)
    server = RouterServer(RouterConfig(checkpoint=str(tiny_checkpoint)))
    endpoint = server.start()
    try:
        assert loading.wait(DEADLINE_S)
        assert not server.is_loaded(wait_s=0.0)
        with grpc.insecure_channel(endpoint) as channel:
            stub = router_pb2_grpc.RouterServiceStub(channel)
            assert stub.Status(router_pb2.StatusRequest(), timeout=DEADLINE_S).message == "loading weights"
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.Generate(generate_request(), timeout=DEADLINE_S))
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        server.stop()
    assert ended.wait(DEADLINE_S)
