"""Asks expert replicas and routers how they are, each in a task of its own, with a deadline on every call.

The controller names the targets after each look at the records and reads the answers; a probe belongs to one
incarnation and ends with it. A refused connection means that the process is gone, so two in a row suffice; silence may
be a busy machine and needs longer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.autoscaler import ReplicaLoad
from cluster.planner import Health, RouterReport
from experts.channels import LastingChannel
from experts.tls import ClusterTls
from experts.v1 import experts_pb2, experts_pb2_grpc
from router.expert_table import ExpertTable, table_to_proto
from router.v1 import router_pb2, router_pb2_grpc

logger = logging.getLogger(__name__)

EXPERT_SERVICE = "experts.v1.ExpertService"

CHECK_TIMEOUT_S = 1.0
STATUS_TIMEOUT_S = 2.0
PUSH_TIMEOUT_S = 5.0
INTERVAL_S = 1.0
# While something is wrong or starting.
SHORT_INTERVAL_S = 0.1
MAX_REFUSED = 2
MAX_SILENT_REPLICA = 3
# A long step may keep a router's event loop busy: only its state for people depends on this.
MAX_SILENT_ROUTER = 15

_CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # Fresh connections after a restart: the default backs off to 2 minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_retries", 0),
)

Target = tuple[str, int]


class Probes:
    """Owns the channels to replicas and routers. Lives on one event loop; close() ends every task."""

    def __init__(self, tls: ClusterTls | None = None) -> None:
        """tls: None: unencrypted."""
        self._tls = tls
        self._replicas: dict[Target, _ReplicaProbe] = {}
        self._routers: dict[Target, _RouterProbe] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def set_targets(self, replicas: Mapping[Target, str], routers: Mapping[Target, str]) -> None:
        """Probe exactly these, given as (actor id, incarnation) -> endpoint."""
        for target in self._replicas.keys() - replicas.keys():
            self._close_later(self._replicas.pop(target))
        for target in self._routers.keys() - routers.keys():
            self._close_later(self._routers.pop(target))
        for target in replicas.keys() - self._replicas.keys():
            self._replicas[target] = _ReplicaProbe(target, replicas[target], self._tls)
        for target in routers.keys() - self._routers.keys():
            self._routers[target] = _RouterProbe(target, routers[target], self._tls)

    @property
    def replica_health(self) -> dict[Target, Health]:
        return {target: probe.health for target, probe in self._replicas.items() if probe.health is not None}

    @property
    def replica_loads(self) -> dict[Target, ReplicaLoad]:
        """What replicas that answer said last of their load."""
        return {target: probe.load for target, probe in self._replicas.items() if probe.load is not None}

    async def fetch_pairs(self) -> list[experts_pb2.LoadResponse]:
        """Ask every replica which experts it was asked for. Those that do not answer are left out."""
        answers = await asyncio.gather(*(probe.fetch_pairs() for probe in self._replicas.values()))
        return [answer for answer in answers if answer is not None]

    @property
    def router_reports(self) -> dict[Target, RouterReport]:
        return {target: probe.report for target, probe in self._routers.items() if probe.report is not None}

    def router_details(self) -> dict[Target, router_pb2.StatusResponse]:
        """The last Status of each router that ever answered, for people."""
        return {target: probe.status for target, probe in self._routers.items() if probe.status is not None}

    def push_table(self, target: Target, table: ExpertTable) -> None:
        """Send a table to a router unless one is on its way; the result shows in its report."""
        probe = self._routers.get(target)
        if probe is not None:
            probe.push(table)

    async def drain_routers(self, timeout_s: float) -> int:
        """Drain every router at once. Returns how many sequences still run; one that is gone has none."""
        counts = await asyncio.gather(*(probe.drain(timeout_s) for probe in self._routers.values()))
        return sum(counts)

    async def drain_router(self, target: Target, timeout_s: float) -> int:
        """Drain one. Returns how many sequences it still runs; one that is gone has none."""
        probe = self._routers.get(target)
        return 0 if probe is None else await probe.drain(timeout_s)

    async def close(self) -> None:
        probes: list[_Probe] = [*self._replicas.values(), *self._routers.values()]
        self._replicas.clear()
        self._routers.clear()
        await asyncio.gather(*(probe.close() for probe in probes), *self._closing)

    def _close_later(self, probe: _Probe) -> None:
        task = asyncio.get_running_loop().create_task(probe.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


class _Probe(ABC):
    """One endpoint: a channel, and a task that runs _check for ever."""

    def __init__(self, target: Target) -> None:
        self.target = target
        # Set: do not wait until the next check.
        self._wake = asyncio.Event()
        self._tasks = {asyncio.get_running_loop().create_task(self._run(), name=f"probe {target[0]}")}

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                interval_s = await self._check()
            except Exception:
                logger.exception("probe failed actor_id=%s", self.target[0])
                interval_s = INTERVAL_S
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), interval_s)

    @abstractmethod
    async def _check(self) -> float:
        """Ask once; returns the seconds until the next time."""

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._close_channel()

    @abstractmethod
    async def _close_channel(self) -> None: ...


class _ReplicaStubs:
    """Typed loosely: grpc_health ships no types for its stub."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.health: Any = health_pb2_grpc.HealthStub(channel)
        self.experts = experts_pb2_grpc.ExpertServiceStub(channel)


class _ReplicaProbe(_Probe):
    def __init__(self, target: Target, endpoint: str, tls: ClusterTls | None) -> None:
        super().__init__(target)
        self._channel = LastingChannel(endpoint, tls, _CHANNEL_OPTIONS, _ReplicaStubs)
        self.health: Health | None = None
        self.load: ReplicaLoad | None = None
        self._num_refused = 0
        self._num_silent = 0

    async def _close_channel(self) -> None:
        await self._channel.close()

    async def _check(self) -> float:
        request = health_pb2.HealthCheckRequest(service=EXPERT_SERVICE)
        try:
            response = await self._channel.stub.health.Check(request, timeout=CHECK_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                self._num_silent += 1
            else:
                self._num_refused += 1
            if self._num_refused >= MAX_REFUSED or self._num_silent >= MAX_SILENT_REPLICA:
                if self.health is not Health.GONE:
                    logger.warning("replica gone replica_id=%s reason=%s", self.target[0], error.code().name)
                self.health = Health.GONE
                self.load = None
            return SHORT_INTERVAL_S
        self._num_refused = self._num_silent = 0
        await self._fetch_load()
        serving = response.status == health_pb2.HealthCheckResponse.SERVING
        self.health = Health.SERVING if serving else Health.NOT_SERVING
        return INTERVAL_S

    async def fetch_pairs(self) -> experts_pb2.LoadResponse | None:
        try:
            return await self._channel.stub.experts.Load(
                experts_pb2.LoadRequest(with_pairs=True), timeout=CHECK_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            logger.info("load unknown replica_id=%s reason=%s", self.target[0], error.code().name)
            return None

    async def _fetch_load(self) -> None:
        """Health decides alone whether a replica is used; without figures it is only not counted."""
        try:
            answer = await self._channel.stub.experts.Load(experts_pb2.LoadRequest(), timeout=CHECK_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            logger.debug("load unknown replica_id=%s reason=%s", self.target[0], error.code().name)
            self.load = None
            return
        busy_s = answer.busy_share * answer.window_s
        self.load = ReplicaLoad(
            busy_share=answer.busy_share,
            queue_ms=answer.queue_ms,
            pairs_per_busy_s=answer.num_pairs / busy_s if busy_s > 0 else None,
            pairs_per_s=answer.num_pairs / answer.window_s if answer.window_s > 0 else 0.0,
        )


class _RouterProbe(_Probe):
    def __init__(self, target: Target, endpoint: str, tls: ClusterTls | None) -> None:
        super().__init__(target)
        self._channel = LastingChannel(endpoint, tls, _CHANNEL_OPTIONS, router_pb2_grpc.RouterServiceStub)
        self.report: RouterReport | None = None
        self.status: router_pb2.StatusResponse | None = None
        self._num_refused = 0
        self._num_silent = 0
        self._push: asyncio.Task[None] | None = None
        # Replicas of the table it took last: until it is connected to them, it is asked often.
        self._wanted_ids: frozenset[str] = frozenset()

    async def _close_channel(self) -> None:
        await self._channel.close()

    async def _check(self) -> float:
        try:
            status = await self._channel.stub.Status(router_pb2.StatusRequest(), timeout=STATUS_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                self._num_silent += 1
            else:
                self._num_refused += 1
            if self._num_refused >= MAX_REFUSED or self._num_silent >= MAX_SILENT_ROUTER:
                held = self.report.table_version if self.report is not None else 0
                reason = f"does not answer: {error.code().name.lower()}"
                self.report = RouterReport(False, False, False, reason, held)
            return SHORT_INTERVAL_S
        self._num_refused = self._num_silent = 0
        self.status = status
        message = status.message
        if not status.ready and not status.draining and status.load_progress < 1:
            message = message or f"loading weights, {status.load_progress:.0%}"
        connected_ids = frozenset(status.connected_replica_ids)
        self.report = RouterReport(True, status.ready, status.draining, message, status.table_version, connected_ids)
        return INTERVAL_S if status.ready and self._wanted_ids <= connected_ids else SHORT_INTERVAL_S

    def push(self, table: ExpertTable) -> None:
        if self._push is None or self._push.done():
            self._push = asyncio.get_running_loop().create_task(self._send(table))
            self._tasks = {task for task in self._tasks if not task.done()} | {self._push}

    async def _send(self, table: ExpertTable) -> None:
        request = router_pb2.UpdateExpertTableRequest(table=table_to_proto(table))
        try:
            response = await self._channel.stub.UpdateExpertTable(request, timeout=PUSH_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            logger.warning(
                "push failed router_id=%s version=%d reason=%s: %s",
                self.target[0],
                table.version,
                error.code().name,
                error.details(),
            )
            # The controller asks for it again at its next turn; this keeps it from spinning.
            await asyncio.sleep(SHORT_INTERVAL_S)
            return
        logger.info("pushed router_id=%s version=%d", self.target[0], response.version)
        known = self.report or RouterReport(True, False, False, "connecting to expert groups", 0)
        self.report = replace(known, table_version=response.version)
        self._wanted_ids = frozenset(replica.replica_id for group in table.groups for replica in group.replicas)
        self._wake.set()

    async def drain(self, timeout_s: float) -> int:
        request = router_pb2.DrainRequest(timeout_ms=int(timeout_s * 1000))
        try:
            response = await self._channel.stub.Drain(request, timeout=timeout_s + STATUS_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            logger.warning("drain failed router_id=%s reason=%s", self.target[0], error.code().name)
            return self.status.num_running if self.status is not None and self.report_reachable else 0
        return response.num_running

    @property
    def report_reachable(self) -> bool:
        return self.report is not None and self.report.reachable
