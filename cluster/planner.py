"""Decides what to do: (spec, observation, memory) -> expert table, states, actions, memory. Pure.

The controller calls compute_plan in a loop and carries out the actions; it holds the only clock and hands its
reading in. Nothing here knows Ray, gRPC or time.

The rules, in one place:
- A replica is in the expert table when its record says ready, its weights are those of its group, and no health
  check has found it gone. A restarted replica has a new incarnation, so nothing known of the old one counts.
- The first weight digest seen in a group is the group's for the life of the cluster: weights are never mixed.
- The table's version rises only when its content changes, and above any version a router already holds.
- An actor that Ray no longer knows is created again, later and later if it keeps failing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from cluster.records import ReplicaRecord, RouterRecord, StartState, compute_start_delay_s
from cluster.spec import ClusterSpec, GroupSpec
from router.expert_table import EMPTY_TABLE, ExpertTable, GroupEntry, ReplicaEntry

# `shoal serve` creates all actors while the controller starts; what is missing this long is really missing.
MISSING_AFTER_S = 2.0


class ActorState(StrEnum):
    """As in `shoal status --json`."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class Health(StrEnum):
    """What health checks found of one incarnation."""

    SERVING = "serving"
    NOT_SERVING = "not_serving"
    # Several checks in a row failed: the connection was refused, or no answer came within the deadline.
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class RouterReport:
    """A router's own Status, or that it did not answer (reachable False, the rest as it was)."""

    reachable: bool
    ready: bool
    draining: bool
    message: str
    table_version: int


@dataclass(frozen=True, slots=True)
class Observation:
    """Everything known now. Health and reports belong to (actor id, incarnation); absent means not asked yet."""

    now_s: float
    replicas: Mapping[str, ReplicaRecord]
    routers: Mapping[str, RouterRecord]
    replica_health: Mapping[tuple[str, int], Health]
    router_reports: Mapping[tuple[str, int], RouterReport]
    # Ids of the actors that Ray knows, restarting ones included; None: Ray did not answer.
    existing_ids: frozenset[str] | None
    draining: bool


@dataclass(frozen=True, slots=True)
class Memory:
    """What must survive from one plan to the next; table and digests survive a restart of the controller too."""

    table: ExpertTable = EMPTY_TABLE
    # Weight digest of each group, by group name.
    digests: Mapping[str, str] = field(default_factory=dict[str, str])
    # Since when (now_s) an actor has been unknown to Ray, by id.
    missing_since_s: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True)
class ActorStatus:
    """message is one line, empty when there is nothing to say."""

    state: ActorState
    message: str = ""


@dataclass(frozen=True, slots=True)
class CreateReplica:
    replica_id: str


@dataclass(frozen=True, slots=True)
class CreateRouter:
    router_id: str


@dataclass(frozen=True, slots=True)
class PushTable:
    """Send the plan's table to this incarnation of a router."""

    router_id: str
    incarnation: int


Action = CreateReplica | CreateRouter | PushTable


@dataclass(frozen=True, slots=True)
class Plan:
    table: ExpertTable
    replicas: Mapping[str, ActorStatus]
    routers: Mapping[str, ActorStatus]
    actions: tuple[Action, ...]
    memory: Memory


def compute_plan(spec: ClusterSpec, observation: Observation, memory: Memory) -> Plan:
    digests = _extend_digests(spec, observation, memory.digests)
    replicas = {
        replica_id: _judge_replica(group, observation.replicas.get(replica_id), observation, digests)
        for replica_id, group in spec.replica_groups.items()
    }
    routers = {router_id: _judge_router(router_id, observation) for router_id in spec.router_ids}
    table = _build_table(spec, observation, replicas, memory.table)
    creations, missing_since_s = _plan_creations(spec, observation, memory.missing_since_s)
    return Plan(
        table=table,
        replicas=replicas,
        routers=routers,
        actions=(*creations, *_plan_pushes(spec, observation, table)),
        memory=Memory(table=table, digests=digests, missing_since_s=missing_since_s),
    )


def is_ready(plan: Plan, spec: ClusterSpec) -> bool:
    """Every router is ready (so every expert is reachable from it) and every replica of every group is up."""
    return all(plan.routers[router_id].state is ActorState.READY for router_id in spec.router_ids) and all(
        status.state is ActorState.READY for status in plan.replicas.values()
    )


def _extend_digests(spec: ClusterSpec, observation: Observation, known: Mapping[str, str]) -> dict[str, str]:
    digests = dict(known)
    for replica_id, group in spec.replica_groups.items():
        record = observation.replicas.get(replica_id)
        if record is not None and record.state is StartState.READY and record.hosted == group.hosted:
            digests.setdefault(group.name, record.weight_digest)
    return digests


def _judge_replica(
    group: GroupSpec, record: ReplicaRecord | None, observation: Observation, digests: Mapping[str, str]
) -> ActorStatus:
    if record is None:
        return ActorStatus(ActorState.STARTING, "waiting for a process")
    if record.state is StartState.STARTING:
        return ActorStatus(ActorState.STARTING, record.message)
    if record.state is StartState.FAILED:
        return ActorStatus(ActorState.DEAD, record.message)
    if record.hosted != group.hosted:
        return ActorStatus(ActorState.DEAD, f"refused: it hosts other experts than group {group.name}")
    if record.weight_digest != digests[group.name]:
        return ActorStatus(
            ActorState.DEAD,
            f"refused: its weights ({record.weight_digest[:12]}) differ from those of group {group.name} "
            f"({digests[group.name][:12]}); make every node read the same checkpoint",
        )
    match observation.replica_health.get((record.actor_id, record.incarnation)):
        case Health.GONE:
            return ActorStatus(ActorState.DEAD, "does not answer health checks")
        case Health.NOT_SERVING:
            return ActorStatus(ActorState.DRAINING)
        case Health.SERVING | None:
            # A record is published when the server listens: frames need not wait for the first check.
            return ActorStatus(ActorState.READY)


def _judge_router(router_id: str, observation: Observation) -> ActorStatus:
    record = observation.routers.get(router_id)
    if record is None:
        return ActorStatus(ActorState.STARTING, "waiting for a process")
    if record.state is StartState.FAILED:
        return ActorStatus(ActorState.DEAD, record.message)
    report = observation.router_reports.get((router_id, record.incarnation))
    if report is None:
        return ActorStatus(ActorState.STARTING, record.message)
    if not report.reachable:
        return ActorStatus(ActorState.DEAD, report.message)
    if report.draining:
        return ActorStatus(ActorState.DRAINING, report.message)
    return ActorStatus(ActorState.READY if report.ready else ActorState.STARTING, report.message)


def _build_table(
    spec: ClusterSpec, observation: Observation, replicas: Mapping[str, ActorStatus], previous: ExpertTable
) -> ExpertTable:
    groups = tuple(
        GroupEntry(
            name=group.name,
            hosted=group.hosted,
            replicas=tuple(
                _build_entry(observation.replicas[replica_id])
                for replica_id in group.replica_ids
                if replicas[replica_id].state is ActorState.READY
            ),
        )
        for group in spec.groups
    )
    # A router that outlived the record store may hold a later version, of unknown content.
    held = max(
        (
            report.table_version
            for (router_id, incarnation), report in observation.router_reports.items()
            if (record := observation.routers.get(router_id)) is not None and record.incarnation == incarnation
        ),
        default=0,
    )
    if groups == previous.groups and held <= previous.version:
        return previous
    return ExpertTable(version=max(previous.version, held) + 1, groups=groups)


def _build_entry(record: ReplicaRecord) -> ReplicaEntry:
    # Only ready records come here, and those name their endpoint.
    assert record.endpoint is not None
    return ReplicaEntry(
        replica_id=record.actor_id,
        endpoint=record.endpoint,
        incarnation=record.incarnation,
        weight_digest=record.weight_digest,
        numerics_id=record.numerics_id,
    )


def _plan_pushes(spec: ClusterSpec, observation: Observation, table: ExpertTable) -> list[Action]:
    pushes: list[Action] = []
    for router_id in spec.router_ids:
        record = observation.routers.get(router_id)
        if record is None or record.state is StartState.FAILED or record.endpoint is None:
            continue
        report = observation.router_reports.get((router_id, record.incarnation))
        if report is None or report.table_version < table.version:
            pushes.append(PushTable(router_id, record.incarnation))
    return pushes


def _plan_creations(
    spec: ClusterSpec, observation: Observation, known: Mapping[str, float]
) -> tuple[list[Action], dict[str, float]]:
    if observation.existing_ids is None or observation.draining:
        return [], dict(known)
    creations: list[Action] = []
    missing_since_s: dict[str, float] = {}
    for actor_id in (*spec.replica_groups, *spec.router_ids):
        if actor_id in observation.existing_ids:
            continue
        since_s = known.get(actor_id, observation.now_s)
        missing_since_s[actor_id] = since_s
        is_router = actor_id in spec.router_ids
        record = observation.routers.get(actor_id) if is_router else observation.replicas.get(actor_id)
        delay_s = MISSING_AFTER_S
        if record is not None and record.state is StartState.FAILED:
            delay_s = max(delay_s, compute_start_delay_s(record.num_failed_starts + 1))
        if observation.now_s - since_s >= delay_s:
            creations.append(CreateRouter(actor_id) if is_router else CreateReplica(actor_id))
            # Counted anew, so that one creation is given time to show up.
            missing_since_s[actor_id] = observation.now_s
    return creations, missing_since_s
