from typing import Any

import pytest

from cluster.errors import BadRecord
from cluster.worker_groups import Template, find_problems, read_cluster, read_pod


def make_group(name: str, resources: str, **changes: Any) -> dict[str, Any]:
    return {
        "groupName": name,
        "replicas": 1,
        "minReplicas": 0,
        "maxReplicas": 3,
        "rayStartParams": {"resources": resources},
        "template": {
            "metadata": {"labels": {"shoal.dev/revision": "a"}},
            "spec": {"containers": [{"image": "shoal:1"}]},
        },
        **changes,
    }


def make_cluster(*groups: dict[str, Any], autoscaling: bool = False) -> dict[str, Any]:
    return {
        "metadata": {"name": "c", "uid": "u", "resourceVersion": "7"},
        "spec": {"enableInTreeAutoscaling": autoscaling, "workerGroupSpecs": list(groups)},
    }


ROUTERS = make_group("routers", '"{\\"shoal_router\\": 1}"')
G0 = make_group("g0", '"{\\"expert_group_g0\\": 1}"')
G1 = make_group("g1", '{"expert_group_g1": 1}')


def list_problems(*groups: dict[str, Any], scaling: Any = "controller", autoscaling: bool = False) -> list[str]:
    return find_problems(read_cluster(make_cluster(*groups, autoscaling=autoscaling)), ["g0", "g1"], scaling)


def test_a_cluster_as_the_chart_makes_it_has_no_problems():
    assert list_problems(ROUTERS, G0, G1) == []
    assert list_problems(ROUTERS, G0, G1, scaling="ray", autoscaling=True) == []


def test_resources_are_read_in_every_way_of_quoting():
    for text in ('"{\\"expert_group_g0\\": 1}"', "'{\"expert_group_g0\": 1}'", '{"expert_group_g0": 1}'):
        view = read_cluster(make_cluster(make_group("g0", text)))
        assert view.groups[0].resources == {"expert_group_g0"}


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ((ROUTERS, G0), "0 worker groups named 'g1'"),
        ((ROUTERS, G0, G1, G1), "2 worker groups named 'g1'"),
        ((G0, G1), "shoal_router"),
        ((ROUTERS, G0, {**G1, "maxReplicas": -1}), "no range"),
        ((ROUTERS, G0, {**G1, "minReplicas": 4}), "no range"),
        ((ROUTERS, G0, {**G1, "numOfHosts": 2}), "numOfHosts is 2"),
        ((ROUTERS, G0, {**G1, "rayStartParams": {}}), "it is by none"),
        ((ROUTERS, G0, make_group("g1", '{"expert_group_g0": 1, "expert_group_g1": 1}')), "it is by g0, g1"),
    ],
)
def test_what_the_crd_does_not_check_is_said(groups: tuple[dict[str, Any], ...], said: str):
    assert any(said in problem for problem in list_problems(*groups))


def test_the_two_ways_of_scaling_exclude_each_other():
    assert "would undo every change" in list_problems(ROUTERS, G0, G1, autoscaling=True)[0]
    assert "no pod would ever be added" in list_problems(ROUTERS, G0, G1, scaling="ray")[0]


def test_a_pod_without_address_or_labels_can_be_read():
    pod = read_pod({"metadata": {"name": "p"}, "spec": {"containers": [{}]}, "status": None})
    assert (pod.address, pod.group_name, pod.is_leaving, pod.template) == ("", "", False, Template("", ""))


def test_the_revision_decides_what_is_current_and_without_one_the_image():
    assert Template("a", "1").has_made(Template("mirror/a", "1"))
    assert not Template("a", "1").has_made(Template("a", "2"))
    assert Template("a", "").has_made(Template("a", ""))
    assert not Template("b", "").has_made(Template("a", ""))


def test_an_object_without_what_it_needs_is_refused():
    with pytest.raises(BadRecord):
        read_cluster({"metadata": {"name": "c"}})
    with pytest.raises(BadRecord):
        read_pod({"metadata": {"name": "p"}, "spec": {"containers": []}})
