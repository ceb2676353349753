"""What a Kubernetes cluster has, as far as installing the chart depends on it: plain data, read once, with deadlines.

What may not be read is None, and the reason is kept: whoever asks may do less than the one who installs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import PreflightError

# (connect, read) in seconds.
_TIMEOUT_S = (5.0, 20.0)
_CRD_GROUP = ("apiextensions.k8s.io", "v1", "customresourcedefinitions")

# What `helm install` creates in the namespace: API group, resource.
INSTALLED = (
    ("ray.io", "rayclusters"),
    ("apps", "deployments"),
    ("batch", "jobs"),
    ("", "services"),
    ("", "configmaps"),
    ("", "secrets"),
    ("", "serviceaccounts"),
    ("", "persistentvolumeclaims"),
    ("rbac.authorization.k8s.io", "roles"),
    ("rbac.authorization.k8s.io", "rolebindings"),
    ("networking.k8s.io", "networkpolicies"),
    ("policy", "poddisruptionbudgets"),
)


@dataclass(frozen=True, slots=True)
class Node:
    """allocatable: of the kubelet, e.g. {"cpu": 7.9, "memory": 3.2e10, "nvidia.com/gpu": 1.0}."""

    name: str
    labels: Mapping[str, str]
    taints: tuple[Mapping[str, str], ...]
    is_schedulable: bool
    allocatable: Mapping[str, float]


@dataclass(frozen=True)
class KubernetesFacts:
    """None for what could not be read; unread says why, by field. forbidden: what INSTALLED names and one may not
    create. claims: name to phase."""

    version: tuple[int, int] | None = None
    crds: Mapping[str, Mapping[str, Any]] | None = None
    operator_images: tuple[str, ...] | None = None
    nodes: tuple[Node, ...] | None = None
    # Name to whether it is the default.
    storage_classes: Mapping[str, bool] | None = None
    claims: Mapping[str, str] | None = None
    secrets: Mapping[str, frozenset[str]] | None = None
    forbidden: tuple[str, ...] | None = None
    unread: Mapping[str, str] = field(default_factory=dict[str, str])


def fetch_facts(api_client: Any, namespace: str) -> KubernetesFacts:
    """Raises PreflightError if the API server does not answer at all."""
    from kubernetes import client

    # Typed loosely: with _preload_content=False the client gives the response itself, which its types do not say.
    core: Any = client.CoreV1Api(api_client)
    custom: Any = client.CustomObjectsApi(api_client)
    versions: Any = client.VersionApi(api_client)
    found: dict[str, Any] = {}
    unread: dict[str, str] = {}

    def read(name: str, fetch: Callable[[], Any]) -> None:
        try:
            found[name] = fetch()
        except client.ApiException as error:
            unread[name] = f"{error.status} {error.reason}"

    def list_core(method: Callable[..., Any], *arguments: str) -> list[dict[str, Any]]:
        answer = method(*arguments, _preload_content=False, _request_timeout=_TIMEOUT_S)
        return json.loads(answer.data)["items"]

    def list_custom(group: str, version: str, plural: str) -> list[dict[str, Any]]:
        return custom.list_cluster_custom_object(group, version, plural, _request_timeout=_TIMEOUT_S)["items"]

    try:
        code = versions.get_code(_preload_content=False, _request_timeout=_TIMEOUT_S)
        found["version"] = parse_version(json.loads(code.data))
    except client.ApiException as error:
        unread["version"] = f"{error.status} {error.reason}"
    except Exception as error:
        # Of urllib3, by whatever name: no route, no name, no certificate.
        raise PreflightError(f"the Kubernetes API does not answer: {' '.join(str(error).split())[:300]}") from error
    read("crds", lambda: {item["metadata"]["name"]: item for item in list_custom(*_CRD_GROUP)})
    read("operator_images", lambda: find_operators(list_custom("apps", "v1", "deployments")))
    read("nodes", lambda: tuple(map(build_node, list_core(core.list_node))))
    read("storage_classes", lambda: dict(map(_read_class, list_custom("storage.k8s.io", "v1", "storageclasses"))))
    read(
        "claims",
        lambda: {
            item["metadata"]["name"]: item.get("status", {}).get("phase", "Pending")
            for item in list_core(core.list_namespaced_persistent_volume_claim, namespace)
        },
    )
    read(
        "secrets",
        lambda: {
            item["metadata"]["name"]: frozenset(item.get("data") or {})
            for item in list_core(core.list_namespaced_secret, namespace)
        },
    )
    read("forbidden", lambda: tuple(item for item in INSTALLED_NAMES if not _may_create(custom, namespace, item)))
    return KubernetesFacts(**found, unread=unread)


INSTALLED_NAMES = tuple(f"{resource}.{group}".rstrip(".") for group, resource in INSTALLED)


def parse_version(code: Mapping[str, Any]) -> tuple[int, int]:
    """(1, 30) of what /version answers; providers write minors such as "30+"."""
    return int(code["major"]), int("".join(filter(str.isdigit, code["minor"])) or 0)


def find_operators(deployments: list[dict[str, Any]]) -> tuple[str, ...]:
    """Images of KubeRay's operator, wherever it was installed."""
    return tuple(
        container["image"]
        for item in deployments
        for container in item["spec"]["template"]["spec"]["containers"]
        if "kuberay" in container["image"] and "operator" in container["image"]
    )


def build_node(item: Mapping[str, Any]) -> Node:
    from kubernetes.utils.quantity import parse_quantity

    spec, status = item.get("spec", {}), item.get("status", {})
    is_ready = any(
        condition["type"] == "Ready" and condition["status"] == "True" for condition in status.get("conditions") or ()
    )
    return Node(
        name=item["metadata"]["name"],
        labels=item["metadata"].get("labels") or {},
        taints=tuple(spec.get("taints") or ()),
        is_schedulable=is_ready and not spec.get("unschedulable", False),
        allocatable={name: float(parse_quantity(value)) for name, value in (status.get("allocatable") or {}).items()},
    )


def _read_class(item: Mapping[str, Any]) -> tuple[str, bool]:
    annotations = item["metadata"].get("annotations") or {}
    return item["metadata"]["name"], annotations.get("storageclass.kubernetes.io/is-default-class") == "true"


def _may_create(custom: Any, namespace: str, name: str) -> bool:
    resource, _, group = name.partition(".")
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {
            "resourceAttributes": {"namespace": namespace, "verb": "create", "group": group, "resource": resource}
        },
    }
    answer = custom.create_cluster_custom_object(
        "authorization.k8s.io", "v1", "selfsubjectaccessreviews", review, _request_timeout=_TIMEOUT_S
    )
    return bool(answer.get("status", {}).get("allowed"))
