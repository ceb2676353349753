"""The controller: observes what the actors publish, plans, acts. The only place with a clock.

ControllerLoop has every effect handed in, so tests run it on fakes. Controller is the Ray actor around it: restarted by
Ray, it reads spec and table back from the record store and goes on. Tokens never wait for it: routers keep working
with the table they have while it is away.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from cluster.errors import BadRecord, StoreUnavailable
from cluster.planner import (
    CreateReplica,
    CreateRouter,
    Health,
    Memory,
    Observation,
    Plan,
    PushTable,
    RouterReport,
    compute_plan,
)
from cluster.record_store import RayRecordStore, RecordStore
from cluster.records import (
    CONTROLLER_KEY,
    REPLICA_PREFIX,
    ROUTER_PREFIX,
    TABLE_KEY,
    ActorRecord,
    ControllerRecord,
    ReplicaRecord,
    RouterRecord,
)
from cluster.router_figures import read_figures
from cluster.spec import ClusterSpec, spec_from_json
from cluster.status_view import build_status
from cluster.stored_table import memory_from_json, memory_to_json
from router.expert_table import ExpertTable

logger = logging.getLogger(__name__)

# One look costs two calls of about a millisecond, and the table follows a restart within one interval.
LOOP_INTERVAL_S = 0.1
# Which actors exist is asked less often: only an actor that failed in its constructor needs it.
LIST_INTERVAL_S = 1.0
RAY_CALL_TIMEOUT_S = 10.0

T = TypeVar("T")
RecordT = TypeVar("RecordT", bound=ActorRecord)


class Factory(Protocol):
    """Synchronous calls into Ray; they may block."""

    def create_replica(self, replica_id: str) -> Any: ...

    def create_router(self, router_id: str) -> Any: ...

    def list_existing(self) -> frozenset[str]: ...


class Prober(Protocol):
    """See cluster.probes.Probes."""

    @property
    def replica_health(self) -> Mapping[tuple[str, int], Health]: ...

    @property
    def router_reports(self) -> Mapping[tuple[str, int], RouterReport]: ...

    def router_details(self) -> Mapping[tuple[str, int], Any]: ...

    def set_targets(self, replicas: Mapping[tuple[str, int], str], routers: Mapping[tuple[str, int], str]) -> None: ...

    def push_table(self, target: tuple[str, int], table: ExpertTable) -> None: ...

    async def drain_routers(self, timeout_s: float) -> int: ...


class ControllerLoop:
    """Owns the memory between plans. Every method runs on one event loop."""

    def __init__(
        self, spec: ClusterSpec, store: RecordStore, factory: Factory, prober: Prober, clock: Callable[[], float]
    ) -> None:
        """clock: seconds, monotonic."""
        self._spec = spec
        self._store = store
        self._factory = factory
        self._prober = prober
        self._clock = clock
        self._store_calls = _CallThread("record store")
        self._ray_calls = _CallThread("ray")
        self._memory: Memory | None = None
        self._observation = Observation(
            now_s=clock(),
            replicas={},
            routers={},
            replica_health={},
            router_reports={},
            existing_ids=None,
            draining=False,
        )
        self._plan: Plan | None = None
        self._stored: Memory | None = None
        self._listed_s: float | None = None

    async def run(self) -> None:
        """For ever. A turn that fails is logged and the next one starts afresh."""
        while True:
            try:
                await self.step()
            except StoreUnavailable as error:
                logger.warning("a turn of the controller failed: %s", error)
            except Exception:
                logger.exception("a turn of the controller failed")
            await asyncio.sleep(LOOP_INTERVAL_S)

    async def step(self) -> Plan:
        """One turn: observe, plan, act."""
        if self._memory is None:
            self._memory = await self._load_memory()
        await self._observe()
        plan = compute_plan(self._spec, self._observation, self._memory)
        await self._persist(plan.memory)
        self._log_changes(plan)
        self._memory = plan.memory
        self._plan = plan
        await self._act(plan)
        return plan

    def get_status(self) -> dict[str, Any]:
        plan = self._plan or compute_plan(self._spec, self._observation, self._memory or Memory())
        details = {
            router_id: {
                "num_running": status.num_running,
                "num_waiting": status.num_waiting,
                "num_steps": status.num_steps,
                "current_step_ms": status.current_step_ms,
                "table_version": status.table_version,
                "connected_replicas": list(status.connected_replica_ids),
                "figures": read_figures(status),
            }
            for (router_id, _), status in self._prober.router_details().items()
        }
        return build_status(self._spec, self._observation, plan, details)

    async def drain(self, timeout_s: float) -> int:
        """Stop creating actors and drain the routers. Returns the sequences still running after timeout_s."""
        logger.info("draining timeout_s=%g", timeout_s)
        self._observation = replace(self._observation, draining=True)
        return await self._prober.drain_routers(timeout_s)

    async def _persist(self, memory: Memory) -> None:
        """Keep table and digests for a successor, before they are pushed.

        With the store down they are pushed all the same: routers must hear of a dead replica, and a successor outbids
        whatever version they hold.
        """
        if self._stored is not None and (memory.table, memory.digests) == (self._stored.table, self._stored.digests):
            return
        if self._memory is None or memory.table is not self._memory.table:
            logger.info("table version=%d %s", memory.table.version, _describe_table(memory.table))
        try:
            await self._store_calls.call(lambda: self._store.put(TABLE_KEY, memory_to_json(memory)))
        except StoreUnavailable:
            # The look at the records has said so; the next turn tries again.
            return
        self._stored = memory

    async def _load_memory(self) -> Memory:
        data = await self._store_calls.call(lambda: self._store.get(TABLE_KEY))
        if data is None:
            return Memory()
        try:
            memory = memory_from_json(data)
        except BadRecord as error:
            logger.warning("starting with an empty expert table: %s", error)
            return Memory()
        logger.info("table version=%d taken over", memory.table.version)
        return memory

    async def _observe(self) -> None:
        """Read the records, point the probes at them. What cannot be read stays as it was seen last."""
        now_s = self._clock()
        observation = replace(self._observation, now_s=now_s)
        try:
            replicas = await self._store_calls.call(lambda: self._store.get_all(REPLICA_PREFIX))
            routers = await self._store_calls.call(lambda: self._store.get_all(ROUTER_PREFIX))
            observation = replace(
                observation, replicas=_parse(replicas, ReplicaRecord), routers=_parse(routers, RouterRecord)
            )
            if self._listed_s is None or now_s - self._listed_s >= LIST_INTERVAL_S:
                self._listed_s = now_s
                existing = await self._ray_calls.call(self._factory.list_existing)
                observation = replace(observation, existing_ids=existing)
        except StoreUnavailable as error:
            if observation.existing_ids is not None:
                logger.warning("observing paused: %s", error)
            observation = replace(observation, existing_ids=None)
        self._prober.set_targets(_get_endpoints(observation.replicas), _get_endpoints(observation.routers))
        self._observation = replace(
            observation,
            replica_health=self._prober.replica_health,
            router_reports=self._prober.router_reports,
            draining=self._observation.draining,
        )

    async def _act(self, plan: Plan) -> None:
        for action in plan.actions:
            match action:
                case PushTable(router_id, incarnation):
                    self._prober.push_table((router_id, incarnation), plan.table)
                case CreateReplica(replica_id):
                    logger.info("creating replica_id=%s: Ray does not know it", replica_id)
                    await self._ray_calls.call(lambda replica_id=replica_id: self._factory.create_replica(replica_id))
                case CreateRouter(router_id):
                    logger.info("creating router_id=%s: Ray does not know it", router_id)
                    await self._ray_calls.call(lambda router_id=router_id: self._factory.create_router(router_id))

    def _log_changes(self, plan: Plan) -> None:
        for kind, now, before in (
            ("router", plan.routers, self._plan.routers if self._plan else {}),
            ("replica", plan.replicas, self._plan.replicas if self._plan else {}),
        ):
            for actor_id, status in now.items():
                if actor_id not in before or before[actor_id].state is not status.state:
                    logger.info(
                        "%s_id=%s state=%s reason=%s", kind, actor_id, status.state.value, status.message or "-"
                    )


class Controller:
    """The Ray actor. Threaded: the loop and the admin server run in a thread of their own."""

    def __init__(self, spec_json: bytes, admin_host: str, admin_port: int, token_hash: str) -> None:
        logging.basicConfig(
            level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s"
        )
        self._spec = spec_from_json(spec_json)
        self._address = (admin_host, admin_port)
        self._token_hash = token_hash
        threading.Thread(target=self._run, name="controller", daemon=True).start()

    def ping(self) -> int:
        """The process id: answers when the constructor has ended."""
        return os.getpid()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException:
            logger.exception("the controller's loop ended; Ray restarts it")
            os._exit(1)

    async def _serve(self) -> None:
        import uvicorn

        from cluster.actor_factory import ActorFactory
        from cluster.admin_app import create_admin_app
        from cluster.probes import Probes

        store = RayRecordStore()
        loop = ControllerLoop(self._spec, store, ActorFactory(self._spec), Probes(), time.monotonic)
        host, port = self._address
        app = create_admin_app(loop, self._token_hash)
        server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="warning", access_log=False))
        record = ControllerRecord(pid=os.getpid(), node=os.uname().nodename, admin_url=f"http://{host}:{port}")
        await asyncio.to_thread(store.put, CONTROLLER_KEY, record.to_json())
        done, _ = await asyncio.wait(
            [asyncio.create_task(loop.run()), asyncio.create_task(server.serve())], return_when=asyncio.FIRST_COMPLETED
        )
        for task in done:
            task.result()
        raise RuntimeError("the admin server ended")


class _CallThread:
    """Runs blocking calls one at a time, each with a deadline; while one hangs, further ones fail at once."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._pending: asyncio.Future[Any] | None = None

    async def call(self, function: Callable[[], T]) -> T:
        """Raises StoreUnavailable when there is no answer in time, or what function raises."""
        if self._pending is not None and not self._pending.done():
            raise StoreUnavailable(f"{self._name} still hangs in an earlier call")
        future = asyncio.get_running_loop().run_in_executor(self._executor, function)
        self._pending = future
        done, _ = await asyncio.wait([future], timeout=RAY_CALL_TIMEOUT_S)
        if not done:
            future.add_done_callback(_discard_outcome)
            raise StoreUnavailable(f"{self._name} did not answer within {RAY_CALL_TIMEOUT_S:.0f} s")
        return future.result()


def _discard_outcome(future: asyncio.Future[Any]) -> None:
    """A late error has been told as a timeout already."""
    if not future.cancelled():
        future.exception()


def _parse(values: Mapping[bytes, bytes], record_type: type[RecordT]) -> dict[str, RecordT]:
    records: dict[str, RecordT] = {}
    for key, data in values.items():
        try:
            record = record_type.from_json(data)
        except BadRecord as error:
            logger.warning("ignoring the record %s: %s", key.decode(errors="replace"), error)
            continue
        records[record.actor_id] = record
    return records


def _get_endpoints(records: Mapping[str, ActorRecord]) -> dict[tuple[str, int], str]:
    """Every start that listens, by (actor id, incarnation)."""
    return {
        (record.actor_id, record.incarnation): record.endpoint
        for record in records.values()
        if record.endpoint is not None
    }


def _describe_table(table: ExpertTable) -> str:
    return " ".join(
        f"{group.name}={','.join(replica.replica_id for replica in group.replicas) or 'none'}" for group in table.groups
    )
