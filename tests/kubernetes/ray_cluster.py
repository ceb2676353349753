"""A RayCluster as the chart renders it, small, and the operator that KubeRay would be, played on a real API server.

The operator does what KubeRay 1.7 does without its autoscaler (its source: ray-operator/controllers/ray/
raycluster_controller.go): delete the pods that are named, then make or delete pods until there are `replicas`, the
first of the list first. It never clears names, and never drains.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kubernetes import client
from kubernetes.client.exceptions import ApiException

from tests.kubernetes.api_server import CoreApi

NAME = "shoal"
RAY = ("ray.io", "v1")


def build_ray_cluster(
    groups: Mapping[str, int], *, autoscaling: bool = False, image: str = "shoal:1"
) -> dict[str, Any]:
    """groups: replicas by name; the routers' group comes on top. A new RayCluster body."""
    resources = {"routers": "shoal_router"} | {name: f"expert_group_{name}" for name in groups}
    return {
        "apiVersion": "/".join(RAY),
        "kind": "RayCluster",
        "metadata": {"name": NAME},
        "spec": {
            "enableInTreeAutoscaling": autoscaling,
            "headGroupSpec": {"rayStartParams": {}, "template": _build_template(image)},
            "workerGroupSpecs": [
                {
                    "groupName": name,
                    "replicas": count,
                    "minReplicas": 0,
                    "maxReplicas": 5,
                    "rayStartParams": {"resources": json.dumps(json.dumps({resources[name]: 1}))},
                    "template": _build_template(image),
                }
                for name, count in {"routers": 1, **groups}.items()
            ],
        },
    }


def _build_template(image: str) -> dict[str, Any]:
    return {"spec": {"containers": [{"name": "ray", "image": image}]}}


def list_event_messages(api_client: client.ApiClient, namespace: str) -> list[str]:
    answer = CoreApi(api_client).list_namespaced_event(namespace, _preload_content=False)
    return [event.get("message") or "" for event in json.loads(answer.data)["items"]]


class RayClusterObject:
    """The object on the server, as somebody with every right reads and edits it."""

    def __init__(self, api_client: client.ApiClient, namespace: str) -> None:
        self._api = client.CustomObjectsApi(api_client)
        self._where = (*RAY, namespace, "rayclusters")

    def create(self, document: dict[str, Any]) -> None:
        self._api.create_namespaced_custom_object(*self._where, document)

    def delete(self) -> None:
        self._api.delete_namespaced_custom_object(*self._where, NAME)

    def read(self) -> dict[str, Any]:
        document = self._api.get_namespaced_custom_object(*self._where, NAME, _request_timeout=10)
        assert isinstance(document, dict)
        return document

    def read_groups(self) -> dict[str, dict[str, Any]]:
        return {group["groupName"]: group for group in self.read()["spec"]["workerGroupSpecs"]}

    def edit(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Read, change, write until nobody was faster."""
        while True:
            document = self.read()
            change(document)
            try:
                self._api.replace_namespaced_custom_object(*self._where, NAME, document)
                return
            except ApiException as error:
                if error.status != 409:
                    raise

    def set_replicas(self, group_name: str, count: int) -> None:
        def change(document: dict[str, Any]) -> None:
            for group in document["spec"]["workerGroupSpecs"]:
                if group["groupName"] == group_name:
                    group["replicas"] = count

        self.edit(change)


class PlayedOperator:
    """A thread that makes pods of the worker groups and deletes them; a context manager.

    It is the kubelet too: a new pod runs at once, under an address of its own, and a deleted one stays until `may_end`
    says so.
    """

    def __init__(
        self,
        api_client: client.ApiClient,
        namespace: str,
        *,
        on_start: Callable[[str, str, str], None] = lambda group_name, pod_name, address: None,
        on_look: Callable[[], None] = lambda: None,
        may_end: Callable[[str], bool] = lambda pod_name: True,
        on_end: Callable[[str], None] = lambda pod_name: None,
        group_names: Sequence[str] | None = None,
        addresses: Sequence[str] = tuple(f"10.1.{index // 250}.{index % 250 + 1}" for index in range(1000)),
    ) -> None:
        """group_names: None for every group. addresses: one for each pod, in the order in which they are made."""
        self._core = CoreApi(api_client)
        self._cluster = RayClusterObject(api_client, namespace)
        self._namespace = namespace
        self._on_start, self._on_look, self._may_end, self._on_end = on_start, on_look, may_end, on_end
        self._group_names = group_names
        self._addresses = iter(addresses)
        self._numbers = itertools.count()
        self._stopped = threading.Event()
        self.deleted: list[str] = []
        # Deleted by the operator's own choice, because nobody named enough of them.
        self.chosen: list[str] = []
        self.errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, name="operator", daemon=True)

    def __enter__(self) -> PlayedOperator:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(30)
        assert not self._thread.is_alive()
        assert self.errors == [], self.errors

    def list_pods(self, group_name: str | None = None) -> list[dict[str, Any]]:
        selector = f"ray.io/cluster={NAME}" + (f",ray.io/group={group_name}" if group_name else "")
        answer = self._core.list_namespaced_pod(self._namespace, label_selector=selector, _preload_content=False)
        return sorted(json.loads(answer.data)["items"], key=lambda pod: pod["metadata"]["name"])

    def list_names(self, group_name: str) -> list[str]:
        """Of pods that are not being deleted."""
        return [
            pod["metadata"]["name"]
            for pod in self.list_pods(group_name)
            if not pod["metadata"].get("deletionTimestamp")
        ]

    def delete_pod(self, pod_name: str) -> None:
        """With grace, as `kubectl drain` does."""
        with contextlib.suppress(ApiException):
            self._core.delete_namespaced_pod(
                pod_name, self._namespace, grace_period_seconds=600, _preload_content=False
            )

    def _run(self) -> None:
        while not self._stopped.wait(0.03):
            try:
                self._look()
            except ApiException as error:
                if error.status not in (404, 409, 500, 503):
                    self.errors.append(error)
            except OSError:
                continue
            except Exception as error:
                # The API server may be away; anything else would be a fault of this class.
                if "Max retries" not in str(error):
                    self.errors.append(error)

    def _look(self) -> None:
        self._on_look()
        pods = self.list_pods()
        for pod in pods:
            name = pod["metadata"]["name"]
            if pod["metadata"].get("deletionTimestamp") and self._may_end(name):
                self._core.delete_namespaced_pod(name, self._namespace, grace_period_seconds=0, _preload_content=False)
                self._on_end(name)
        for group in self._cluster.read()["spec"]["workerGroupSpecs"]:
            if self._group_names is None or group["groupName"] in self._group_names:
                own = [pod for pod in pods if pod["metadata"]["labels"]["ray.io/group"] == group["groupName"]]
                self._look_at(group, own)

    def _look_at(self, group: dict[str, Any], pods: list[dict[str, Any]]) -> None:
        named = (group.get("scaleStrategy") or {}).get("workersToDelete") or []
        alive = [pod["metadata"]["name"] for pod in pods if not pod["metadata"].get("deletionTimestamp")]
        for name in [name for name in alive if name in named]:
            self._remove(name)
            alive.remove(name)
        surplus = alive[: max(0, len(alive) - group["replicas"])]
        for name in surplus:
            self.chosen.append(name)
            self._remove(name)
        for _ in range(group["replicas"] - len(alive)):
            self._make(group)

    def _remove(self, name: str) -> None:
        self.deleted.append(name)
        self.delete_pod(name)

    def _make(self, group: dict[str, Any]) -> None:
        name, address = f"{group['groupName']}-pod-{next(self._numbers)}", next(self._addresses)
        labels = {"ray.io/cluster": NAME, "ray.io/group": group["groupName"]}
        labels |= (group["template"].get("metadata") or {}).get("labels") or {}
        body = {
            "metadata": {"name": name, "labels": labels},
            # On a node, a deleted pod waits for its kubelet.
            "spec": {**group["template"]["spec"], "nodeName": "a-node"},
        }
        self._core.create_namespaced_pod(self._namespace, body, _preload_content=False)
        status = {"status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]}}
        self._core.patch_namespaced_pod_status(name, self._namespace, status, _preload_content=False)
        self._on_start(group["groupName"], name, address)
