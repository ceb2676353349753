from dataclasses import replace

import pytest

from cluster.cli import main
from cluster.controller_command import fit_replicas, take_over
from cluster.errors import StartError
from cluster.worker_groups import read_cluster
from tests.cluster.fakes import make_spec
from tests.cluster.test_worker_groups import make_cluster, make_group

_COMPLETE = ("--kubernetes-cluster", "shoal", "--address", "head:6379")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "kubernetes_cluster is not set"),
        (("--kubernetes-cluster", "shoal"), 2, "address is not set"),
        ((*_COMPLETE, "--device", "cuda"), 2, "kubernetes_gpus_per_pod is 0"),
        (_COMPLETE, 1, "would be unencrypted"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_asked(
    arguments: tuple[str, ...], code: int, said: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["controller", *arguments]) == code
    assert said in capsys.readouterr().err


def test_without_a_way_to_the_api_the_remedy_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path_factory.mktemp("none") / "kubeconfig"))
    assert main(["controller", *_COMPLETE, "--insecure-cluster-network"]) == 1
    assert "set KUBECONFIG" in capsys.readouterr().err


def test_a_cluster_that_is_cut_otherwise_is_not_taken_over():
    spec = make_spec()
    assert take_over(None, spec) is spec
    assert take_over(b"of another version", spec) is spec
    more = make_spec(num_replicas=3, num_routers=2)
    assert take_over(spec.to_json(), more) == more
    with pytest.raises(StartError, match="another release"):
        take_over(replace(spec, groups=spec.groups[:1]).to_json(), spec)


def test_what_serves_goes_on_until_it_is_upgraded_to_what_the_settings_name():
    before = replace(make_spec(), checkpoint="/models/a", weights_version=2, router_ids=("r1",))
    settings = replace(make_spec(num_routers=2), checkpoint="/models/b", expert_threads=7)
    serving = take_over(before.to_json(), settings)
    assert (serving.checkpoint, serving.weights_version, serving.expert_threads) == ("/models/a", 2, 7)
    assert serving.router_ids == ("r1", "r0")


def test_each_group_begins_within_the_bounds_of_its_worker_group():
    groups = [
        make_group("g0", "{}", minReplicas=2, maxReplicas=3),
        make_group("g1", "{}", minReplicas=0, maxReplicas=5),
    ]
    spec = fit_replicas(make_spec(num_replicas=1), read_cluster(make_cluster(*groups)))
    assert [group.num_replicas for group in spec.groups] == [2, 1]
