"""What the controller keeps of one version of the weights: what there should be and what was decided.

Usually there is one. While a cluster is upgraded there are two, of the old and of the new checkpoint, and neither knows
of the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from cluster.desired_state import DesiredState
from cluster.hosting import Ranges
from cluster.planner import Memory, Plan
from cluster.spec import ClusterSpec


class Factory(Protocol):
    """Makes actors of one spec. Synchronous calls into Ray; they may block."""

    def for_spec(self, spec: ClusterSpec) -> Factory: ...

    def create_replica(self, replica_id: str, node_id: str | None) -> Any: ...

    def create_router(self, router_id: str) -> Any: ...

    def list_existing(self) -> frozenset[str]: ...

    def list_nodes(self) -> frozenset[str]: ...

    def measure_available(self) -> dict[str, int]: ...

    def count_free_gpus(self) -> float: ...

    def drain_replica(self, replica_id: str, grace_s: float) -> None: ...

    def host_experts(self, replica_id: str, hosted: Ranges, timeout_s: float) -> None: ...

    def kill(self, name: str) -> None: ...


@dataclass(slots=True)
class Track:
    """memory: None until it was read from the store; stored: what the store has of it. has_routers: False while its
    routers are not to be started yet, or any more."""

    spec: ClusterSpec
    factory: Factory
    desired: DesiredState
    memory: Memory | None = None
    stored: Memory | None = None
    plan: Plan | None = None
    has_routers: bool = True
    # The last start seen of each actor.
    incarnations: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def planned_spec(self) -> ClusterSpec:
        return self.spec if self.has_routers else replace(self.spec, router_ids=())

    @property
    def own_ids(self) -> set[str]:
        """Of all actors that these weights should have, or may."""
        return {*self.spec.router_ids, *(id_ for group in self.desired.groups for id_ in group.member_ids)}
