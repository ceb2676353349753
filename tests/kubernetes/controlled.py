"""The controller's loop with the real Kubernetes backend on a real API server; only Ray and the actors are played.

An actor lives on a pod of its group that no other has, as Ray places it by the pod's resource; without one it waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from cluster.controller import ControllerLoop
from cluster.kubernetes_backend import KubernetesBackend
from cluster.spec import ClusterSpec, GroupSpec, parse_replica_id
from experts.expert_range import ExpertRange
from tests.cluster.fakes import FakeFactory, FakeProber, MemoryStore, make_replica, make_router, make_spec
from tests.kubernetes.conftest import Place
from tests.kubernetes.ray_cluster import PlayedOperator


class PodFactory(FakeFactory):
    """Actors wait for a pod of their group and take it alone."""

    def __init__(
        self, store: MemoryStore, operator: PlayedOperator, hosted: dict[str, tuple[ExpertRange, ...]]
    ) -> None:
        super().__init__({"r0"})
        self._records = store
        self._operator = operator
        self._hosted = hosted
        self.address_of: dict[str, str] = {}
        # What the next replica of a group reads from its disk.
        self.weights = {name: f"digest of {name}" for name in hosted}
        self._number = 0

    def create_replica(self, replica_id: str, node_id: str | None) -> None:
        self.created.append(replica_id)
        self.existing.add(replica_id)

    def kill(self, name: str) -> None:
        super().kill(name)
        self.address_of.pop(name, None)

    def place_waiting(self) -> None:
        """What Ray's scheduler and the start of an actor do; an actor whose pod is gone waits again."""
        pods = self._operator.list_pods()
        alive = {pod["status"]["podIP"] for pod in pods if (pod.get("status") or {}).get("podIP")}
        for replica_id, address in list(self.address_of.items()):
            if address not in alive:
                del self.address_of[replica_id]
        for replica_id in sorted(self.existing - {"r0"} - self.address_of.keys()):
            group_name = parse_replica_id(replica_id)[0]
            taken = set(self.address_of.values())
            for pod in pods:
                address = (pod.get("status") or {}).get("podIP")
                in_group = pod["metadata"]["labels"]["ray.io/group"] == group_name
                if address and in_group and address not in taken and not pod["metadata"].get("deletionTimestamp"):
                    self._number += 1
                    self.address_of[replica_id] = address
                    record = replace(
                        make_replica("g0-0", self._number, node=address, weight_digest=self.weights[group_name]),
                        actor_id=replica_id,
                        group_name=group_name,
                        hosted=self._hosted[group_name],
                    )
                    self._records.publish(record)
                    break


class Controlled:
    """g0, g1 and g2 with one replica each, driven by turns of the loop."""

    def __init__(self, place: Place, operator: PlayedOperator, may_act: Callable[[], bool] = lambda: True) -> None:
        groups = tuple(GroupSpec(f"g{index}", (ExpertRange(1, 4, 2 * index, 2 * index + 2),), 1) for index in range(3))
        self.spec: ClusterSpec = replace(make_spec(), groups=groups)
        self.store = MemoryStore()
        self.store.publish(make_router())
        self.factory = PodFactory(self.store, operator, {group.name: group.hosted for group in groups})
        self.backend = KubernetesBackend(place.api, "controller", may_act)
        self.loop = ControllerLoop(
            self.spec, self.store, self.factory, FakeProber(), time.monotonic, time.time, self.backend, may_act
        )

    async def turn_until(self, condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while True:
            await asyncio.to_thread(self.factory.place_waiting)
            await self.loop.step()
            if await asyncio.to_thread(condition):
                return
            assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {self.loop.get_plan_view()}"
            await asyncio.sleep(0.02)

    def has_settled(self) -> bool:
        return self.loop.get_status()["settled"]

    def list_events(self) -> list[tuple[str, str]]:
        return [(event["object"], event["action"]) for event in self.loop.get_events(0)]


@contextlib.asynccontextmanager
async def controlled(place: Place, operator: PlayedOperator) -> AsyncIterator[Controlled]:
    """Settled with one replica of each group, and stopped in the end."""
    setting = Controlled(place, operator)
    setting.backend.start()
    try:
        await setting.turn_until(lambda: setting.has_settled() and len(setting.factory.address_of) == 3)
        yield setting
    finally:
        setting.backend.stop()
