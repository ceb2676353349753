"""An upgrade of a running cluster to another checkpoint: its state, and what comes next. Pure.

Replicas and routers of the new checkpoint are started beside those of the old one, which serve meanwhile. The two have
nothing to do with each other: each has a weights version, a desired state, digests and an expert table of its own, so
no router ever hears of a replica of other weights. In this order, make before break:

loading     group by group: the replicas of the next group start when those of the group before serve;
routing     all groups are there: the new routers start, and connect to all of them;
finishing   new requests go to the new routers; the old ones finish what they have begun, then they go, then their
            replicas;
done        nothing of the old checkpoint is left.

What goes wrong before new requests are sent anywhere else leaves everything as it was:

undoing     what was started of the new checkpoint goes;
failed      nothing of it is left.

From finishing on there is no way back but another upgrade: answers have been begun with the new weights.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from cluster import desired_state
from cluster.desired_state import DesiredState
from cluster.errors import BadRecord
from cluster.planner import ActorState, Held, Observation, Plan
from cluster.records import ActorRecord, StartState
from cluster.spec import ClusterSpec, build_groups, spec_from_json
from experts.model_config import ModelConfig

Phase = Literal["loading", "routing", "finishing", "done", "undoing", "failed"]
# A single failed start may be bad luck; the third in a row of the same actor is not.
MAX_FAILED_STARTS = 3
# Until everything of a new checkpoint is loaded, and for answers that were begun before.
DEFAULT_TIMEOUT_S = 3600.0
DEFAULT_DRAIN_TIMEOUT_S = 3600.0


@dataclass(frozen=True, slots=True)
class Upgrade:
    """source, target: what every process of the old and of the new checkpoint is started with. reason: why it failed,
    or "". began_at, switched_at: seconds since the epoch; switched_at: when new requests began to go to the new
    routers. timeout_s: from begin until then. drain_timeout_s: from then on, for answers that were begun before."""

    phase: Phase
    source: ClusterSpec
    target: ClusterSpec
    began_at: float
    timeout_s: float
    drain_timeout_s: float
    switched_at: float | None = None
    reason: str = ""

    @property
    def is_over(self) -> bool:
        return self.phase in ("done", "failed")

    @property
    def serving(self) -> ClusterSpec:
        """What new requests are for."""
        return self.target if self.phase in ("finishing", "done") else self.source

    @property
    def beside(self) -> ClusterSpec | None:
        """What runs beside it."""
        if self.is_over:
            return None
        return self.source if self.phase == "finishing" else self.target

    def to_json(self) -> bytes:
        values = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps({**values, "source": asdict(self.source), "target": asdict(self.target)}).encode()

    def to_view(self) -> dict[str, Any]:
        """For the admin API."""
        return {
            "phase": self.phase,
            "from": {"checkpoint": self.source.checkpoint, "weights_version": self.source.weights_version},
            "to": {"checkpoint": self.target.checkpoint, "weights_version": self.target.weights_version},
            "began_at": self.began_at,
            "switched_at": self.switched_at,
            "reason": self.reason,
        }


def upgrade_from_json(data: bytes) -> Upgrade:
    """Raises BadRecord."""
    try:
        values: dict[str, Any] = json.loads(data)
        specs = {name: spec_from_json(json.dumps(values.pop(name)).encode()) for name in ("source", "target")}
        return Upgrade(**specs, **values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadRecord(f"the stored upgrade cannot be read: {error}") from error


def plan_target(
    source: ClusterSpec,
    checkpoint: str,
    before: ModelConfig,
    after: ModelConfig,
    taken_ids: Collection[str],
    last_version: int,
) -> ClusterSpec:
    """What the processes of the new checkpoint are started with. last_version: the greatest ever given. Raises
    ConfigError if the new model has fewer experts than there are groups."""
    router_ids: list[str] = []
    number = 0
    while len(router_ids) < len(source.router_ids):
        if f"r{number}" not in taken_ids:
            router_ids.append(f"r{number}")
        number += 1
    groups = source.groups if have_same_experts(before, after) else build_groups(after, len(source.groups), 1)
    return replace(
        source,
        checkpoint=checkpoint,
        router_ids=tuple(router_ids),
        groups=groups,
        weights_version=last_version + 1,
    )


def have_same_experts(before: ModelConfig, after: ModelConfig) -> bool:
    """Whether experts can be cut into the same groups."""
    return (before.moe_layer_ids, before.n_routed_experts) == (after.moe_layer_ids, after.n_routed_experts)


def begin_empty(source: DesiredState, old: ClusterSpec, target: ClusterSpec) -> DesiredState:
    """No replica yet. Experts are where a rebalancing has put them, where the models are cut alike."""
    begun = desired_state.begin(target)
    groups = tuple(
        replace(new, member_ids=(), hosted=before.hosted if old.groups == target.groups else new.hosted)
        for new, before in zip(begun.groups, source.groups, strict=True)
    )
    return DesiredState(source.version + 1, groups)


def empty(desired: DesiredState) -> DesiredState:
    """Every replica leaves. The same state if none is left."""
    if not any(group.member_ids for group in desired.groups):
        return desired
    return DesiredState(desired.version + 1, tuple(replace(group, member_ids=()) for group in desired.groups))


def find_next_group(desired: DesiredState, counts: Mapping[str, int], plan: Plan) -> str | None:
    """The group whose replicas start now; None while those before are not ready, or if there is no further one.

    counts: replicas that groups should have, by name. plan: for the new weights."""
    for group in desired.groups:
        if len(group.member_ids) < counts[group.name]:
            return group.name
        if not plan.is_group_ready(group.name, len(group.member_ids)):
            return None
    return None


def is_loaded(desired: DesiredState, counts: Mapping[str, int], plan: Plan) -> bool:
    """Whether every group of the new weights has its replicas, and all are ready."""
    return plan.desired_version == desired.version and all(
        len(group.member_ids) >= counts[group.name] and plan.is_group_ready(group.name, len(group.member_ids))
        for group in desired.groups
    )


def are_routers_ready(target: ClusterSpec, plan: Plan) -> bool:
    """Whether every new router serves: each reaches every expert."""
    return all(
        (status := plan.routers.get(router_id)) is not None and status.state is ActorState.READY
        for router_id in target.router_ids
    )


def find_failure(target: ClusterSpec, plan: Plan, observation: Observation) -> str | None:
    """Why the new weights cannot serve, in a line; None: nothing speaks against it. observation: of their processes."""
    records: dict[str, ActorRecord] = {**observation.replicas, **observation.routers}
    for actor_id, record in records.items():
        num_failed = record.num_failed_starts + (record.state is StartState.FAILED)
        if record.state is not StartState.READY and num_failed >= MAX_FAILED_STARTS:
            kind = "router" if actor_id in target.router_ids else "replica"
            return f"{kind} {actor_id} failed to start {num_failed} times: {record.message or 'its process ended'}"
    for replica_id, record in observation.replicas.items():
        known = plan.memory.digests.get(Held(record.group_name, record.hosted))
        if record.state is StartState.READY and known is not None and record.weight_digest != known:
            return f"replica {replica_id}: {plan.replicas[replica_id].message}"
    return None


def describe_wait(plan: Plan | None) -> str:
    """What an upgrade waits for, for people."""
    if plan is None:
        return "the first look"
    reasons = [f"{item.object}: {item.reason}" for item in plan.waiting]
    reasons += [
        f"router {router_id}: {status.state.value} {status.message}".rstrip()
        for router_id, status in plan.routers.items()
        if status.state is not ActorState.READY
    ]
    return "; ".join(reasons[:3]) or "nothing that is known"


def narrow(
    observation: Observation, weights_version: int, own_ids: Collection[str], foreign_ids: Collection[str] | None
) -> Observation:
    """What of an observation belongs to these weights. own_ids: actors that they should have. foreign_ids: those that
    the other weights should have, so that an actor that is neither and has written no record is taken for one of
    these; None: it is not."""
    replicas = {
        id_: record for id_, record in observation.replicas.items() if record.weights_version == weights_version
    }
    routers = {id_: record for id_, record in observation.routers.items() if record.weights_version == weights_version}
    existing_ids = observation.existing_ids
    if existing_ids is not None:
        mine = {*own_ids, *replicas, *routers}
        if foreign_ids is None:
            existing_ids &= mine
        else:
            others = {*foreign_ids, *observation.replicas, *observation.routers} - mine
            existing_ids -= others
    return replace(observation, replicas=replicas, routers=routers, existing_ids=existing_ids)
