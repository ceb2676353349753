"""The service over loopback gRPC, with an honest client and with others."""

from __future__ import annotations

import queue
import select
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from experts import wire
from experts.checkpoint import Checkpoint
from experts.expert_range import split_experts
from experts.group import ExpertGroup
from experts.http2_stream import MessageStream, StreamEnded, make_client_opening
from experts.server import ExpertServer, ReplicaIdentity
from experts.v1 import experts_pb2, experts_pb2_grpc
from experts.weights import load_expert_weights
from experts.wire import ComputeFrame, ComputeReply, ComputeStatus

TIMEOUT_S = 20.0
IDENTITY = ReplicaIdentity("g0", "g0-1", incarnation=77)
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", wire.MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", wire.MAX_MESSAGE_BYTES),
)


class GatedGroup(ExpertGroup):
    """An expert group that computes only when told to, or fails as told."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        self.failure: Exception | None = None

    @property
    def frame_function(self) -> None:
        return None

    def compute(self, frame: ComputeFrame) -> torch.Tensor:
        self.entered.release()
        assert self.gate.wait(TIMEOUT_S)
        if self.failure is not None:
            raise self.failure
        return super().compute(frame)


class Client:
    """One raw Compute stream and its channel."""

    def __init__(self, endpoint: str) -> None:
        self.channel = grpc.insecure_channel(endpoint, options=CHANNEL_OPTIONS)
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        compute: Any = self.channel.stream_stream(f"/{wire.SERVICE_NAME}/Compute")
        self.call = compute(iter(self._requests.get, None), timeout=3 * TIMEOUT_S)

    def send(self, data: bytes) -> None:
        self._requests.put(data)

    def receive(self) -> ComputeReply:
        return wire.decode_response(next(self.call))

    def ask(self, **overrides: Any) -> ComputeReply:
        self.send(make_request(**overrides))
        return self.receive()

    def close(self) -> None:
        self._requests.put(None)
        self.call.cancel()
        self.channel.close()


class RouterClient:
    """A stream as routers open it, blocking."""

    def __init__(self, endpoint: str) -> None:
        host, _, port = endpoint.rpartition(":")
        connection = socket.create_connection((host, int(port)), timeout=TIMEOUT_S)
        connection.setblocking(False)
        self._stream = MessageStream(connection, make_client_opening(wire.COMPUTE_METHOD), wire.MAX_MESSAGE_BYTES)
        self._stream.flush()
        self._received: list[wire.Buffer] = []

    def send(self, data: bytes) -> None:
        self._stream.send(0, [data], len(data))
        while self._stream.wants_write:
            assert select.select([], [self._stream], [], TIMEOUT_S)[1]
            self._stream.flush()

    def receive(self) -> ComputeReply:
        while not self._received:
            writing = [self._stream] if self._stream.wants_write else []
            readable, writable, _ = select.select([self._stream], writing, [], TIMEOUT_S)
            assert readable or writable
            if writable:
                self._stream.flush()
            if readable:
                try:
                    self._stream.receive(self._received)
                except StreamEnded:
                    if not self._received:
                        raise
        return wire.decode_response(self._received.pop(0))

    def ask(self, **overrides: Any) -> ComputeReply:
        self.send(make_request(**overrides))
        return self.receive()

    def close(self) -> None:
        self._stream.close()


def make_request(**overrides: Any) -> bytes:
    request: dict[str, Any] = {
        "frame_id": 1,
        "incarnation": 77,
        "table_version": 1,
        "layer_id": 1,
        "hidden_states": torch.ones(2, 192, dtype=torch.bfloat16),
        "pair_rows": torch.tensor([0, 0, 1], dtype=torch.int32),
        "pair_experts": torch.tensor([0, 3, 1], dtype=torch.int32),
        "pair_weights": torch.ones(3),
        "exact": False,
        "deadline_ms": 10_000,
        **overrides,
    }
    return wire.encode_request(**request)


@pytest.fixture(scope="module")
def make_group(fp8_checkpoint: Checkpoint) -> Callable[[], GatedGroup]:
    weights = load_expert_weights(fp8_checkpoint, split_experts(fp8_checkpoint.config, 2)[0], torch.float32)
    return lambda: GatedGroup(weights)


@pytest.fixture
def group(make_group: Callable[[], GatedGroup]) -> GatedGroup:
    return make_group()


@pytest.fixture
def server(group: GatedGroup) -> Iterator[ExpertServer]:
    server = ExpertServer(group, IDENTITY, max_streams=3)
    server.start()
    yield server
    group.gate.set()
    server.stop(grace_s=0.1)


@pytest.fixture(params=[Client, RouterClient])
def connect(server: ExpertServer, request: pytest.FixtureRequest) -> Iterator[Callable[[], Client]]:
    """Any gRPC client, and a router."""
    clients: list[Client] = []

    def make() -> Client:
        clients.append(request.param(server.endpoint))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def client(connect: Callable[[], Client]) -> Client:
    return connect()


@pytest.fixture
def channel(server: ExpertServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.endpoint, options=CHANNEL_OPTIONS) as channel:
        yield channel


def test_answers_what_the_group_computes(client: Client, group: GatedGroup) -> None:
    reply = client.ask(frame_id=41)
    assert (reply.frame_id, reply.incarnation, reply.status) == (41, 77, ComputeStatus.OK)
    assert reply.tensor is not None
    assert torch.equal(reply.tensor, group.compute(wire.decode_request(make_request())))


def test_answers_a_stream_in_its_order(client: Client) -> None:
    for frame_id in range(20):
        client.send(make_request(frame_id=frame_id))
    assert [client.receive().frame_id for _ in range(20)] == list(range(20))


def test_several_streams_are_served_at_the_same_time(connect: Callable[[], Client]) -> None:
    clients = [connect() for _ in range(3)]
    for number, client in enumerate(clients):
        client.send(make_request(frame_id=number))
    assert [client.receive().frame_id for client in clients] == [0, 1, 2]


def test_a_generated_stub_can_talk_to_it(channel: grpc.Channel) -> None:
    stub = experts_pb2_grpc.ExpertServiceStub(channel)
    request = experts_pb2.ComputeRequest.FromString(make_request(frame_id=5, exact=True))
    (reply,) = stub.Compute(iter([request]), timeout=TIMEOUT_S)
    assert (reply.header.frame_id, reply.header.num_rows, reply.header.hidden_size) == (5, 3, 192)


def test_describes_itself(channel: grpc.Channel, group: GatedGroup) -> None:
    stub = experts_pb2_grpc.ExpertServiceStub(channel)
    described = stub.Describe(experts_pb2.DescribeRequest(), timeout=TIMEOUT_S)
    assert (described.group_name, described.replica_id, described.incarnation) == ("g0", "g0-1", 77)
    assert described.weight_digest == group.weight_digest and len(described.weight_digest) == 64
    assert described.numerics_id == group.numerics_id
    assert wire.expert_ranges_from_proto(described.hosted) == tuple(group.hosted)
    assert described.hidden_size == 192 and described.max_rows > 1000 and described.pid > 0


def test_tells_how_busy_it_is_and_which_experts_were_asked_for(client: Client, channel: grpc.Channel) -> None:
    stub = experts_pb2_grpc.ExpertServiceStub(channel)
    before = stub.Load(experts_pb2.LoadRequest(with_pairs=True), timeout=TIMEOUT_S)
    assert (before.num_frames, len(before.layers)) == (0, 0)
    client.ask()
    load = stub.Load(experts_pb2.LoadRequest(with_pairs=True), timeout=TIMEOUT_S)
    assert (load.num_frames, load.num_pairs) == (1, 3)
    assert [(layer.layer_id, list(layer.pairs)) for layer in load.layers] == [(1, [1, 1, 0, 1, 0, 0, 0, 0])]
    assert 0 < load.busy_share <= 1
    assert not stub.Load(experts_pb2.LoadRequest(), timeout=TIMEOUT_S).layers


@pytest.mark.parametrize(
    ("overrides", "status"),
    [
        ({"incarnation": 76}, ComputeStatus.STALE_INCARNATION),
        ({"layer_id": 0}, ComputeStatus.NOT_HOSTED),
        ({"pair_experts": torch.tensor([0, 7, 1], dtype=torch.int32)}, ComputeStatus.NOT_HOSTED),
        ({"hidden_states": torch.ones(2, 64)}, ComputeStatus.BAD_REQUEST),
        ({"pair_rows": torch.tensor([0, 0, 2], dtype=torch.int32)}, ComputeStatus.BAD_REQUEST),
        ({"pair_weights": torch.tensor([1.0, float("nan"), 1.0])}, ComputeStatus.BAD_REQUEST),
        ({"deadline_ms": 0}, ComputeStatus.OVERLOADED),
    ],
)
def test_refuses_a_frame_and_goes_on_with_the_stream(
    client: Client, overrides: dict[str, Any], status: ComputeStatus
) -> None:
    reply = client.ask(frame_id=8, **overrides)
    assert (reply.frame_id, reply.status) == (8, status)
    assert reply.message and "\n" not in reply.message
    assert client.ask().status is ComputeStatus.OK


@pytest.mark.parametrize("data", [b"\xff" * 64, b"\x0a\x7f\x00"])
def test_bytes_without_a_frame_number_end_the_stream_and_only_it(connect: Callable[[], Client], data: bytes) -> None:
    client = connect()
    client.send(data)
    with pytest.raises((grpc.RpcError, StreamEnded)) as caught:
        client.receive()
    assert not isinstance(caught.value, grpc.Call) or caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert connect().ask().status is ComputeStatus.OK


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (MemoryError(), ComputeStatus.OVERLOADED),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), ComputeStatus.OVERLOADED),
        (RuntimeError("something else\nsecond line"), ComputeStatus.INTERNAL),
    ],
)
def test_a_call_that_fails_is_answered_and_the_process_stays_up(
    client: Client, group: GatedGroup, failure: Exception, status: ComputeStatus
) -> None:
    group.failure = failure
    reply = client.ask()
    assert reply.status is status and "\n" not in reply.message
    group.failure = None
    assert client.ask().status is ComputeStatus.OK


@pytest.mark.parametrize("connect", [Client], indirect=True)
def test_a_frame_whose_deadline_passes_in_the_queue_is_shed(connect: Callable[[], Client], group: GatedGroup) -> None:
    """Of any client; a router gives its late frames up by itself."""
    first, second = connect(), connect()
    group.gate.clear()
    first.send(make_request(frame_id=1))
    assert group.entered.acquire(timeout=TIMEOUT_S)
    reply = second.ask(frame_id=2, deadline_ms=50)
    assert (reply.frame_id, reply.status) == (2, ComputeStatus.OVERLOADED)
    group.gate.set()
    assert first.receive().status is ComputeStatus.OK


def test_frames_of_several_streams_that_wait_together_are_computed_together(
    connect: Callable[[], Client], group: GatedGroup
) -> None:
    clients = [connect() for _ in range(3)]
    rows = torch.randn(3, 192, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    one_pair = {"pair_rows": torch.zeros(1, dtype=torch.int32), "pair_weights": torch.ones(1)}

    def request(number: int) -> bytes:
        expert = torch.tensor([number], dtype=torch.int32)
        return make_request(frame_id=number, hidden_states=rows[number : number + 1], pair_experts=expert, **one_pair)

    expected = [group.compute(wire.decode_request(request(number))) for number in range(3)]
    while group.entered.acquire(blocking=False):
        pass
    group.gate.clear()
    for number, client in enumerate(clients):
        client.send(request(number))
    assert group.entered.acquire(timeout=TIMEOUT_S)
    group.gate.set()
    replies = [client.receive() for client in clients]
    for number, reply in enumerate(replies):
        assert (reply.frame_id, reply.status) == (number, ComputeStatus.OK) and reply.tensor is not None
        torch.testing.assert_close(reply.tensor, expected[number])


def test_a_client_that_goes_away_leaves_no_stream_behind(
    connect: Callable[[], Client], server: ExpertServer, group: GatedGroup
) -> None:
    client = connect()
    assert client.ask().status is ComputeStatus.OK
    assert server.num_streams == 1
    client.close()
    server.drain(grace_s=TIMEOUT_S)
    assert server.num_streams == 0


def test_more_streams_than_allowed_are_refused(connect: Callable[[], Client]) -> None:
    clients = [connect() for _ in range(3)]
    assert all(client.ask().status is ComputeStatus.OK for client in clients)
    with pytest.raises((grpc.RpcError, StreamEnded, OSError)) as caught:
        connect().ask()
    if isinstance(caught.value, grpc.Call):
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert clients[0].ask().status is ComputeStatus.OK


def test_health_follows_the_drain_and_frames_are_turned_away_after_it(
    client: Client, channel: grpc.Channel, server: ExpertServer
) -> None:
    health: Any = health_pb2_grpc.HealthStub(channel)

    def get_health(service: str) -> int:
        return health.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S).status

    assert client.ask().status is ComputeStatus.OK
    assert {get_health(name) for name in ("", wire.SERVICE_NAME)} == {health_pb2.HealthCheckResponse.SERVING}
    drained = threading.Thread(target=server.drain, args=(TIMEOUT_S,))
    drained.start()
    watch = health.Watch(health_pb2.HealthCheckRequest(service=""), timeout=TIMEOUT_S)
    assert any(update.status == health_pb2.HealthCheckResponse.NOT_SERVING for update in watch)
    watch.cancel()
    # The stream is open, so the drain waits, and what still comes is computed.
    assert client.ask().status is ComputeStatus.OK
    client.close()
    drained.join(TIMEOUT_S)
    assert not drained.is_alive()


def test_a_stream_that_stays_open_after_the_drain_hears_draining(client: Client, server: ExpertServer) -> None:
    assert client.ask().status is ComputeStatus.OK
    server.drain(grace_s=0.0)
    assert client.ask(frame_id=3).status is ComputeStatus.DRAINING


def test_stop_lets_the_frame_being_computed_finish(
    connect: Callable[[], Client], server: ExpertServer, group: GatedGroup
) -> None:
    client = connect()
    group.gate.clear()
    client.send(make_request(frame_id=6))
    assert group.entered.acquire(timeout=TIMEOUT_S)
    stopped = threading.Thread(target=server.stop, kwargs={"grace_s": TIMEOUT_S})
    stopped.start()
    group.gate.set()
    assert client.receive().frame_id == 6
    client.close()
    stopped.join(TIMEOUT_S)
    assert not stopped.is_alive()


def test_frames_of_one_router_that_wait_together_are_computed_together(
    server: ExpertServer, group: GatedGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two micro-batches of a router, or its frame for another group's rows."""
    client = RouterClient(server.endpoint)
    expected = client.ask().tensor
    rows: list[int] = []
    compute = type(group).compute

    def count(self: GatedGroup, frame: ComputeFrame) -> torch.Tensor:
        rows.append(frame.hidden_states.shape[0])
        return compute(self, frame)

    monkeypatch.setattr(type(group), "compute", count)
    group.gate.clear()
    while group.entered.acquire(blocking=False):
        pass
    client.send(make_request(frame_id=2))
    assert group.entered.acquire(timeout=TIMEOUT_S)
    client.send(make_request(frame_id=3))
    client.send(make_request(frame_id=4))
    group.gate.set()
    for frame_id in (2, 3, 4):
        reply = client.receive()
        assert reply.frame_id == frame_id and reply.tensor is not None and expected is not None
        torch.testing.assert_close(reply.tensor, expected)
    assert rows == [2, 4]
    client.close()


def test_others_are_answered_while_a_routers_frame_is_computed(
    server: ExpertServer, group: GatedGroup, channel: grpc.Channel
) -> None:
    client = RouterClient(server.endpoint)
    group.gate.clear()
    client.send(make_request())
    assert group.entered.acquire(timeout=TIMEOUT_S)
    health: Any = health_pb2_grpc.HealthStub(channel)
    assert health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S).status
    group.gate.set()
    assert client.receive().status is ComputeStatus.OK
    client.close()


@pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.1\r\n\r\n", make_client_opening("/other/Method"), b"PRI * HT"])
def test_a_connection_that_is_no_grpc_harms_nobody(server: ExpertServer, data: bytes) -> None:
    host, _, port = server.endpoint.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as connection:
        connection.sendall(data)
        client = RouterClient(server.endpoint)
        assert client.ask().status is ComputeStatus.OK
        client.close()


def test_a_taken_port_is_an_error(server: ExpertServer, make_group: Callable[[], GatedGroup]) -> None:
    port = int(server.endpoint.rpartition(":")[2])
    with pytest.raises((RuntimeError, OSError)):
        ExpertServer(make_group(), IDENTITY, port=port).start()
