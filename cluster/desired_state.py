"""What the cluster should be now: the replicas that each expert group should have, and the experts that they should
hold. Pure changes of plain data.

The spec says how a cluster begins; this says how it goes on, and only the controller writes it, before it acts on it.
A restarted controller needs nothing else: a replica that exists and is no member leaves, a member that does not exist
is created. Membership is by id and not by number, so that a drained replica does not come back under the same rule
that made it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.errors import BadRecord, ChangeRefused
from cluster.spec import ClusterSpec, parse_replica_id
from experts.expert_range import ExpertRange, merge_ranges

MAX_REPLICAS = 64


@dataclass(frozen=True, slots=True)
class DesiredGroup:
    """member_ids: replicas that should serve, in the order of the expert table. hosted: what each should hold."""

    name: str
    member_ids: tuple[str, ...]
    hosted: tuple[ExpertRange, ...]


@dataclass(frozen=True, slots=True)
class DesiredState:
    """version rises with every change. rollout: members that are still to be replaced, one after another."""

    version: int
    groups: tuple[DesiredGroup, ...]
    rollout: tuple[str, ...] = ()

    def get_group(self, name: str) -> DesiredGroup:
        """Raises ChangeRefused for an unknown name."""
        for group in self.groups:
            if group.name == name:
                return group
        known = ", ".join(group.name for group in self.groups)
        raise ChangeRefused(f"there is no expert group {name!r}; there are {known}")

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()


def begin(spec: ClusterSpec) -> DesiredState:
    """The state in which `shoal serve` starts a cluster."""
    return DesiredState(
        1, tuple(DesiredGroup(group.name, group.replica_ids, merge_ranges(group.hosted)) for group in spec.groups)
    )


def desired_from_json(data: bytes) -> DesiredState:
    """Raises BadRecord."""
    try:
        values: dict[str, Any] = json.loads(data)
        groups = tuple(
            DesiredGroup(
                group["name"], tuple(group["member_ids"]), tuple(ExpertRange(**block) for block in group["hosted"])
            )
            for group in values["groups"]
        )
        return DesiredState(int(values["version"]), groups, tuple(values["rollout"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadRecord(f"the stored desired state cannot be read: {error}") from error


def scale(
    desired: DesiredState,
    counts: Mapping[str, int],
    *,
    force: bool,
    taken_ids: Collection[str],
    serving_ids: Collection[str],
) -> DesiredState:
    """Give groups other numbers of replicas; the same state if they have them already.

    taken_ids: of actors that Ray knows: a replica that is leaving keeps its id until it is gone. serving_ids: ready
    replicas; when a group shrinks, others go first, then those with the highest number.
    Raises ChangeRefused for an unknown group, a number out of bounds, or zero without force.
    """
    changed = {group.name: group for group in desired.groups}
    for name, count in counts.items():
        group = desired.get_group(name)
        if not 0 <= count <= MAX_REPLICAS:
            raise ChangeRefused(f"{name}={count}: a group has from 0 to {MAX_REPLICAS} replicas")
        if count == 0 and not force:
            raise ChangeRefused(f"{name}=0 would stop every request, as nobody else hosts its experts: --force does it")
        members = list(group.member_ids)
        surplus = len(members) - count
        if surplus > 0:
            for member_id in sorted(members, key=lambda member_id: _get_keeping_rank(member_id, serving_ids))[:surplus]:
                members.remove(member_id)
        for _ in range(-surplus):
            members.append(_pick_free_id(name, {*members, *taken_ids, *group.member_ids}))
        changed[name] = replace(group, member_ids=tuple(members))
    groups = tuple(changed.values())
    return desired if groups == desired.groups else _change(desired, groups, desired.rollout)


def replace_member(desired: DesiredState, replica_id: str, taken_ids: Collection[str]) -> DesiredState:
    """Let a replica leave and another one take its place. Raises ChangeRefused if it is no member."""
    group = next((group for group in desired.groups if replica_id in group.member_ids), None)
    if group is None:
        known = ", ".join(member_id for group in desired.groups for member_id in group.member_ids)
        raise ChangeRefused(f"there is no replica {replica_id!r} that serves; there are {known}")
    successor_id = _pick_free_id(group.name, {*group.member_ids, *taken_ids})
    members = tuple(successor_id if member_id == replica_id else member_id for member_id in group.member_ids)
    groups = tuple(replace(group, member_ids=members) if other is group else other for other in desired.groups)
    return _change(desired, groups, tuple(other for other in desired.rollout if other != replica_id))


def start_rollout(desired: DesiredState, names: Collection[str]) -> DesiredState:
    """Replace every replica of these groups, of all if none is named. Raises ChangeRefused for an unknown group."""
    for name in names:
        desired.get_group(name)
    return start_member_rollout(
        desired,
        [member_id for group in desired.groups if not names or group.name in names for member_id in group.member_ids],
    )


def start_member_rollout(desired: DesiredState, replica_ids: Collection[str]) -> DesiredState:
    """Replace these members, group by group; those that are none are skipped."""
    rollout = tuple(member_id for group in desired.groups for member_id in group.member_ids if member_id in replica_ids)
    return _change(desired, desired.groups, rollout)


def advance_rollout(desired: DesiredState, taken_ids: Collection[str]) -> DesiredState:
    """Replace the next one of the rollout; what left meanwhile is skipped."""
    member_ids = {member_id for group in desired.groups for member_id in group.member_ids}
    left = tuple(replica_id for replica_id in desired.rollout if replica_id in member_ids)
    if not left:
        return _change(desired, desired.groups, ())
    return replace_member(replace(desired, rollout=left), left[0], taken_ids)


def rehost(desired: DesiredState, placements: Mapping[str, tuple[ExpertRange, ...]]) -> DesiredState:
    """Have groups, by name, hold other experts. The same state if they do already."""
    groups = tuple(
        replace(group, hosted=merge_ranges(placements.get(group.name, group.hosted))) for group in desired.groups
    )
    return desired if groups == desired.groups else _change(desired, groups, desired.rollout)


def _change(desired: DesiredState, groups: tuple[DesiredGroup, ...], rollout: tuple[str, ...]) -> DesiredState:
    return DesiredState(desired.version + 1, groups, rollout)


def _get_keeping_rank(replica_id: str, serving_ids: Collection[str]) -> tuple[bool, int]:
    """Ascending order of who goes first."""
    return replica_id in serving_ids, -parse_replica_id(replica_id)[1]


def _pick_free_id(group_name: str, taken_ids: Collection[str]) -> str:
    index = 0
    while f"{group_name}-{index}" in taken_ids:
        index += 1
    return f"{group_name}-{index}"
