"""The few calls that we make to the Kubernetes API, each with a deadline, its errors translated.

Objects go in and out as plain JSON values: the client's models reject what a newer or older API server sends.

What the service account must be allowed, in its own namespace (the chart's Role; everything else is refused to it):
    rayclusters.ray.io           get, patch (of the one RayCluster), list, watch
    pods                         list, watch
    leases.coordination.k8s.io   create, and get, update (of the one Lease)
    events                       create
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import urllib3

from cluster.errors import (
    ApiConflict,
    ApiForbidden,
    ApiGone,
    ApiNotFound,
    ApiUnavailable,
    KubernetesError,
    StartError,
)
from cluster.worker_groups import CLUSTER_LABEL

_RAY = ("ray.io", "v1")
_LEASES = ("coordination.k8s.io", "v1")
# (connect, read) in seconds.
_CALL_TIMEOUT_S = (3.0, 10.0)
# With a watch that ends by itself, a peer that vanished is noticed by the read timeout.
WATCH_S = 30
_WATCH_TIMEOUT_S = (3.0, WATCH_S + 5.0)
_COMPONENT = "shoal-controller"


class KubernetesApi:
    """One namespace, one RayCluster. Thread-safe, as the client underneath is. Raises only KubernetesError."""

    def __init__(self, client: Any, namespace: str, cluster_name: str) -> None:
        """client: a kubernetes.client.ApiClient."""
        from kubernetes.client import CoreV1Api, CustomObjectsApi

        self.namespace = namespace
        self.cluster_name = cluster_name
        self._custom = CustomObjectsApi(client)
        self._core = CoreV1Api(client)

    def fetch_cluster(self) -> dict[str, Any]:
        return self._call(
            "get rayclusters",
            self._custom.get_namespaced_custom_object,
            *self._ray_cluster,
        )

    def patch_cluster(self, operations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A JSON patch: all of its operations happen, tests included, or none.

        Raises ApiConflict when a test fails. The content type must be said: by default the client sends a list as a
        merge patch, which replaces all worker groups.
        """
        return self._call(
            "patch rayclusters",
            self._custom.patch_namespaced_custom_object,
            *self._ray_cluster,
            [dict(operation) for operation in operations],
            _content_type="application/json-patch+json",
        )

    def list_cluster(self) -> dict[str, Any]:
        """A list of the one RayCluster, with the version to watch from."""
        return self._call(
            "list rayclusters",
            self._custom.list_namespaced_custom_object,
            *_RAY,
            self.namespace,
            "rayclusters",
            field_selector=f"metadata.name={self.cluster_name}",
        )

    def list_pods(self) -> dict[str, Any]:
        """The pods of the RayCluster, with the version to watch from."""
        return self._call(
            "list pods", self._core.list_namespaced_pod, self.namespace, label_selector=self._pod_selector
        )

    @contextlib.contextmanager
    def watch_cluster(self, resource_version: str) -> Iterator[Iterator[dict[str, Any]]]:
        """Events {"type", "object"} for at most WATCH_S. Raises ApiGone, also while iterating."""
        with self._watch(
            "watch rayclusters",
            self._custom.list_namespaced_custom_object,
            *_RAY,
            self.namespace,
            "rayclusters",
            field_selector=f"metadata.name={self.cluster_name}",
            resource_version=resource_version,
        ) as events:
            yield events

    @contextlib.contextmanager
    def watch_pods(self, resource_version: str) -> Iterator[Iterator[dict[str, Any]]]:
        """As watch_cluster."""
        with self._watch(
            "watch pods",
            self._core.list_namespaced_pod,
            self.namespace,
            label_selector=self._pod_selector,
            resource_version=resource_version,
        ) as events:
            yield events

    def fetch_lease(self, name: str) -> dict[str, Any]:
        return self._call(
            "get leases", self._custom.get_namespaced_custom_object, *_LEASES, self.namespace, "leases", name
        )

    def create_lease(self, name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
        """Raises ApiConflict if there is one."""
        body = {"apiVersion": "/".join(_LEASES), "kind": "Lease", "metadata": {"name": name}, "spec": dict(spec)}
        return self._call(
            "create leases", self._custom.create_namespaced_custom_object, *_LEASES, self.namespace, "leases", body
        )

    def replace_lease(self, lease: Mapping[str, Any]) -> dict[str, Any]:
        """Raises ApiConflict if it has changed since it was read."""
        return self._call(
            "update leases",
            self._custom.replace_namespaced_custom_object,
            *_LEASES,
            self.namespace,
            "leases",
            lease["metadata"]["name"],
            dict(lease),
        )

    def create_event(self, involved: Mapping[str, str], reason: str, message: str, *, warning: bool = False) -> None:
        """A core/v1 Event about `involved` (apiVersion, kind, name, uid). reason: CamelCase, for machines."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": f"{involved['name']}."},
            "involvedObject": {**involved, "namespace": self.namespace},
            "reason": reason,
            "message": message,
            "type": "Warning" if warning else "Normal",
            "source": {"component": _COMPONENT},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        self._call("create events", self._core.create_namespaced_event, self.namespace, body)

    @property
    def _ray_cluster(self) -> tuple[str, str, str, str, str]:
        return (*_RAY, self.namespace, "rayclusters", self.cluster_name)

    @property
    def _pod_selector(self) -> str:
        return f"{CLUSTER_LABEL}={self.cluster_name}"

    def _call(self, what: str, method: Any, *args: Any, **options: Any) -> Any:
        with _translate(what):
            response = method(*args, **options, _preload_content=False, _request_timeout=_CALL_TIMEOUT_S)
            try:
                _check_status(response)
                return json.loads(response.data)
            finally:
                response.release_conn()

    @contextlib.contextmanager
    def _watch(self, what: str, method: Any, *args: Any, **options: Any) -> Iterator[Iterator[dict[str, Any]]]:
        with _translate(what):
            response = method(
                *args,
                **options,
                watch=True,
                timeout_seconds=WATCH_S,
                allow_watch_bookmarks=True,
                _preload_content=False,
                _request_timeout=_WATCH_TIMEOUT_S,
            )
            try:
                _check_status(response)
                yield _read_events(response)
            finally:
                # Not returned to the pool: what is left unread would be the next call's answer.
                response.close()


def connect(namespace: str, cluster_name: str) -> KubernetesApi:
    """See make_client(). Raises StartError."""
    return KubernetesApi(make_client(), namespace, cluster_name)


def make_client() -> Any:
    """A kubernetes.client.ApiClient, by the pod's own service account, else by the kubeconfig of KUBECONFIG.

    The token of a service account changes every hour or so; the client reads it again. Raises StartError.
    """
    from kubernetes import client, config

    configuration = client.Configuration()
    try:
        if "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config(client_configuration=configuration)
        else:
            config.load_kube_config(client_configuration=configuration)
    except (config.ConfigException, OSError) as error:
        raise StartError(
            f"no way to the Kubernetes API: {error}; run in a pod with a service account token, or set KUBECONFIG"
        ) from error
    # Our own loops try again, and know what a repetition means.
    configuration.retries = 0
    return client.ApiClient(configuration)


def _check_status(response: Any) -> None:
    """Without preloading, the client raises nothing."""
    if 200 <= response.status <= 299:
        return
    from kubernetes.client.exceptions import ApiException

    raise ApiException(http_resp=response)


def _read_events(response: Any) -> Iterator[dict[str, Any]]:
    """One JSON value per line. Ends when the server ends the watch; raises ApiGone as the stream's own ERROR event."""
    rest = b""
    for chunk in response.stream(amt=None, decode_content=False):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if not line.strip():
                continue
            event = json.loads(line)
            if event["type"] == "ERROR":
                status = event["object"]
                error_class = ApiGone if status.get("code") == 410 else ApiUnavailable
                raise error_class(f"the watch ended: {status.get('message') or status.get('reason')}")
            yield event


@contextlib.contextmanager
def _translate(what: str) -> Iterator[None]:
    from kubernetes.client.exceptions import ApiException

    try:
        yield
    except ApiException as error:
        raise _build_error(what, error) from error
    except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ApiUnavailable(f"{what}: the API server did not answer: {reason}") from error


def _build_error(what: str, error: Any) -> KubernetesError:
    """error: an ApiException."""
    status, message = error.status or 0, _read_message(error)
    if status == 403:
        return ApiForbidden(f"the service account may not {what}: add the verb to its Role ({message})")
    if status == 404:
        return ApiNotFound(f"{what}: {message}")
    # A JSON patch whose test fails is a 422 too, without a cause; a body that breaks the schema has some.
    if status == 409 or (status == 422 and not _read_causes(error)):
        return ApiConflict(f"{what}: {message}")
    if status == 410:
        return ApiGone(f"{what}: {message}")
    if status == 429 or status >= 500 or status == 0:
        return ApiUnavailable(f"{what}: the API server answered {status}: {message}")
    return KubernetesError(f"{what}: the API server answered {status}: {message}")


def _read_causes(error: Any) -> list[Any]:
    try:
        return json.loads(error.body)["details"].get("causes") or []
    except (ValueError, TypeError, KeyError, AttributeError):
        return []


def _read_message(error: Any) -> str:
    try:
        return " ".join(str(json.loads(error.body)["message"]).split())[:300]
    except (ValueError, TypeError, KeyError):
        return str(error.reason or "no reason given")
