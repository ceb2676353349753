"""Creates the named, detached Ray actors of a cluster. Used by `shoal serve` at start and by the controller later.

Creating is idempotent: an actor that Ray still knows, restarting or not, is left alone. The calls are synchronous and
talk to Ray's control service, so the controller makes them in a thread.
"""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.actors import ExpertReplica, Router
from cluster.data_plane_env import DATA_PLANE_ENV
from cluster.errors import ChangeRefused, StoreUnavailable
from cluster.hosting import ranges_to_json
from cluster.pod_resources import ROUTER_RESOURCE, expert_resource
from cluster.spec import ClusterSpec, parse_replica_id
from experts.expert_range import ExpertRange

logger = logging.getLogger(__name__)

RAY_NAMESPACE = "shoal"
CONTROLLER_NAME = "controller"
# A running method must not keep another from being heard.
_MAX_CONCURRENCY = 4
_CALL_TIMEOUT_S = 5.0


def _read_available_bytes() -> int:
    import psutil

    return psutil.virtual_memory().available


class ActorFactory:
    """Makes actors for one spec. Their names are the ids of the spec."""

    def __init__(self, spec: ClusterSpec) -> None:
        self._spec = spec
        self._spec_json = spec.to_json()

    def for_spec(self, spec: ClusterSpec) -> ActorFactory:
        return ActorFactory(spec)

    def create_replica(self, replica_id: str, node_id: str | None = None) -> Any:
        """node_id: the node it lives and ends with; None: Ray spreads."""
        return self._create(ExpertReplica, replica_id, DATA_PLANE_ENV, self._spec_json, replica_id, node_id=node_id)

    def create_router(self, router_id: str) -> Any:
        """Routers go round the nodes, the first one beside the HTTP front."""
        node_id = None if self._spec.own_ray or self._spec.on_pods else self._choose_router_node(router_id)
        return self._create(Router, router_id, DATA_PLANE_ENV, self._spec_json, router_id, node_id=node_id)

    def create_controller(self, *args: Any) -> Any:
        from cluster.controller_actor import Controller

        # On the node of `shoal serve`, whose machine is where its admin API is looked for.
        node_id = ray.get_runtime_context().get_node_id()
        return self._create(Controller, CONTROLLER_NAME, {}, self._spec_json, *args, node_id=node_id)

    def list_existing(self) -> frozenset[str]:
        """Names of the actors in our namespace that live or are being restarted."""
        return frozenset(ray.util.list_named_actors())

    def list_nodes(self) -> frozenset[str]:
        """Ray's ids of the nodes that live, to choose from; none where pods' resources decide."""
        if self._spec.on_pods:
            return frozenset()
        return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])

    def measure_available(self) -> dict[str, int]:
        """Bytes of memory that are available on each node that lives, by Ray's id. Raises StoreUnavailable."""
        home_id = ray.get_runtime_context().get_node_id()
        if self._spec.own_ray:
            return {home_id: _read_available_bytes()}
        measure = ray.remote(num_cpus=0)(_read_available_bytes)
        node_ids = sorted(self.list_nodes(), key=lambda node_id: (node_id != home_id, node_id))
        try:
            answers = [
                measure.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote()
                for node_id in node_ids
            ]
            return dict(zip(node_ids, ray.get(answers, timeout=_CALL_TIMEOUT_S), strict=True))
        except (RayError, TimeoutError) as error:
            raise StoreUnavailable(f"a node does not say what memory it has: {type(error).__name__}") from error

    def count_free_gpus(self) -> float:
        return float(ray.available_resources().get("GPU", 0.0)) if self._spec.gpus_per_actor else 0.0

    def drain_replica(self, replica_id: str, grace_s: float) -> None:
        """Let a replica finish its frames; blocks for at most grace_s and a little. One that is gone has none."""
        try:
            actor = ray.get_actor(replica_id, namespace=RAY_NAMESPACE)
            ray.get(actor.drain.remote(grace_s), timeout=grace_s + _CALL_TIMEOUT_S)
        except (ValueError, RayError) as error:
            logger.info("not drained replica_id=%s: %s", replica_id, " ".join(str(error).split())[:200])

    def host_experts(self, replica_id: str, hosted: tuple[ExpertRange, ...], timeout_s: float) -> None:
        """Have a replica hold other experts; blocks until it does. Raises StoreUnavailable if Ray or the replica is
        gone or does not answer in time, ChangeRefused with its reason if it cannot."""
        try:
            actor = ray.get_actor(replica_id, namespace=RAY_NAMESPACE)
            ray.get(actor.host.remote(ranges_to_json(hosted)), timeout=timeout_s)
        except RayTaskError as error:
            raise ChangeRefused(" ".join(str(error.cause or error).split())[-300:]) from error
        except (ValueError, RayError) as error:
            raise StoreUnavailable(" ".join(str(error).split())[:200]) from error

    def kill(self, name: str) -> None:
        """End an actor for good, at once. Nothing happens if there is none."""
        try:
            ray.kill(ray.get_actor(name, namespace=RAY_NAMESPACE), no_restart=True)
        except ValueError:
            return

    def _choose_router_node(self, router_id: str) -> str:
        """`shoal serve` and the controller, which call this, are on the same node."""
        home_id = ray.get_runtime_context().get_node_id()
        node_ids = [home_id, *sorted(self.list_nodes() - {home_id})]
        return node_ids[self._spec.router_ids.index(router_id) % len(node_ids)]

    def _get_resource(self, name: str) -> str:
        """Of the pods that an actor of this name may live on, one to a pod."""
        if name in self._spec.router_ids:
            return ROUTER_RESOURCE
        return expert_resource(parse_replica_id(name)[0])

    def _create(self, actor_class: type, name: str, env: dict[str, str], *args: Any, node_id: str | None = None) -> Any:
        options: dict[str, Any] = {
            "name": name,
            "namespace": RAY_NAMESPACE,
            "lifetime": "detached",
            "get_if_exists": True,
            "max_restarts": -1,
            "max_task_retries": 0,
            "max_concurrency": _MAX_CONCURRENCY,
            # Threads are ours to share out: Ray would otherwise start no more actors than there are cores.
            "num_cpus": 0,
        }
        if actor_class in (ExpertReplica, Router):
            # Ray shows a process the cards that it reserved for it and no other; with 0 none.
            options["num_gpus"] = self._spec.gpus_per_actor
            if self._spec.on_pods:
                options["resources"] = {self._get_resource(name): 1}
        if not self._spec.own_ray:
            options["scheduling_strategy"] = (
                "SPREAD" if node_id is None else NodeAffinitySchedulingStrategy(node_id, soft=False)
            )
            if env:
                options["runtime_env"] = {"env_vars": env}
        return ray.remote(actor_class).options(**options).remote(*args)
