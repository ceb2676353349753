"""What the doctor says of a Kubernetes cluster: pure judgement of facts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import PreflightError
from cluster.findings import Finding
from cluster.kubernetes_doctor import ChartValues, examine_kubernetes, load_values
from cluster.kubernetes_facts import KubernetesFacts, Node, build_node, find_operators, parse_version

EXAMPLES = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "shoal" / "examples"
GIB = 2.0**30


def crd(*fields: str) -> dict[str, Any]:
    schema = {"properties": {"spec": {"properties": {name: {} for name in fields}}}}
    return {"spec": {"versions": [{"name": "v1", "served": True, "schema": {"openAPIV3Schema": schema}}]}}


def node(name: str = "n0", **changes: Any) -> Node:
    allocatable = {"cpu": 16.0, "memory": 64 * GIB, "nvidia.com/gpu": 1.0, "pods": 110.0}
    values = {"labels": {}, "taints": (), "is_schedulable": True, "allocatable": allocatable}
    return Node(name=name, **{**values, **changes})


GOOD = KubernetesFacts(
    version=(1, 30),
    crds={
        "rayclusters.ray.io": crd(
            "authOptions", "autoscalerOptions", "gcsFaultToleranceOptions", "workerGroupSpecs", "headGroupSpec"
        ),
        "certificates.cert-manager.io": {},
    },
    operator_images=("quay.io/kuberay/operator:v1.7.0",),
    nodes=(node(),),
    storage_classes={"nfs": True},
    claims={},
    secrets={},
    forbidden=(),
)


def judge(facts: KubernetesFacts, values: dict[str, Any] | None = None) -> dict[str, Finding]:
    """The worst finding of each check."""
    order = ("ok", "warning", "failure")
    parsed = None if values is None else ChartValues.model_validate(values)
    worst: dict[str, Finding] = {}
    for finding in examine_kubernetes(facts, parsed):
        if finding.check not in worst or order.index(finding.level) > order.index(worst[finding.check].level):
            worst[finding.check] = finding
    return worst


def test_a_good_cluster_has_nothing_to_mend() -> None:
    assert {finding.level for finding in judge(GOOD, {}).values()} == {"ok"}


@pytest.mark.parametrize(
    ("changes", "check", "message"),
    [
        ({"version": (1, 24)}, "version", "Kubernetes 1.24"),
        ({"crds": {"certificates.cert-manager.io": {}}}, "kuberay crds", "rayclusters.ray.io is not there"),
        ({"crds": {"rayclusters.ray.io": crd("workerGroupSpecs")}}, "kuberay crds", "does not know authOptions"),
        ({"crds": {"rayclusters.ray.io": {"spec": {"versions": [{"name": "v1alpha1", "served": True}]}}}},
         "kuberay crds", "serves v1alpha1 and no v1"),
        ({"operator_images": ()}, "kuberay operator", "nobody would make pods"),
        ({"forbidden": ("roles.rbac.authorization.k8s.io",)}, "rights", "may not create roles.rbac"),
        ({"storage_classes": {"local": False}}, "storage", "no storage class is the default"),
        ({"crds": {"rayclusters.ray.io": GOOD.crds["rayclusters.ray.io"]}} if GOOD.crds else {},
         "encryption", "cert-manager is not installed"),
    ],
)  # fmt: skip
def test_what_is_missing_is_a_failure_with_a_remedy(changes: dict[str, Any], check: str, message: str) -> None:
    finding = judge(replace(GOOD, **changes), {})[check]
    assert finding.level == "failure"
    assert message in finding.message
    assert finding.remedy


@pytest.mark.parametrize(
    "name", ["version", "crds", "operator_images", "nodes", "storage_classes", "forbidden", "claims", "secrets"]
)
def test_what_may_not_be_read_is_said_and_fails_nothing(name: str) -> None:
    values = {"cache": {"existingClaim": "models"}, "apiKeys": {"existingSecret": "keys"}}
    facts = replace(
        GOOD, claims={"models": "Bound"}, secrets={"keys": frozenset({"keys.json"})}, unread={name: "403 Forbidden"}
    )
    found = judge(replace(facts, **{name: None}), values if name in ("claims", "secrets") else {})
    warned = [finding for finding in found.values() if "403 Forbidden" in finding.message]
    assert warned
    assert {finding.level for finding in found.values()} <= {"ok", "warning"}


POOL = {"pool": "p", "count": 2, "gpus": 1, "resources": {"requests": {"memory": "24Gi", "cpu": "4"}}}
TAINT = {"key": "gpu", "value": "yes", "effect": "NoSchedule"}


@pytest.mark.parametrize(
    ("nodes", "pool", "level"),
    [
        ([node("a"), node("b")], {}, "ok"),
        ([node("a")], {}, "failure"),
        ([node("a"), node("b", is_schedulable=False)], {}, "failure"),
        ([node("a"), node("b")], {"nodeSelector": {"card": "a6000"}}, "failure"),
        ([node("a", labels={"card": "x"}), node("b", labels={"card": "x"})], {"nodeSelector": {"card": "x"}}, "ok"),
        ([node("a"), node("b", taints=(TAINT,))], {}, "failure"),
        ([node("a"), node("b", taints=(TAINT,))], {"tolerations": [{"key": "gpu", "operator": "Exists"}]}, "ok"),
        ([node("a"), node("b", taints=(TAINT,))], {"tolerations": [{"key": "gpu", "value": "no"}]}, "failure"),
        ([node("a"), node("b", taints=({**TAINT, "effect": "PreferNoSchedule"},))], {}, "ok"),
        ([node("a"), node("b")], {"resources": {"requests": {"memory": "100Gi"}}}, "failure"),
        ([node("a")], {"gpus": 0, "resources": {"requests": {"memory": "32Gi"}}}, "ok"),
    ],
)
def test_pods_have_to_fit_where_their_pool_wants_them(nodes: list[Node], pool: dict[str, Any], level: str) -> None:
    found = judge(replace(GOOD, nodes=tuple(nodes)), {"expertGroups": [{**POOL, **pool}]})
    assert found["nodes"].level == level


def test_pools_that_share_nodes_are_counted_together() -> None:
    pools = [{**POOL, "pool": "a"}, {**POOL, "pool": "b"}]
    found = judge(replace(GOOD, nodes=(node("a"), node("b"), node("c"))), {"expertGroups": pools})
    assert found["nodes"].level == "failure"
    assert found["nodes"].message == "a, b: 4 pods, room for 3 on 3 nodes"


def test_a_secret_has_to_have_its_keys() -> None:
    values = {"tls": {"mode": "secret", "existingSecret": "s"}}
    assert "there is no Secret s" in judge(GOOD, values)["secrets"].message
    half = replace(GOOD, secrets={"s": frozenset({"tls.crt", "tls.key"})})
    assert judge(half, values)["secrets"].message == "tls.existingSecret: the Secret s lacks ca.crt"
    whole = replace(GOOD, secrets={"s": frozenset({"tls.crt", "tls.key", "ca.crt"})})
    assert judge(whole, values)["secrets"].level == "ok"


def test_the_examples_are_read_as_values() -> None:
    for path in EXAMPLES.glob("*.yaml"):
        assert load_values(path).expertGroups
    assert sum(pool.num_pods for pool in load_values(EXAMPLES / "r1-mixed.yaml").expertGroups) == 32


@pytest.mark.parametrize("text", ["tls: {mode: both}", "- a list", "a: b: c"])
def test_values_that_are_none_are_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text(text)
    with pytest.raises(PreflightError, match=r"holds no values of the chart"):
        load_values(tmp_path / "values.yaml")


def test_objects_of_the_api_are_read_as_they_are() -> None:
    assert parse_version({"major": "1", "minor": "29+"}) == (1, 29)
    found = build_node(
        {
            "metadata": {"name": "n", "labels": {"a": "b"}},
            "spec": {"taints": [TAINT]},
            "status": {
                "conditions": [{"type": "Ready", "status": "True"}],
                "allocatable": {"cpu": "7910m", "memory": "31Gi", "nvidia.com/gpu": "2"},
            },
        }
    )
    assert found == Node("n", {"a": "b"}, (TAINT,), True, {"cpu": 7.91, "memory": 31 * GIB, "nvidia.com/gpu": 2.0})
    assert not build_node({"metadata": {"name": "n"}, "spec": {"unschedulable": True}}).is_schedulable
    container = {"image": "quay.io/kuberay/operator:v1.7.0"}
    deployment = {"spec": {"template": {"spec": {"containers": [container, {"image": "other/operator:1"}]}}}}
    assert find_operators([deployment]) == ("quay.io/kuberay/operator:v1.7.0",)
