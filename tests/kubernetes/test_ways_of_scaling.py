"""Ray's autoscaler or our patches: never both, said before anything is started."""

import pytest

from cluster.errors import ApiForbidden, ApiNotFound, StartError
from cluster.event_log import Event
from cluster.fleet import GroupDemand
from cluster.kubernetes_api import KubernetesApi
from cluster.kubernetes_backend import KubernetesBackend, check_ray_cluster
from tests.kubernetes.conftest import Place
from tests.kubernetes.ray_cluster import list_event_messages
from tests.ray.serve_process import wait_for

GROUPS = ["g0", "g1", "g2"]


def set_autoscaling(place: Place, value: bool) -> None:
    place.cluster.edit(lambda document: document["spec"].update(enableInTreeAutoscaling=value))


def test_each_way_is_refused_while_the_cluster_is_set_to_the_other(place: Place):
    check_ray_cluster(place.api, GROUPS, "controller")
    with pytest.raises(StartError, match="no pod would ever be added"):
        check_ray_cluster(place.api, GROUPS, "ray")
    set_autoscaling(place, True)
    check_ray_cluster(place.api, GROUPS, "ray")
    with pytest.raises(StartError, match="would undo every change"):
        check_ray_cluster(place.api, GROUPS, "controller")


def test_everything_that_is_wrong_is_said_at_once(place: Place):
    def spoil(document: dict) -> None:
        groups = document["spec"]["workerGroupSpecs"]
        groups[1]["maxReplicas"] = -1
        groups[2]["rayStartParams"] = {}

    place.cluster.edit(spoil)
    with pytest.raises(StartError, match=r"no range.*expert_group_g1.*0 worker groups named 'g3'"):
        check_ray_cluster(place.api, [*GROUPS, "g3"], "controller")


def test_a_cluster_that_is_not_there_and_a_right_that_is_missing_are_said(place: Place):
    admin = KubernetesApi(place.server.admin, place.namespace, "another")
    with pytest.raises(ApiNotFound):
        check_ray_cluster(admin, GROUPS, "ray")
    with pytest.raises(ApiForbidden, match="add the verb to its Role"):
        check_ray_cluster(place.server.make_api(place.token, place.namespace, "another"), GROUPS, "ray")


def test_with_ray_s_autoscaler_nothing_is_written_but_events(place: Place):
    set_autoscaling(place, True)
    version = place.cluster.read()["metadata"]["resourceVersion"]
    backend = KubernetesBackend(place.api, "ray", lambda: True)
    backend.start()
    try:
        backend.set_demand({"g0": GroupDemand(4, frozenset())}, GroupDemand(1, frozenset()))
        backend.tell([Event(1, 0.0, "group g0", "change", "from g0-0 to g0-0,g0-1")])
        wait_for(
            lambda: "group g0: from g0-0 to g0-0,g0-1" in list_event_messages(place.server.admin, place.namespace), 20
        )
        # The number was known before the Event was written.
        assert place.cluster.read()["metadata"]["resourceVersion"] == version
    finally:
        backend.stop()


def test_a_group_that_may_have_no_more_pods_is_said_once(place: Place):
    backend = KubernetesBackend(place.api, "controller", lambda: True)
    backend.start()
    try:
        backend.set_demand({"g0": GroupDemand(9, frozenset())}, GroupDemand(1, frozenset()))
        wait_for(lambda: place.cluster.read_groups()["g0"]["replicas"] == 5, 20)
        said = "9 replicas of g0 need a pod, but its range is 0 to 5"
        wait_for(lambda: said in list_event_messages(place.server.admin, place.namespace), 20)
        # Seen again and again, and nothing new.
        for number in range(3):
            place.cluster.edit(lambda document, text=str(number): document["metadata"].update(annotations={"n": text}))
    finally:
        backend.stop()
    assert list_event_messages(place.server.admin, place.namespace).count(said) == 1
