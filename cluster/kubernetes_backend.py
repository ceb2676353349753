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

import functools
import logging
import random
import threading
from collections import deque
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
from cluster.event_log import Event
from cluster.fleet import FleetLimits, FleetView, GroupDemand
from cluster.kubernetes_api import KubernetesApi
from cluster.kubernetes_watch import KubernetesWatch
from cluster.pod_plan import GroupChange, clamp, plan_change, plan_renewal, share_out
from cluster.pod_resources import ROUTER_RESOURCE
from cluster.worker_groups import (
    Pod,
    RayClusterView,
    Scaling,
    WorkerGroup,
    find_problems,
    read_cluster,
    read_pod,
)

logger = logging.getLogger(__name__)

MAX_TRIES = 5
_FIRST_RETRY_S = 0.05
# The controller's actions that become Events, with their reasons; states of processes do not.
_EVENT_REASONS = {
    "create": "Creating",
    "drain": "Draining",
    "remove": "Removing",
    "change": "GroupChanged",
    "restart": "RollingReplacement",
}
_MAX_EVENTS = 200
# A change that did not come through is looked at again after this, and everything now and then anyway.
_RECHECK_S = 1.0
_PERIODIC_S = 30.0


def check_ray_cluster(api: KubernetesApi, group_names: Sequence[str], scaling: Scaling) -> RayClusterView:
    """The RayCluster as it is. Raises StartError with everything that is wrong, or KubernetesError."""
    try:
        view = read_cluster(api.fetch_cluster())
        problems = find_problems(view, group_names, scaling)
    except BadRecord as error:
        raise StartError(f"RayCluster {api.namespace}/{api.cluster_name}: {error}") from error
    if problems:
        raise StartError(f"RayCluster {api.namespace}/{api.cluster_name}: {'; '.join(problems)}")
    return view


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
        self._router_demand: GroupDemand | None = None
        # Address of the router pod that is to be renewed now.
        self._renewed: frozenset[str] = frozenset()
        # (reason, message) of Events that are still to be written; the oldest go if the API server is away for long.
        self._events: deque[tuple[str, str]] = deque(maxlen=_MAX_EVENTS)
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
                if not pod.is_leaving
                and (template := templates.get(pod.group_name)) is not None
                and not template.has_made(pod.template)
            ),
        )

    def get_limits(self) -> FleetLimits | None:
        with self._lock:
            cluster = self._cluster
        if cluster is None:
            return None
        return FleetLimits(
            max_pods={group.name: group.max_replicas for group in cluster.groups},
            max_router_pods=sum(group.max_replicas for group in _list_router_groups(cluster)),
        )

    def set_demand(self, demand: Mapping[str, GroupDemand], routers: GroupDemand) -> None:
        with self._lock:
            if (demand, routers) == (self._demand, self._router_demand):
                return
            self._demand, self._router_demand = dict(demand), routers
        self._wake.set()

    def renew(self, address: str) -> None:
        """Only pods of groups that hold routers are renewed so: replicas are replaced before their pods go."""
        with self._lock:
            if address in self._renewed:
                return
            self._renewed = frozenset({address})
        self._wake.set()

    def tell(self, events: Sequence[Event]) -> None:
        for event in events:
            reason = "Upgrade" if event.object == "upgrade" else _EVENT_REASONS.get(event.action)
            if reason is not None:
                self._events.append((reason, f"{event.object}: {event.reason}"))
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
                self._events.append(("PodLeaving", f"pod {pod.name} of {pod.group_name} is being deleted"))
        self._wake.set()

    def _run(self) -> None:
        pause_s = _PERIODIC_S
        while not self._stopped.is_set():
            self._wake.wait(pause_s)
            self._wake.clear()
            try:
                pause_s = _PERIODIC_S if self._reconcile() else _RECHECK_S
                self._send_events()
            except Exception:
                logger.exception("a look at the worker groups failed")
                pause_s = _RECHECK_S

    def _send_events(self) -> None:
        with self._lock:
            cluster = self._cluster
        while cluster is not None and self._events:
            self._send_event(cluster, *self._events.popleft(), warning=False)

    def _reconcile(self) -> bool:
        """Bring every group to what is demanded. Returns False if something is left to do."""
        with self._lock:
            cluster, pods, demand, renewed = self._cluster, self._pods, self._demand, self._renewed
            routers = self._router_demand
        if self._scaling != "controller" or cluster is None or pods is None or demand is None or routers is None:
            return True
        demand = {**demand, **share_out(_list_router_groups(cluster), list(pods.values()), routers)}
        is_done = True
        for group in cluster.groups:
            own_pods = [pod for pod in pods.values() if pod.group_name == group.name]
            if (wanted := demand.get(group.name)) is None:
                continue
            plan = functools.partial(plan_change, pods=own_pods, demand=wanted)
            if ROUTER_RESOURCE in group.resources and plan(group) is None:
                plan = functools.partial(plan_renewal, pods=own_pods, addresses=renewed)
            if plan(group) is None:
                self._tell_limits(group, wanted)
                continue
            try:
                self._change_group(group.name, plan)
            except ClusterError as error:
                is_done = False
                self._tell(group.name, "ChangeFailed", str(error))
        return is_done

    def _change_group(self, name: str, plan: Callable[[WorkerGroup], GroupChange | None]) -> None:
        """Read, plan, patch, at most MAX_TRIES times. Raises KubernetesError."""
        pause_s = _FIRST_RETRY_S
        for attempt in range(MAX_TRIES):
            view = self._read_cluster()
            entry = view.find_group(name)
            if entry is None:
                raise ApiNotFound(f"the RayCluster has no single worker group {name!r}: it must have exactly one")
            index, group = entry
            change = plan(group)
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

    def _tell_limits(self, group: WorkerGroup, demand: GroupDemand | None) -> None:
        """Nothing is to be written: because all is well, or because the group may have no more pods."""
        if demand is not None and demand.num_pods > clamp(group, demand.num_pods):
            bounds = f"its range is {group.min_replicas} to {group.max_replicas}"
            self._tell(group.name, "AtLimit", f"{demand.num_pods} replicas of {group.name} need a pod, but {bounds}")
        else:
            self._told.pop(group.name, None)

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


def _list_router_groups(cluster: RayClusterView) -> list[WorkerGroup]:
    return [group for group in cluster.groups if ROUTER_RESOURCE in group.resources]


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
