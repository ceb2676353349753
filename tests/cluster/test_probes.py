"""Probes against real gRPC servers on loopback."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.autoscaler import ReplicaLoad
from cluster.planner import Health
from cluster.probes import EXPERT_SERVICE, Probes
from experts.v1 import experts_pb2, experts_pb2_grpc
from router.expert_table import ExpertTable
from router.v1 import router_pb2, router_pb2_grpc

REPLICA = ("g0-0", 1)
ROUTER = ("r0", 1)


class FakeRouter(router_pb2_grpc.RouterServiceServicer):
    def __init__(self) -> None:
        self.status = router_pb2.StatusResponse(router_id="r0", ready=False, load_progress=0.25)
        self.versions: list[int] = []

    async def Status(self, request: Any, context: Any) -> router_pb2.StatusResponse:
        return self.status

    async def UpdateExpertTable(self, request: Any, context: Any) -> router_pb2.UpdateExpertTableResponse:
        self.versions.append(request.table.version)
        return router_pb2.UpdateExpertTableResponse(version=request.table.version)

    async def Drain(self, request: Any, context: Any) -> router_pb2.DrainResponse:
        return router_pb2.DrainResponse(num_running=request.timeout_ms)


class FakeHealth(health_pb2_grpc.HealthServicer):
    def __init__(self) -> None:
        self.status: Any = health_pb2.HealthCheckResponse.SERVING

    async def Check(self, request: Any, context: Any) -> health_pb2.HealthCheckResponse:
        assert request.service == EXPERT_SERVICE
        return health_pb2.HealthCheckResponse(status=self.status)


class FakeExperts(experts_pb2_grpc.ExpertServiceServicer):
    async def Load(self, request: Any, context: Any) -> experts_pb2.LoadResponse:
        layers = [experts_pb2.LayerPairs(layer_id=1, pairs=[2, 0, 4])] if request.with_pairs else []
        return experts_pb2.LoadResponse(window_s=10, busy_share=0.5, queue_ms=2, num_pairs=60, layers=layers)


class Server:
    def __init__(self) -> None:
        self.router = FakeRouter()
        self.health = FakeHealth()
        self.grpc = grpc.aio.server()
        router_pb2_grpc.add_RouterServiceServicer_to_server(self.router, self.grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.grpc)
        experts_pb2_grpc.add_ExpertServiceServicer_to_server(FakeExperts(), self.grpc)
        self.endpoint = f"127.0.0.1:{self.grpc.add_insecure_port('127.0.0.1:0')}"


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    await server.grpc.start()
    yield server
    await server.grpc.stop(None)


@pytest.fixture
async def probes() -> AsyncIterator[Probes]:
    probes = Probes()
    yield probes
    await probes.close()


async def wait_for(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.02)


async def test_health_is_followed_until_the_process_is_gone(server: Server, probes: Probes):
    probes.set_targets({REPLICA: server.endpoint}, {})
    assert probes.replica_health == {}
    await wait_for(lambda: probes.replica_health.get(REPLICA) is Health.SERVING)
    server.health.status = health_pb2.HealthCheckResponse.NOT_SERVING
    await wait_for(lambda: probes.replica_health[REPLICA] is Health.NOT_SERVING)
    await server.grpc.stop(None)
    await wait_for(lambda: probes.replica_health[REPLICA] is Health.GONE)


async def test_load_is_asked_for_with_the_health_and_forgotten_when_the_process_is_gone(server: Server, probes: Probes):
    probes.set_targets({REPLICA: server.endpoint, ("gone", 1): "127.0.0.1:1"}, {})
    await wait_for(lambda: REPLICA in probes.replica_loads)
    load = ReplicaLoad(busy_share=0.5, queue_ms=2.0, pairs_per_busy_s=12.0, pairs_per_s=6.0)
    assert probes.replica_loads == {REPLICA: load}
    answers = await probes.fetch_pairs()
    assert [list(answer.layers[0].pairs) for answer in answers] == [[2, 0, 4]]
    await server.grpc.stop(None)
    await wait_for(lambda: probes.replica_loads == {})


async def test_an_address_where_nobody_listens_is_found_gone(probes: Probes):
    probes.set_targets({REPLICA: "127.0.0.1:1"}, {})
    await wait_for(lambda: probes.replica_health.get(REPLICA) is Health.GONE)


async def test_a_silent_peer_is_found_gone(probes: Probes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cluster.probes.CHECK_TIMEOUT_S", 0.1)
    held = asyncio.Event()

    async def hold(_: Any, writer: asyncio.StreamWriter) -> None:
        await held.wait()
        writer.close()

    silent = await asyncio.start_server(hold, "127.0.0.1", 0)
    try:
        probes.set_targets({REPLICA: f"127.0.0.1:{silent.sockets[0].getsockname()[1]}"}, {})
        await wait_for(lambda: probes.replica_health.get(REPLICA) is Health.GONE)
    finally:
        held.set()
        silent.close()


async def test_router_report_and_push(server: Server, probes: Probes):
    probes.set_targets({}, {ROUTER: server.endpoint})
    await wait_for(lambda: ROUTER in probes.router_reports)
    report = probes.router_reports[ROUTER]
    assert (report.reachable, report.ready, report.message) == (True, False, "loading weights, 25%")
    probes.push_table(ROUTER, ExpertTable(7, ()))
    await wait_for(lambda: server.router.versions == [7])
    server.router.status = router_pb2.StatusResponse(router_id="r0", ready=True, table_version=7, load_progress=1)
    await wait_for(lambda: probes.router_reports[ROUTER].ready)
    assert probes.router_reports[ROUTER].table_version == 7
    assert probes.router_details()[ROUTER].router_id == "r0"


async def test_only_one_push_is_on_its_way_to_a_router(server: Server, probes: Probes):
    probes.set_targets({}, {ROUTER: server.endpoint})
    for version in (1, 2, 3):
        probes.push_table(ROUTER, ExpertTable(version, ()))
    await wait_for(lambda: server.router.versions == [1])
    # A target that is not known is nobody's.
    probes.push_table(("r9", 1), ExpertTable(4, ()))


async def test_drain_adds_up_what_still_runs(server: Server, probes: Probes):
    probes.set_targets({}, {ROUTER: server.endpoint, ("r1", 1): server.endpoint, ("gone", 1): "127.0.0.1:1"})
    assert await probes.drain_routers(0.005) == 10


async def test_targets_that_are_no_longer_named_are_forgotten(server: Server, probes: Probes):
    probes.set_targets({REPLICA: server.endpoint}, {})
    await wait_for(lambda: REPLICA in probes.replica_health)
    probes.set_targets({("g0-0", 2): server.endpoint}, {})
    assert REPLICA not in probes.replica_health
    await wait_for(lambda: ("g0-0", 2) in probes.replica_health)
