"""Carries out on Kubernetes what the controller decides: how many pods each expert group has, and which of them go.

Two ways, exclusive, checked at start (cluster/worker_groups.py: find_problems):
- `ray` (the default): Ray's autoscaler adds a pod when an actor waits for its group's resource, and removes idle ones.
  Here only pods that leave or are outdated are looked at.
- `controller`: the numbers are ours. One worker group is changed by a JSON patch that tests the object's version and
  the group's name first, so that it never touches another group, whoever writes beside it; pods to remove are named.

Everything goes by what is seen, not by what was done: a number that somebody else wrote is written over, names of pods
that are gone are cleared, a patch that was lost is made again. Rights needed: see cluster/kubernetes_api.py.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.errors import (
    ApiConflict,
    ApiNotFound,
    ApiUnavailable,
    BadRecord,
    ClusterError,
    KubernetesError,
    StartError,
)
from cluster.fleet import FleetView, GroupDemand
from cluster.kubernetes_api import KubernetesApi
from cluster.kubernetes_watch import KubernetesWatch
from cluster.pod_plan import GroupChange, clamp, plan_change
from cluster.worker_groups import Pod, RayClusterView, Scaling, find_problems, read_cluster, read_pod

logger = logging.getLogger(__name__)

MAX_TRIES = 5
_FIRST_RETRY_S = 0.05
# A change that did not come through is looked at again after this, and everything now and then anyway.
_RECHECK_S = 1.0
_PERIODIC_S = 30.0


def check_ray_cluster(api: KubernetesApi, group_names: Sequence[str], scaling: Scaling) -> None:
    """Raises StartError with everything that is wrong, or KubernetesError."""
    try:
        problems = find_problems(read_cluster(api.fetch_cluster()), group_names, scaling)
    except BadRecord as error:
        problems = [str(error)]
    if problems:
        raise StartError(f"RayCluster {api.namespace}/{api.cluster_name}: {'; '.join(problems)}")


class KubernetesBackend:
    """A cluster.fleet.Fleet. Owns three threads: two watches, and one that makes the changes."""

    def __init__(self, api: KubernetesApi, scaling: Scaling, may_write: Callable[[], bool]) -> None:
        """may_write: asked right before every write; False as soon as another controller may lead."""
        self._api = api
        self._scaling: Scaling = scaling
        self._may_write = may_write
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopped = threading.Event()
        # Guarded by the lock; None: not seen yet.
        self._cluster: RayClusterView | None = None
        self._pods: Mapping[str, Pod] | None = None
        self._demand: Mapping[str, GroupDemand] | None = None
        # Of the thread that makes the changes.
        self._written: dict[str, int] = {}
        self._told: dict[str, str] = {}
        self._watches = (
            KubernetesWatch("rayclusters", api.list_cluster, api.watch_cluster, self._see_clusters),
            KubernetesWatch("pods", api.list_pods, api.watch_pods, self._see_pods),
        )
        self._thread = threading.Thread(target=self._run, name="kubernetes backend", daemon=True)

    def start(self) -> None:
        for watch in self._watches:
            watch.start()
        self._thread.start()

    def stop(self) -> None:
        """Writes nothing any more once this has returned, unless a call is under way."""
        self._stopped.set()
        self._wake.set()
        for watch in self._watches:
            watch.stop()

    def get_view(self) -> FleetView:
        with self._lock:
            cluster, pods = self._cluster, self._pods
        if cluster is None or pods is None:
            return FleetView()
        templates = {group.name: group.template for group in cluster.groups}
        alive = [pod for pod in pods.values() if pod.address and not pod.is_over]
        return FleetView(
            leaving=frozenset(pod.address for pod in alive if pod.is_leaving),
            outdated=frozenset(
                pod.address
                for pod in alive
                if not pod.is_leaving and pod.template != templates.get(pod.group_name, pod.template)
            ),
        )

    def set_demand(self, demand: Mapping[str, GroupDemand]) -> None:
        with self._lock:
            if demand == self._demand:
                return
            self._demand = dict(demand)
        self._wake.set()

    def _see_clusters(self, objects: Mapping[str, dict[str, Any]]) -> None:
        document = objects.get(self._api.cluster_name)
        if document is None:
            logger.warning("there is no RayCluster %s/%s any more", self._api.namespace, self._api.cluster_name)
            return
        try:
            view = read_cluster(document)
        except BadRecord as error:
            logger.warning("keeping the view of before: %s", error)
            return
        with self._lock:
            self._cluster = view
        self._wake.set()

    def _see_pods(self, objects: Mapping[str, dict[str, Any]]) -> None:
        pods: dict[str, Pod] = {}
        for name, document in objects.items():
            try:
                pods[name] = read_pod(document)
            except BadRecord as error:
                logger.warning("ignoring pod %s: %s", name, error)
        with self._lock:
            before, self._pods = self._pods, pods
        for pod in pods.values():
            if pod.is_leaving and pod.group_name and (before is None or not _was_leaving(before.get(pod.name))):
                logger.info("pod %s of %s is being deleted", pod.name, pod.group_name)
        self._wake.set()

    def _run(self) -> None:
        pause_s = _PERIODIC_S
        while not self._stopped.is_set():
            self._wake.wait(pause_s)
            self._wake.clear()
            try:
                pause_s = _PERIODIC_S if self._reconcile() else _RECHECK_S
            except Exception:
                logger.exception("a look at the worker groups failed")
                pause_s = _RECHECK_S

    def _reconcile(self) -> bool:
        """Bring every group to what is demanded. Returns False if something is left to do."""
        with self._lock:
            cluster, pods, demand = self._cluster, self._pods, self._demand
        if self._scaling != "controller" or cluster is None or pods is None or demand is None:
            return True
        is_done = True
        for name, wanted in demand.items():
            own_pods = [pod for pod in pods.values() if pod.group_name == name]
            entry = cluster.find_group(name)
            if entry is not None and plan_change(entry[1], own_pods, wanted) is None:
                self._tell_limits(
                    name, entry[1].min_replicas, entry[1].max_replicas, clamp(entry[1], wanted.num_pods), wanted
                )
                continue
            try:
                self._change_group(name, own_pods, wanted)
            except ClusterError as error:
                is_done = False
                self._tell(name, "ChangeFailed", str(error))
        return is_done

    def _change_group(self, name: str, pods: Sequence[Pod], demand: GroupDemand) -> None:
        """Read, plan, patch, at most MAX_TRIES times. Raises KubernetesError."""
        pause_s = _FIRST_RETRY_S
        for attempt in range(MAX_TRIES):
            view = self._read_cluster()
            entry = view.find_group(name)
            if entry is None:
                raise ApiNotFound(f"the RayCluster has no single worker group {name!r}: it must have exactly one")
            index, group = entry
            change = plan_change(group, pods, demand)
            if change is None:
                return
            if not self._may_write():
                raise ApiUnavailable("not the leader at the moment: nothing is changed")
            try:
                written = self._api.patch_cluster(_build_patch(view, index, name, change))
            except (ApiConflict, ApiUnavailable) as error:
                # After an error of the server the patch may be in force: reading again tells.
                logger.info("worker group %s, try %d: %s", name, attempt + 1, error)
                if attempt == MAX_TRIES - 1:
                    raise
                self._stopped.wait(pause_s * random.uniform(0.5, 1.5))
                pause_s *= 2
                continue
            with self._lock:
                self._cluster = read_cluster(written)
            self._tell_change(view, name, group.replicas, change)
            return

    def _read_cluster(self) -> RayClusterView:
        try:
            return read_cluster(self._api.fetch_cluster())
        except BadRecord as error:
            raise KubernetesError(str(error)) from error

    def _tell_change(self, view: RayClusterView, name: str, found: int, change: GroupChange) -> None:
        reason = change.reason
        expected = self._written.get(name)
        if expected is not None and found != expected and change.replicas == expected:
            reason = f"{reason}; somebody else had written {found} over {expected}"
        self._written[name] = change.replicas
        self._told.pop(name, None)
        logger.info("%s: %s", change.action, reason)
        self._send_event(view, change.action, reason, warning=False)

    def _tell_limits(self, name: str, minimum: int, maximum: int, replicas: int, demand: GroupDemand) -> None:
        if demand.num_pods > replicas:
            text = (
                f"worker group {name}: {demand.num_pods} replicas need a pod, but its range is {minimum} to {maximum}"
            )
            self._tell(name, "AtLimit", text)
        else:
            self._told.pop(name, None)

    def _tell(self, name: str, action: str, message: str) -> None:
        """A warning, once until something else is to be said of this group."""
        if self._told.get(name) == message:
            return
        self._told[name] = message
        logger.warning("%s", message)
        with self._lock:
            cluster = self._cluster
        if cluster is not None:
            self._send_event(cluster, action, message, warning=True)

    def _send_event(self, view: RayClusterView, action: str, message: str, *, warning: bool) -> None:
        involved = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "name": view.name, "uid": view.uid}
        try:
            self._api.create_event(involved, action, message, warning=warning)
        except KubernetesError as error:
            logger.warning("no Event was written: %s", error)


def _was_leaving(pod: Pod | None) -> bool:
    return pod is not None and pod.is_leaving


def _build_patch(view: RayClusterView, index: int, name: str, change: GroupChange) -> list[dict[str, Any]]:
    """`add` also replaces what is there; the tests make it fail if the object or the order of groups has changed."""
    path = f"/spec/workerGroupSpecs/{index}"
    return [
        {"op": "test", "path": "/metadata/resourceVersion", "value": view.resource_version},
        {"op": "test", "path": f"{path}/groupName", "value": name},
        {"op": "add", "path": f"{path}/replicas", "value": change.replicas},
        {"op": "add", "path": f"{path}/scaleStrategy", "value": {"workersToDelete": list(change.workers_to_delete)}},
    ]
