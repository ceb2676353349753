"""Decides what to do: (spec, desired state, observation, memory) -> expert table, states, actions, memory. Pure.

The controller calls compute_plan in a loop and carries out the actions; it holds the only clock and hands its
reading in. Nothing here knows Ray, gRPC or time.

The rules, in one place:
- A replica is in the expert table when its record says ready, its weights are those of its group, and no health
  check has found it gone. A restarted replica has a new incarnation, so nothing known of the old one counts.
- The first weight digest seen in a group is the group's for the life of the cluster: weights are never mixed.
- The table's version rises only when its content changes, and above any version a router already holds.
- An actor that Ray no longer knows is created again, later and later if it keeps failing.
- A replica that is no member of its group leaves: it stays in the table until every member is connected to every
  router, then goes from the table, is drained once all routers hold a table without it, and ends. Every step follows
  from what is observed, so a restarted controller goes on in the middle.
- Which experts a group holds changes in the same way: see cluster/hosting.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from cluster.desired_state import DesiredState
from cluster.hosting import Hosting, publish_if_held, read_hosting
from cluster.node_placement import choose_node
from cluster.records import ActorRecord, ReplicaRecord, RouterRecord, StartState, compute_start_delay_s
from cluster.spec import ClusterSpec, parse_replica_id
from experts.expert_range import ExpertRange, covers, merge_ranges
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
    # Replicas to which it has an open stream.
    connected_ids: frozenset[str] = frozenset()


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
    # Ray's ids of the nodes that live; empty: not asked yet.
    node_ids: frozenset[str]
    # Incarnations of replicas that have been told to drain and have no frames left, or no time.
    drained: frozenset[tuple[str, int]]
    # The whole cluster is being stopped.
    draining: bool

    def get_record(self, actor_id: str) -> ActorRecord | None:
        return self.replicas.get(actor_id) or self.routers.get(actor_id)


class Held(NamedTuple):
    """What the replicas of a group hold, or held."""

    group_name: str
    hosted: tuple[ExpertRange, ...]


@dataclass(frozen=True, slots=True)
class Memory:
    """What must survive from one plan to the next; table and digests survive a restart of the controller too."""

    table: ExpertTable = EMPTY_TABLE
    # Weight digest of each group while it holds certain experts.
    digests: Mapping[Held, str] = field(default_factory=dict[Held, str])
    # When (now_s) an actor that Ray does not know is to be created, by id.
    create_at_s: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True)
class ActorStatus:
    """message is one line, empty when there is nothing to say."""

    state: ActorState
    message: str = ""


@dataclass(frozen=True, slots=True)
class CreateReplica:
    """node_id: where it goes; None where Ray chooses."""

    replica_id: str
    node_id: str | None = None
    reason: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class CreateRouter:
    router_id: str
    reason: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class DrainReplica:
    """No router sends frames to it any more: let it finish those it has."""

    replica_id: str
    incarnation: int
    reason: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class RemoveReplica:
    """End the actor for good and delete its record."""

    replica_id: str
    reason: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class PushTable:
    """Send the plan's table to this incarnation of a router."""

    router_id: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class HostExperts:
    """Have a replica that serves hold exactly these experts."""

    replica_id: str
    incarnation: int
    hosted: tuple[ExpertRange, ...]
    reason: str = field(default="", compare=False)


Action = CreateReplica | CreateRouter | DrainReplica | RemoveReplica | PushTable | HostExperts


@dataclass(frozen=True, slots=True)
class Waiting:
    """A change that is under way and what it waits for; for `shoal plan`."""

    object: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """replicas: members of each group and those that leave it, in table order of the groups."""

    # Version of the desired state that it is for.
    desired_version: int
    table: ExpertTable
    replicas: Mapping[str, ActorStatus]
    routers: Mapping[str, ActorStatus]
    leaving_ids: frozenset[str]
    actions: tuple[Action, ...]
    waiting: tuple[Waiting, ...]
    memory: Memory

    def is_settled(self, desired: DesiredState) -> bool:
        """What there is is what is desired: nothing starts, leaves, is being pushed or has its turn later."""
        return self.desired_version == desired.version and not (
            self.waiting or self.actions or self.leaving_ids or desired.rollout
        )

    def is_group_ready(self, name: str, count: int) -> bool:
        """Whether the group has exactly this many replicas, all of them ready."""
        states = [
            status.state for replica_id, status in self.replicas.items() if parse_replica_id(replica_id)[0] == name
        ]
        return len(states) == count and all(state is ActorState.READY for state in states)


def compute_plan(spec: ClusterSpec, desired: DesiredState, observation: Observation, memory: Memory) -> Plan:
    members = {group.name: group.member_ids for group in desired.groups}
    leaving = _find_leaving(spec, desired, observation)
    hosting = read_hosting(desired, memory.table)
    digests = _extend_digests(observation, memory.digests, hosting)
    if not hosting.is_published:
        ready = {name: _list_holders(name, ids, observation, digests, hosting) for name, ids in members.items()}
        hosting = publish_if_held(hosting, ready, {name: len(ids) for name, ids in members.items()})
    replicas: dict[str, ActorStatus] = {}
    published: dict[str, list[str]] = {}
    waiting: list[Waiting] = []
    for group in spec.groups:
        statuses = {
            replica_id: _judge_replica(group.name, observation.replicas.get(replica_id), observation, digests, hosting)
            for replica_id in (*members[group.name], *leaving[group.name])
        }
        published[group.name] = [id_ for id_, status in statuses.items() if status.state is ActorState.READY]
        lacking = [
            Waiting(f"replica {replica_id}", reason)
            for replica_id in members[group.name]
            if (reason := _explain_not_serving(replica_id, statuses[replica_id], observation)) is not None
        ]
        waiting.extend(lacking)
        for replica_id in leaving[group.name]:
            if statuses[replica_id].state is not ActorState.READY:
                continue
            if lacking:
                statuses[replica_id] = ActorStatus(ActorState.DRAINING, f"leaves once {lacking[0].object} serves")
                waiting.append(Waiting(f"replica {replica_id}", statuses[replica_id].message))
            else:
                statuses[replica_id] = ActorStatus(ActorState.DRAINING, "leaves: finishes its frames")
                published[group.name].remove(replica_id)
        replicas |= statuses
    routers = {router_id: _judge_router(router_id, observation) for router_id in spec.router_ids}
    table = _build_table(spec, observation, published, hosting, memory.table)
    hostings, changes = _plan_hostings(spec, observation, members, digests, hosting, table)
    creations, create_at_s = _plan_creations(spec, desired, observation, memory.create_at_s)
    leaving_ids = frozenset(replica_id for ids in leaving.values() for replica_id in ids)
    published_ids = frozenset(replica_id for ids in published.values() for replica_id in ids)
    departures, delays = _plan_departures(spec, observation, replicas, leaving_ids - published_ids, table)
    return Plan(
        desired_version=desired.version,
        table=table,
        replicas=replicas,
        routers=routers,
        leaving_ids=leaving_ids,
        # Pushes first: they do not need Ray.
        actions=(*_plan_pushes(spec, observation, table), *creations, *hostings, *departures),
        waiting=(*waiting, *changes, *delays),
        memory=Memory(table=table, digests=digests, create_at_s=create_at_s),
    )


def is_ready(plan: Plan, spec: ClusterSpec) -> bool:
    """Every router is ready (so every expert is reachable from it) and every member of every group is up."""
    return all(plan.routers[router_id].state is ActorState.READY for router_id in spec.router_ids) and all(
        status.state is ActorState.READY
        for replica_id, status in plan.replicas.items()
        if replica_id not in plan.leaving_ids
    )


def _find_leaving(spec: ClusterSpec, desired: DesiredState, observation: Observation) -> dict[str, tuple[str, ...]]:
    """Replicas that have an actor or a record and are no members, by group name."""
    member_ids = {member_id for group in desired.groups for member_id in group.member_ids}
    known_ids = (observation.replicas.keys() | (observation.existing_ids or frozenset())) - member_ids
    leaving: dict[str, list[str]] = {group.name: [] for group in spec.groups}
    for actor_id in sorted(known_ids - set(spec.router_ids)):
        try:
            group_name, _ = parse_replica_id(actor_id)
        except ValueError:
            continue
        if group_name in leaving:
            leaving[group_name].append(actor_id)
    return {name: tuple(ids) for name, ids in leaving.items()}


def _extend_digests(observation: Observation, known: Mapping[Held, str], hosting: Hosting) -> dict[Held, str]:
    """The first digest seen counts for as long as somebody holds those experts, or shall."""
    shall = {Held(name, hosted) for named in (hosting.published, hosting.desired) for name, hosted in named.items()}
    held: dict[Held, str] = {}
    for record in observation.replicas.values():
        if record.state is StartState.READY and record.group_name in hosting.desired:
            held.setdefault(Held(record.group_name, record.hosted), record.weight_digest)
    return held | {key: digest for key, digest in known.items() if key in held or key in shall}


def _list_holders(
    group_name: str,
    member_ids: Sequence[str],
    observation: Observation,
    digests: Mapping[Held, str],
    hosting: Hosting,
) -> list[ReplicaRecord]:
    """Records of the members that serve what the table names."""
    records = [record for id_ in member_ids if (record := observation.replicas.get(id_)) is not None]
    return [
        record
        for record in records
        if _judge_replica(group_name, record, observation, digests, hosting).state is ActorState.READY
    ]


def _judge_replica(
    group_name: str,
    record: ReplicaRecord | None,
    observation: Observation,
    digests: Mapping[Held, str],
    hosting: Hosting,
) -> ActorStatus:
    if record is None:
        return ActorStatus(ActorState.STARTING, "waiting for a process")
    if record.state is StartState.STARTING:
        return ActorStatus(ActorState.STARTING, record.message)
    if record.state is StartState.FAILED:
        return ActorStatus(ActorState.DEAD, record.message)
    known = digests[Held(group_name, record.hosted)]
    if record.weight_digest != known:
        return ActorStatus(
            ActorState.DEAD,
            f"refused: its weights ({record.weight_digest[:12]}) differ from those of group {group_name} "
            f"({known[:12]}); make every node read the same checkpoint",
        )
    if not covers(record.hosted, hosting.published[group_name]):
        return ActorStatus(ActorState.STARTING, "lacks experts that its group was given")
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


def _explain_not_serving(replica_id: str, status: ActorStatus, observation: Observation) -> str | None:
    """Why a member does not serve yet; None if it is ready and every router that serves has a stream to it."""
    if status.state is not ActorState.READY:
        return f"{status.state.value}: {status.message or 'no reason known'}"
    for router_id, record in observation.routers.items():
        report = observation.router_reports.get((router_id, record.incarnation))
        if report is not None and report.reachable and report.ready and replica_id not in report.connected_ids:
            return f"router {router_id} is not connected to it yet"
    return None


def _build_table(
    spec: ClusterSpec,
    observation: Observation,
    published: Mapping[str, list[str]],
    hosting: Hosting,
    previous: ExpertTable,
) -> ExpertTable:
    groups = tuple(
        GroupEntry(
            name=group.name,
            hosted=hosting.published[group.name],
            replicas=tuple(_build_entry(observation.replicas[replica_id]) for replica_id in published[group.name]),
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


def _plan_hostings(
    spec: ClusterSpec,
    observation: Observation,
    members: Mapping[str, Sequence[str]],
    digests: Mapping[Held, str],
    hosting: Hosting,
    table: ExpertTable,
) -> tuple[list[Action], list[Waiting]]:
    """What members that serve, or could, should hold instead."""
    actions: list[Action] = []
    delays: list[Waiting] = []
    behind_id = _find_router_behind(spec, observation, table)
    for group_name, member_ids in members.items():
        shall_hold = hosting.get_wanted(group_name)
        for replica_id in member_ids:
            record = observation.replicas.get(replica_id)
            if record is None or record.state is not StartState.READY:
                continue
            # Nothing is released that a router may still ask for.
            wanted = shall_hold if behind_id is None else merge_ranges(record.hosted, shall_hold)
            if record.hosted == wanted:
                continue
            health = observation.replica_health.get((replica_id, record.incarnation))
            if health is Health.GONE or record.weight_digest != digests[Held(group_name, record.hosted)]:
                continue
            reason = "its group holds other experts now" if hosting.is_published else "its group gets other experts"
            delays.append(Waiting(f"replica {replica_id}", f"loads or releases experts: {reason}"))
            if observation.existing_ids is not None and not observation.draining:
                actions.append(HostExperts(replica_id, record.incarnation, wanted, reason))
    return actions, delays


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


def _plan_departures(
    spec: ClusterSpec,
    observation: Observation,
    replicas: Mapping[str, ActorStatus],
    unpublished_ids: frozenset[str],
    table: ExpertTable,
) -> tuple[list[Action], list[Waiting]]:
    """What becomes of leaving replicas that are in the table no more."""
    actions: list[Action] = []
    delays: list[Waiting] = []
    if observation.existing_ids is None or observation.draining:
        return actions, delays
    holder_id = _find_router_behind(spec, observation, table)
    for replica_id in sorted(unpublished_ids):
        record = observation.replicas.get(replica_id)
        if replica_id not in observation.existing_ids or record is None:
            actions.append(RemoveReplica(replica_id, "no longer wanted, and it has no process"))
        elif replicas[replica_id].state is not ActorState.DRAINING:
            actions.append(RemoveReplica(replica_id, "no longer wanted, and it never served or is gone"))
        elif (replica_id, record.incarnation) in observation.drained:
            actions.append(RemoveReplica(replica_id, "no longer wanted, and drained"))
        elif holder_id is not None:
            delays.append(Waiting(f"replica {replica_id}", f"router {holder_id} has not taken table {table.version}"))
        else:
            reason = f"no longer wanted, and every router has table {table.version} without it"
            actions.append(DrainReplica(replica_id, record.incarnation, reason))
    return actions, delays


def _find_router_behind(spec: ClusterSpec, observation: Observation, table: ExpertTable) -> str | None:
    """A router that may still use an older table. One that does not answer is no reason to wait: if it lives, it
    finds the replica gone and takes another."""
    for router_id in spec.router_ids:
        record = observation.routers.get(router_id)
        if record is None or record.state is StartState.FAILED or record.endpoint is None:
            continue
        report = observation.router_reports.get((router_id, record.incarnation))
        if report is None or (report.reachable and report.table_version < table.version):
            return router_id
    return None


def _plan_creations(
    spec: ClusterSpec, desired: DesiredState, observation: Observation, known: Mapping[str, float]
) -> tuple[list[Action], dict[str, float]]:
    if observation.existing_ids is None or observation.draining:
        return [], dict(known)
    creations: list[Action] = []
    create_at_s: dict[str, float] = {}
    # As long as nothing was changed, all actors are those that `shoal serve` is creating itself.
    first_delay_s = MISSING_AFTER_S if desired.version == 1 else 0.0
    member_ids = [member_id for group in desired.groups for member_id in group.member_ids]
    occupied = {
        member_id: record.node_id
        for member_id in member_ids
        if (record := observation.replicas.get(member_id)) is not None and record.node_id
    }
    for actor_id in (*member_ids, *spec.router_ids):
        if actor_id in observation.existing_ids:
            continue
        record = observation.get_record(actor_id)
        backoff_s = 0.0
        if record is not None and record.state is StartState.FAILED:
            backoff_s = compute_start_delay_s(record.num_failed_starts + 1)
        delay_s = max(first_delay_s if record is None else MISSING_AFTER_S, backoff_s)
        at_s = known.get(actor_id, observation.now_s + delay_s)
        if observation.now_s >= at_s:
            reason = "it should exist and Ray does not know it"
            if record is not None and record.state is StartState.FAILED:
                reason = f"failed start number {record.num_failed_starts + 1}, tried again after {backoff_s:.1f} s"
            if actor_id in spec.router_ids:
                creations.append(CreateRouter(actor_id, reason))
            else:
                node_id = choose_node(actor_id, observation.node_ids, occupied)
                creations.append(CreateReplica(actor_id, node_id, reason))
                if node_id is not None:
                    occupied[actor_id] = node_id
            # One creation is given time to show up.
            at_s = observation.now_s + max(MISSING_AFTER_S, backoff_s)
        create_at_s[actor_id] = at_s
    return creations, create_at_s
