"""The pods under the replicas, as the controller sees them: which go away, and how many each expert group takes. Pure.

A replica has a pod to itself (one Ray pod per GPU node), known to both sides by its address. The controller works with
replicas; whoever makes the pods, Ray's autoscaler or cluster/kubernetes_backend.py, works with these two values.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.desired_state import DesiredState
from cluster.event_log import Event
from cluster.records import ReplicaRecord, RouterRecord
from cluster.spec import parse_replica_id


@dataclass(frozen=True, slots=True)
class FleetView:
    """Addresses of pods. leaving: being deleted. outdated: made from an older template than their worker group's."""

    leaving: frozenset[str] = frozenset()
    outdated: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class GroupDemand:
    """num_pods: for every replica (or router) that should exist or still does. occupied: addresses of pods with one."""

    num_pods: int
    occupied: frozenset[str]


@dataclass(frozen=True, slots=True)
class FleetLimits:
    """How many pods there may be: of each expert group by name, and with a router."""

    max_pods: Mapping[str, int]
    max_router_pods: int


class Fleet(Protocol):
    """Every call returns at once: the work is done by threads of the fleet's own."""

    def get_view(self) -> FleetView: ...

    def get_limits(self) -> FleetLimits | None:
        """None: not known yet."""
        ...

    def set_demand(self, demand: Mapping[str, GroupDemand], routers: GroupDemand) -> None:
        """demand: of replicas, by the name of their expert group. routers: of all routers together."""
        ...

    def renew(self, address: str) -> None:
        """Have this pod deleted and another made from the current template, where that is ours to do."""
        ...

    def tell(self, events: Sequence[Event]) -> None:
        """What the controller did, for whoever watches the pods' side."""
        ...


def find_residents(
    desired: DesiredState, records: Mapping[str, ReplicaRecord], addresses: Collection[str]
) -> tuple[str, ...]:
    """Members of groups that live on one of these addresses, in the order of the groups."""
    return tuple(
        member_id
        for group in desired.groups
        for member_id in group.member_ids
        if (record := records.get(member_id)) is not None and record.node in addresses
    )


def measure_demand(
    desired: DesiredState, records: Mapping[str, ReplicaRecord], existing_ids: Collection[str]
) -> dict[str, GroupDemand]:
    """By group name. existing_ids: actors that Ray knows; one that leaves keeps its pod until it is gone."""
    tenants = {group.name: set(group.member_ids) for group in desired.groups}
    for actor_id in existing_ids:
        try:
            group_name, _ = parse_replica_id(actor_id)
        except ValueError:
            continue
        if group_name in tenants:
            tenants[group_name].add(actor_id)
    return {
        name: GroupDemand(
            num_pods=len(ids),
            occupied=frozenset(
                record.node
                for replica_id in ids
                if replica_id in existing_ids and (record := records.get(replica_id)) is not None
            ),
        )
        for name, ids in tenants.items()
    }


def join_demands(demands: Iterable[Mapping[str, GroupDemand]]) -> dict[str, GroupDemand]:
    """Of all that live on the same pods' groups at the same time."""
    joined: dict[str, GroupDemand] = {}
    for demand in demands:
        for name, own in demand.items():
            other = joined.get(name, GroupDemand(0, frozenset()))
            joined[name] = GroupDemand(own.num_pods + other.num_pods, own.occupied | other.occupied)
    return joined


def measure_router_demand(
    router_ids: Collection[str], records: Mapping[str, RouterRecord], existing_ids: Collection[str]
) -> GroupDemand:
    """router_ids: that should exist. existing_ids: actors that Ray knows."""
    ids = {*router_ids, *(records.keys() & set(existing_ids))}
    occupied = (record.node for router_id, record in records.items() if router_id in existing_ids)
    return GroupDemand(len(ids), frozenset(occupied))
