"""The calls themselves, with the rights of the chart's Role on a real API server."""

from collections.abc import Callable
from typing import Any

import pytest
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from cluster.errors import ApiConflict, ApiForbidden, ApiGone, ApiNotFound, KubernetesError
from tests.kubernetes.api_server import CoordinationApi, CoreApi, RbacApi
from tests.kubernetes.conftest import Place
from tests.kubernetes.ray_cluster import NAME, RAY, RayClusterObject, build_ray_cluster


def test_a_guarded_patch_changes_one_group_only(place: Place):
    before = place.cluster.read()
    place.api.patch_cluster(build_patch(before, 2, "g1", 4))
    groups = place.cluster.read_groups()
    assert groups["g1"]["replicas"] == 4
    assert {name: group["replicas"] for name, group in groups.items() if name != "g1"} == {
        "routers": 1,
        "g0": 1,
        "g2": 1,
    }


def test_a_stale_version_and_a_shifted_group_are_conflicts(place: Place):
    before = place.cluster.read()
    place.cluster.set_replicas("g2", 3)
    with pytest.raises(ApiConflict):
        place.api.patch_cluster(build_patch(before, 2, "g1", 4))
    with pytest.raises(ApiConflict):
        place.api.patch_cluster(build_patch(place.cluster.read(), 2, "g0", 4))
    assert place.cluster.read_groups()["g1"]["replicas"] == 1


def test_a_value_that_breaks_the_schema_is_no_conflict(place: Place):
    document = place.cluster.read()
    operations = build_patch(document, 2, "g1", 4)
    with pytest.raises(KubernetesError) as caught:
        place.api.patch_cluster([*operations[:2], {**operations[2], "value": "four"}])
    assert type(caught.value) is KubernetesError


def test_a_watch_from_a_version_that_never_was_says_gone(place: Place):
    with pytest.raises(KubernetesError) as caught:
        with place.api.watch_cluster("1") as events:
            for _ in events:
                pass
    assert isinstance(caught.value, ApiGone)


def test_an_object_that_is_not_there_and_a_right_that_is_not_given_are_told_apart(place: Place):
    with pytest.raises(ApiNotFound):
        place.api.fetch_lease("shoal-controller")
    with pytest.raises(ApiForbidden, match="get leases"):
        place.api.fetch_lease("another")
    with pytest.raises(ApiForbidden, match="get rayclusters"):
        type(place.api)(place.server.make_client(place.token), place.namespace, "another").fetch_cluster()


# What the Role does not give: verb and object, and a call that needs it.
_FORBIDDEN: dict[str, Callable[[client.ApiClient, str], Any]] = {
    "create rayclusters": lambda api, where: client.CustomObjectsApi(api).create_namespaced_custom_object(
        *RAY, where, "rayclusters", build_ray_cluster({"g0": 1}) | {"metadata": {"name": "other"}}
    ),
    "delete rayclusters": lambda api, where: RayClusterObject(api, where).delete(),
    "update rayclusters": lambda api, where: client.CustomObjectsApi(api).replace_namespaced_custom_object(
        *RAY, where, "rayclusters", NAME, build_ray_cluster({"g0": 1})
    ),
    "patch rayclusters/status": lambda api, where: client.CustomObjectsApi(api).patch_namespaced_custom_object_status(
        *RAY, where, "rayclusters", NAME, {"status": {}}
    ),
    "create pods": lambda api, where: CoreApi(api).create_namespaced_pod(where, {"metadata": {"name": "p"}}),
    "patch pods": lambda api, where: CoreApi(api).patch_namespaced_pod("p", where, {}),
    "delete pods": lambda api, where: CoreApi(api).delete_namespaced_pod("p", where),
    "create pods/eviction": lambda api, where: CoreApi(api).create_namespaced_pod_eviction("p", where, {}),
    "get pods/exec": lambda api, where: CoreApi(api).connect_get_namespaced_pod_exec("p", where),
    "get pods/log": lambda api, where: CoreApi(api).read_namespaced_pod_log("p", where),
    "list secrets": lambda api, where: CoreApi(api).list_namespaced_secret(where),
    "get configmaps": lambda api, where: CoreApi(api).read_namespaced_config_map("c", where),
    "list events": lambda api, where: CoreApi(api).list_namespaced_event(where),
    "delete leases": lambda api, where: CoordinationApi(api).delete_namespaced_lease("shoal-controller", where),
    "update other leases": lambda api, where: CoordinationApi(api).replace_namespaced_lease(
        "another", where, {"metadata": {"name": "another"}}
    ),
    "list nodes": lambda api, _: CoreApi(api).list_node(),
    "create roles": lambda api, where: RbacApi(api).create_namespaced_role(
        where, {"metadata": {"name": "r"}, "rules": []}
    ),
    "list pods elsewhere": lambda api, _: CoreApi(api).list_namespaced_pod("default"),
}


def test_everything_else_is_forbidden(place: Place):
    api_client = place.server.make_client(place.token)
    allowed: list[str] = []
    for what, call in _FORBIDDEN.items():
        try:
            call(api_client, place.namespace)
        except ApiException as error:
            if error.status == 403:
                continue
            allowed.append(f"{what}: {error.status}")
        else:
            allowed.append(what)
    assert allowed == []


def build_patch(document: dict[str, Any], index: int, name: str, replicas: int) -> list[dict[str, Any]]:
    return [
        {"op": "test", "path": "/metadata/resourceVersion", "value": document["metadata"]["resourceVersion"]},
        {"op": "test", "path": f"/spec/workerGroupSpecs/{index}/groupName", "value": name},
        {"op": "add", "path": f"/spec/workerGroupSpecs/{index}/replicas", "value": replicas},
    ]
