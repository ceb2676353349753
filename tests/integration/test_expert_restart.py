"""An expert group dies in the middle of a stream and comes back on its port; nobody but this test restarts it."""

import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch

from experts.wire import WireFormat
from router.server import RouterConfig, RouterServer
from router.v1 import router_pb2, router_pb2_grpc
from tests.integration.router_client import CALL_TIMEOUT_S, build_request, generate
from tests.local_stack import HOST, START_TIMEOUT_S, LocalStack, StackOptions, local_stack, wait_until_ready

NUM_TOKENS = 300
PROMPT = list(range(20, 60))


@pytest.fixture(scope="module")
def fragile_stack(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """A stack of this module's own, whose experts may be killed."""
    options = StackOptions(num_groups=2, expert_wait_s=START_TIMEOUT_S, api=False)
    with local_stack(checkpoint, tmp_path_factory.mktemp("fragile"), options) as running:
        yield running


@pytest.mark.parametrize("killed", [0, 1])
def test_a_stream_survives_the_death_of_an_expert_process(fragile_stack: LocalStack, killed: int) -> None:
    with fragile_stack.router_channel() as channel:
        undisturbed = generate(channel, PROMPT, NUM_TOKENS)
        token_ids: list[int] = []
        logprobs: list[float] = []
        restarted = False
        stub = router_pb2_grpc.RouterServiceStub(channel)
        for response in stub.Generate(build_request(PROMPT, NUM_TOKENS), timeout=CALL_TIMEOUT_S + START_TIMEOUT_S):
            token_ids.extend(token.token_id for token in response.tokens)
            logprobs.extend(token.logprob for token in response.tokens)
            if not restarted and len(token_ids) >= 5:
                restarted = True
                fragile_stack.experts[killed].kill()
                # Nothing ends without this group, so a sequence that runs now was interrupted in its middle.
                assert fragile_stack.status().num_running == 1
                fragile_stack.restart_expert(killed)

    assert token_ids == undisturbed.token_ids
    assert logprobs == undisturbed.logprobs
    assert fragile_stack.status().connected_replica_ids == ["g0-0", "g1-0"]


def test_a_request_is_answered_in_time_when_a_group_stays_away(fragile_stack: LocalStack) -> None:
    """Who was under way or waits gets FAILED_PRECONDITION after expert_wait_s, who comes then at once; the same router
    serves again once the group is back."""
    server = RouterServer(
        RouterConfig(
            checkpoint=str(fragile_stack.checkpoint),
            host=HOST,
            dtype=torch.float32,
            wire_format=WireFormat.FLOAT32,
            expert_wait_s=1.0,
            max_num_seqs=1,
            expert_endpoints=tuple(f"{HOST}:{port}" for port in fragile_stack.expert_ports),
            num_threads=1,
        )
    )
    try:
        endpoint = server.start()
        server.wait_loaded(START_TIMEOUT_S)
        with grpc.insecure_channel(endpoint) as channel:
            wait_until_ready(channel, time.monotonic() + START_TIMEOUT_S)
            before = generate(channel, PROMPT, 8)
            stub = router_pb2_grpc.RouterServiceStub(channel)
            running = stub.Generate(build_request(PROMPT, 4000), timeout=CALL_TIMEOUT_S)
            next(running)
            waiting = stub.Generate(build_request(PROMPT, 8), timeout=CALL_TIMEOUT_S)
            deadline = time.monotonic() + CALL_TIMEOUT_S
            while _fetch_status(channel).num_waiting == 0:
                assert time.monotonic() < deadline
            fragile_stack.experts[1].kill()

            for stream in (running, waiting):
                with pytest.raises(grpc.RpcError) as refused:
                    list(stream)
                assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
                assert "g1" in (refused.value.details() or "")
            assert (refused.value.details() or "").endswith(" s now")  # it had no step of its own to wait in
            given_up = _fetch_status(channel)
            assert given_up.message.endswith("now") and given_up.unserved_ms > 900
            with pytest.raises(grpc.RpcError) as refused:
                generate(channel, PROMPT, 8)
            assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
            assert _fetch_status(channel).num_steps == given_up.num_steps

            fragile_stack.restart_expert(1).wait_ready(time.monotonic() + START_TIMEOUT_S)
            wait_until_ready(channel, time.monotonic() + START_TIMEOUT_S)
            assert generate(channel, PROMPT, 8) == before
    finally:
        server.stop()


def _fetch_status(channel: grpc.Channel) -> router_pb2.StatusResponse:
    return router_pb2_grpc.RouterServiceStub(channel).Status(router_pb2.StatusRequest(), timeout=CALL_TIMEOUT_S)
