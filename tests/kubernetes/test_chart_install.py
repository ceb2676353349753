"""The rendered chart and the doctor against a real API server (Kubernetes 1.20 with KubeRay's CRDs).

1.20 has no policy/v1, no endPort and no CRDs of others: kubernetes-validate judges those objects in test_chart.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client

from cluster.kubernetes_doctor import examine_kubernetes, load_values
from cluster.kubernetes_facts import fetch_facts
from tests.kubernetes.api_server import ApiServer
from tests.kubernetes.chart import EXAMPLES, NAMESPACE, render

TIMEOUT_S = 30.0
# API path and whether this API server knows the kind as the chart writes it.
PATHS = {
    "ServiceAccount": "/api/v1/namespaces/{}/serviceaccounts",
    "Secret": "/api/v1/namespaces/{}/secrets",
    "ConfigMap": "/api/v1/namespaces/{}/configmaps",
    "Service": "/api/v1/namespaces/{}/services",
    "PersistentVolumeClaim": "/api/v1/namespaces/{}/persistentvolumeclaims",
    "Role": "/apis/rbac.authorization.k8s.io/v1/namespaces/{}/roles",
    "RoleBinding": "/apis/rbac.authorization.k8s.io/v1/namespaces/{}/rolebindings",
    "Deployment": "/apis/apps/v1/namespaces/{}/deployments",
    "Job": "/apis/batch/v1/namespaces/{}/jobs",
    "Ingress": "/apis/networking.k8s.io/v1/namespaces/{}/ingresses",
    "NetworkPolicy": "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies",
}
UNKNOWN = {"PodDisruptionBudget", "Certificate", "PodMonitor", "ServiceMonitor"}
EVERYTHING = {
    "monitoring": {"podMonitor": True, "serviceMonitor": True},
    "ingress": {"enabled": True, "host": "llm.example.org", "tlsSecret": "ingress-tls"},
}


@pytest.fixture(scope="module")
def namespace(api_server: ApiServer) -> str:
    api_server.make_namespace(NAMESPACE)
    return NAMESPACE


def post(server: ApiServer, path: str, body: dict[str, Any], query: str) -> dict[str, Any]:
    """Raises client.ApiException if the API server refuses."""
    answer = client.CoreV1Api(server.admin).api_client.rest_client.request(
        "POST",
        f"{server.host}{path}{query}",
        headers={"Content-Type": "application/json", "Accept": "application/json"},
        body=body,
        _request_timeout=TIMEOUT_S,
    )
    return json.loads(answer.read() if answer.data is None else answer.data)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_api_server_accepts_an_installation(api_server: ApiServer, namespace: str, example: Path) -> None:
    rendered = render(EVERYTHING, example=example)
    accepted: set[str] = set()
    for item in rendered.objects:
        if item["kind"] in PATHS:
            post(api_server, PATHS[item["kind"]].format(namespace), item, "?dryRun=All")
            accepted.add(item["kind"])
    assert {item["kind"] for item in rendered.objects} - accepted - UNKNOWN == {"RayCluster"}

    # A custom resource is really created: what its CRD does not know would be dropped without a word.
    custom: Any = client.CustomObjectsApi(api_server.admin)
    where = ("ray.io", "v1", namespace, "rayclusters")
    (wanted,) = rendered.of_kind("RayCluster")
    try:
        stored = custom.create_namespaced_custom_object(*where, wanted, _request_timeout=TIMEOUT_S)
        assert stored["spec"] == with_defaults(wanted["spec"], stored["spec"])
    finally:
        custom.delete_namespaced_custom_object(*where, wanted["metadata"]["name"], _request_timeout=TIMEOUT_S)


def with_defaults(wanted: Any, stored: Any) -> Any:
    """wanted, with the keys that the API server added."""
    if isinstance(wanted, dict) and isinstance(stored, dict):
        merged = {key: with_defaults(value, stored.get(key)) for key, value in wanted.items()}
        return {**{key: value for key, value in stored.items() if key not in wanted}, **merged}
    if isinstance(wanted, list) and isinstance(stored, list) and len(wanted) == len(stored):
        return [with_defaults(*pair) for pair in zip(wanted, stored, strict=True)]
    return wanted


def test_the_doctor_reads_a_real_cluster(api_server: ApiServer, namespace: str) -> None:
    facts = fetch_facts(api_server.admin, namespace)
    assert not facts.unread
    assert facts.version == (1, 20)
    assert facts.crds is not None
    assert "rayclusters.ray.io" in facts.crds
    found = {
        finding.check: finding
        for finding in examine_kubernetes(
            facts, load_values(next(path for path in EXAMPLES if path.stem == "r1-mixed"))
        )
    }
    assert found["version"].level == "failure"
    assert found["kuberay crds"].level == "ok"
    assert found["kuberay operator"].level == "failure"
    assert found["rights"].level == "ok"
    assert found["nodes"].level == "failure"


def test_an_account_that_may_do_little_learns_what_it_may_not(api_server: ApiServer, namespace: str) -> None:
    rendered = render()
    account = [rendered.get(kind, "-controller") for kind in ("ServiceAccount", "Role", "RoleBinding")]
    token = api_server.make_account(namespace, account)
    facts = fetch_facts(api_server.make_client(token), namespace)
    assert facts.forbidden is not None
    assert "rayclusters.ray.io" in facts.forbidden
    assert "secrets" in facts.forbidden
    assert {"crds", "nodes", "secrets"} <= facts.unread.keys()
    assert all(reason.startswith("403") for reason in facts.unread.values())


def test_the_command_ends_with_1_where_something_is_to_be_mended(api_server: ApiServer) -> None:
    command = [sys.executable, "-m", "cluster.cli", "doctor", "--kubernetes", "--namespace", "default", "--json"]
    environment = {**os.environ, "KUBECONFIG": str(api_server.kubeconfig)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is False
    assert {finding["check"] for finding in report["findings"]} >= {"version", "kuberay crds", "rights", "storage"}
