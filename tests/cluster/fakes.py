"""Fakes with the interfaces of cluster's seams, and records to feed them."""

import copy
import itertools
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from cluster.autoscaler import ReplicaLoad
from cluster.errors import ChangeRefused, StoreUnavailable
from cluster.planner import Health, RouterReport
from cluster.records import ReplicaRecord, RouterRecord, StartState, replica_key, router_key
from cluster.spec import ClusterSpec, GroupSpec, RouterSpec
from experts.expert_range import ExpertRange
from experts.v1 import experts_pb2
from router.expert_table import ExpertTable
from router.v1 import router_pb2

HOSTED = ((ExpertRange(1, 4, 0, 4),), (ExpertRange(1, 4, 4, 8),))


def make_spec(num_replicas: int = 1, num_routers: int = 1) -> ClusterSpec:
    """Two groups."""
    return ClusterSpec(
        model_name="tiny",
        checkpoint="/nowhere",
        dtype="float32",
        groups=tuple(GroupSpec(f"g{index}", hosted, num_replicas) for index, hosted in enumerate(HOSTED)),
        expert_threads=1,
        router_ids=tuple(f"r{index}" for index in range(num_routers)),
        router=RouterSpec("bfloat16", "reduced", False, "auto", None, None, 30.0, 1),
        listen_on="loopback",
        own_ray=True,
    )


def make_replica(replica_id: str, incarnation: int = 1, **changes: Any) -> ReplicaRecord:
    """A record that says ready."""
    group_name = replica_id.split("-")[0]
    record = ReplicaRecord(
        actor_id=replica_id,
        state=StartState.READY,
        incarnation=incarnation,
        pid=1000 + incarnation,
        node="here",
        node_id="node a",
        endpoint=f"127.0.0.1:{4000 + incarnation}",
        message="",
        num_failed_starts=0,
        load_progress=1.0,
        started_at=100.0,
        ready_at=101.0,
        group_name=group_name,
        hosted=HOSTED[int(group_name[1:])],
        weight_digest=f"digest of {group_name}",
        numerics_id="cpu",
    )
    return replace(record, **changes)


def make_router(router_id: str = "r0", incarnation: int = 1, **changes: Any) -> RouterRecord:
    """A record that says ready."""
    record = RouterRecord(
        actor_id=router_id,
        state=StartState.READY,
        incarnation=incarnation,
        pid=2000 + incarnation,
        node="here",
        node_id="node a",
        endpoint=f"127.0.0.1:{5000 + incarnation}",
        message="",
        num_failed_starts=0,
        load_progress=1.0,
        started_at=100.0,
        ready_at=101.0,
    )
    return replace(record, **changes)


def make_report(table_version: int, connected_ids: Collection[str] = ("g0-0", "g1-0"), **changes: Any) -> RouterReport:
    """A router that is ready with this table."""
    return replace(RouterReport(True, True, False, "", table_version, frozenset(connected_ids)), **changes)


class MemoryStore:
    """A RecordStore in a dict; down makes every call fail, gets_left that get which comes after so many."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.down = False
        self.gets_left: int | None = None

    def get(self, key: bytes) -> bytes | None:
        self._check()
        if self.gets_left is not None:
            self.gets_left -= 1
            if self.gets_left < 0:
                self.gets_left = None
                raise StoreUnavailable("the store went away in the middle")
        return self.values.get(key)

    def get_all(self, prefix: bytes) -> Mapping[bytes, bytes]:
        self._check()
        return {key: value for key, value in self.values.items() if key.startswith(prefix)}

    def put(self, key: bytes, value: bytes) -> None:
        self._check()
        self.values[key] = value

    def delete(self, key: bytes) -> None:
        self._check()
        self.values.pop(key, None)

    def delete_all(self) -> None:
        self._check()
        self.values.clear()

    def publish(self, *records: ReplicaRecord | RouterRecord) -> None:
        for record in records:
            make_key = router_key if isinstance(record, RouterRecord) else replica_key
            self.values[make_key(record.actor_id)] = record.to_json()

    def _check(self) -> None:
        if self.down:
            raise StoreUnavailable("down")


class FakeFactory:
    """Remembers what it was asked for. A replica that is created publishes that it is ready, if there is a store."""

    def __init__(self, existing: set[str], store: MemoryStore | None = None) -> None:
        self.existing = existing
        self.created: list[str] = []
        self.drained: list[str] = []
        self.killed: list[str] = []
        self.hosted: list[tuple[str, tuple[ExpertRange, ...]]] = []
        self.refusal: str | None = None
        # Changes of the records that replicas of these weights publish.
        self.changes: dict[int, dict[str, Any]] = {}
        self.available_bytes = 10**12
        self._store = store
        self._incarnations = itertools.count(101)
        self._weights_version = 1

    def for_spec(self, spec: ClusterSpec) -> "FakeFactory":
        other = copy.copy(self)
        other._weights_version = spec.weights_version
        return other

    def create_replica(self, replica_id: str, node_id: str | None) -> None:
        self.created.append(replica_id)
        self.existing.add(replica_id)
        if self._store is not None:
            changes = {"weights_version": self._weights_version, **self.changes.get(self._weights_version, {})}
            self._store.publish(make_replica(replica_id, next(self._incarnations), **changes))

    def create_router(self, router_id: str) -> None:
        self.created.append(router_id)
        self.existing.add(router_id)
        if self._store is not None and self._weights_version > 1:
            self._store.publish(make_router(router_id, next(self._incarnations), weights_version=self._weights_version))

    def measure_available(self) -> dict[str, int]:
        return {"node a": self.available_bytes}

    def count_free_gpus(self) -> float:
        return 0.0

    def list_existing(self) -> frozenset[str]:
        return frozenset(self.existing)

    def list_nodes(self) -> frozenset[str]:
        return frozenset({"node a"})

    def drain_replica(self, replica_id: str, grace_s: float) -> None:
        self.drained.append(replica_id)

    def host_experts(self, replica_id: str, hosted: tuple[ExpertRange, ...], timeout_s: float) -> None:
        """Publishes at once that it does, unless refusal is set."""
        self.hosted.append((replica_id, hosted))
        if self.refusal is not None:
            raise ChangeRefused(self.refusal)
        assert self._store is not None
        record = ReplicaRecord.from_json(self._store.values[replica_key(replica_id)])
        self._store.publish(replace(record, hosted=hosted, weight_digest=f"digest of {hosted}"))

    def kill(self, name: str) -> None:
        self.killed.append(name)
        self.existing.discard(name)


class FakeProber:
    """Health and reports are set by the test; a router holds a pushed table, and is connected to all in it, at once."""

    def __init__(self) -> None:
        self.replica_health: dict[tuple[str, int], Health] = {}
        self.router_reports: dict[tuple[str, int], RouterReport] = {}
        self.targets: tuple[Mapping[tuple[str, int], str], Mapping[tuple[str, int], str]] = ({}, {})
        self.pushed: list[tuple[tuple[str, int], int]] = []
        self.drained_s: list[float] = []
        self.drained_routers: list[tuple[str, int]] = []
        self.loads: dict[str, ReplicaLoad] = {}
        self.pairs: list[experts_pb2.LoadResponse] = []
        self.details: dict[tuple[str, int], router_pb2.StatusResponse] = {}

    @property
    def replica_loads(self) -> dict[tuple[str, int], ReplicaLoad]:
        """Every target has what the test set for its group."""
        return {
            target: self.loads[group] for target in self.targets[0] if (group := target[0].split("-")[0]) in self.loads
        }

    async def fetch_pairs(self) -> list[experts_pb2.LoadResponse]:
        return self.pairs

    def router_details(self) -> dict[tuple[str, int], router_pb2.StatusResponse]:
        return self.details

    def set_targets(self, replicas: Mapping[tuple[str, int], str], routers: Mapping[tuple[str, int], str]) -> None:
        self.targets = (replicas, routers)

    def push_table(self, target: tuple[str, int], table: ExpertTable) -> None:
        self.pushed.append((target, table.version))
        connected_ids = [replica.replica_id for group in table.groups for replica in group.replicas]
        self.router_reports[target] = make_report(table.version, connected_ids)

    async def drain_routers(self, timeout_s: float) -> int:
        self.drained_s.append(timeout_s)
        return 0

    async def drain_router(self, target: tuple[str, int], timeout_s: float) -> int:
        self.drained_routers.append(target)
        return 0


class FakeClock:
    """Seconds, set by the test."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s
