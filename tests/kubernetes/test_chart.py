"""The Helm chart: what it renders, what it refuses, and that no container has more rights than it needs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from cluster.settings import ServeSettings
from tests.kubernetes.chart import CHART, EXAMPLES, HelmFailed, Rendered, render, run_helm

# Kinds of the Kubernetes API itself; the others are CRDs.
CUSTOM_KINDS = {"RayCluster", "Certificate", "PodMonitor", "ServiceMonitor", "PrometheusRule"}
KUBERNETES_VERSION = "1.30"
MONITORED = {"monitoring": {"podMonitor": True, "serviceMonitor": True}}

POOL = {"pool": "p", "count": 2, "minReplicas": 1, "maxReplicas": 2, "resources": {"requests": {"cpu": "1"}}}
ROUTERS = {"name": "routers", "replicas": 1, "resources": {"requests": {"cpu": "1"}}}


@pytest.fixture(scope="module", params=EXAMPLES, ids=lambda path: path.stem)
def example(request: pytest.FixtureRequest) -> Rendered:
    return render(MONITORED, example=request.param)


@pytest.fixture(scope="module")
def plain() -> Rendered:
    return render()


def worker_groups(rendered: Rendered) -> list[dict[str, Any]]:
    return rendered.get("RayCluster")["spec"]["workerGroupSpecs"]


def pod_specs(rendered: Rendered) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and spec of every pod template."""
    cluster = rendered.get("RayCluster")["spec"]
    yield "head", cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]
    for item in (*rendered.of_kind("Deployment"), *rendered.of_kind("Job")):
        yield item["metadata"]["name"], item["spec"]["template"]["spec"]


@pytest.mark.parametrize("path", [None, *EXAMPLES], ids=lambda path: path.stem if path else "defaults")
def test_helm_lint_finds_nothing(path: Path | None) -> None:
    run_helm("lint", "--strict", str(CHART), *(("-f", str(path)) if path else ()))


def test_core_kinds_are_valid(example: Rendered) -> None:
    core = [item for item in example.objects if item["kind"] not in CUSTOM_KINDS]
    assert {"Role", "NetworkPolicy", "PodDisruptionBudget", "Deployment", "Service"} <= {item["kind"] for item in core}
    for item in core:
        kubernetes_validate.validate(item, KUBERNETES_VERSION, strict=True)


def test_pod_templates_of_the_ray_cluster_are_valid_pods(example: Rendered) -> None:
    """The CRD prunes what it does not know, so a misspelt field of a pod would vanish without a word."""
    for name, spec in pod_specs(example):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
        kubernetes_validate.validate(pod, KUBERNETES_VERSION, strict=True)


def test_every_object_is_this_releases_and_named_by_it(example: Rendered) -> None:
    for item in example.objects:
        assert item["metadata"]["name"].startswith("test-shoal")
        assert item["metadata"]["labels"]["app.kubernetes.io/instance"] == "test"


def test_expert_groups_are_worker_groups_with_a_resource_of_their_own(example: Rendered) -> None:
    groups = [group for group in worker_groups(example) if group["groupName"].startswith("g")]
    assert [group["groupName"] for group in groups] == [f"g{index}" for index in range(example.settings["groups"])]
    for group in groups:
        # KubeRay passes the parameter to a shell, which takes the outer quotes away.
        assert json.loads(json.loads(group["rayStartParams"]["resources"])) == {f"expert_group_{group['groupName']}": 1}
        labels = group["template"]["metadata"]["labels"]
        assert labels["shoal.dev/expert-group"] == group["groupName"]
        assert 1 <= group["minReplicas"] == group["replicas"] <= group["maxReplicas"]


def test_routers_are_groups_of_their_own_and_the_head_computes_nothing(example: Rendered) -> None:
    routers = [group for group in worker_groups(example) if group["groupName"] == "routers"]
    assert sum(group["replicas"] for group in routers) == example.settings["routers"]
    head = example.get("RayCluster")["spec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == head["rayStartParams"]["num-gpus"] == "0"
    (container,) = head["template"]["spec"]["containers"]
    assert "nvidia.com/gpu" not in container["resources"]["limits"]


def test_pods_of_a_pool_ask_for_its_cards_and_nodes() -> None:
    rendered = render(example=CHART / "examples" / "r1-mixed.yaml")
    cards: dict[str, int] = {}
    for group in worker_groups(rendered):
        spec = group["template"]["spec"]
        resources = spec["containers"][0]["resources"]
        assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == "1"
        assert "cpu" not in resources["limits"]
        assert group["rayStartParams"]["num-gpus"] == "1"
        assert spec["runtimeClassName"] == "nvidia"
        if "expert_group" in group["rayStartParams"]["resources"]:
            cards[spec["nodeSelector"]["shoal.dev/card"]] = cards.get(spec["nodeSelector"]["shoal.dev/card"], 0) + 1
    assert cards == {"rtx-3090": 24, "rtx-5090": 8}
    assert rendered.settings["device"] == "cuda"
    assert rendered.settings["kubernetes_gpus_per_pod"] == 1


@pytest.mark.parametrize(("mode", "autoscales"), [("ray", True), ("controller", False)])
def test_either_ray_or_the_controller_scales(mode: str, autoscales: bool) -> None:
    rendered = render({"scaling": {"mode": mode}})
    cluster = rendered.get("RayCluster")["spec"]
    assert cluster["enableInTreeAutoscaling"] is autoscales
    assert ("autoscalerOptions" in cluster) is autoscales
    assert rendered.settings["kubernetes_scaling"] == mode
    for group in cluster["workerGroupSpecs"]:
        assert (group["template"]["spec"].get("restartPolicy") == "Never") is autoscales


def test_ray_asks_for_a_token_and_nothing_recreates_all_pods_at_once(example: Rendered) -> None:
    spec = example.get("RayCluster")["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert "upgradeStrategy" not in spec


def test_a_pod_waits_for_its_drain_before_it_ends(example: Rendered) -> None:
    for group in worker_groups(example):
        spec = group["template"]["spec"]
        command = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command[:3] == ["shoal", "leave", "--timeout"]
        waits_s = int(command[3])
        assert example.settings.get("drain_timeout_s", 120) <= waits_s
        assert waits_s + 60 <= spec["terminationGracePeriodSeconds"]


def test_containers_have_no_rights(example: Rendered) -> None:
    for name, spec in pod_specs(example):
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] > 0
        assert not {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & spec.keys()
        for container in (*spec["containers"], *spec.get("initContainers", ())):
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]


def test_only_the_controller_talks_to_kubernetes() -> None:
    for mode, allowed in (("controller", set()), ("ray", {"head"})):
        for name, spec in pod_specs(render({"scaling": {"mode": mode}})):
            may = name in allowed or name == "test-shoal-controller"
            assert spec["automountServiceAccountToken"] is may, name


def test_the_role_is_the_least_that_the_controller_needs(plain: Rendered) -> None:
    rules = plain.get("Role", "-controller")["rules"]
    granted = {
        (resource, verb, tuple(rule.get("resourceNames", ())))
        for rule in rules
        for resource, verb in itertools.product(rule["resources"], rule["verbs"])
    }
    cluster, lease = ("test-shoal",), ("test-shoal-controller",)
    assert granted == {
        ("rayclusters", "get", cluster), ("rayclusters", "patch", cluster), ("rayclusters", "list", ()),
        ("rayclusters", "watch", ()), ("pods", "list", ()), ("pods", "watch", ()),
        ("events", "create", ()), ("leases", "create", ()), ("leases", "get", lease), ("leases", "update", lease),
    }  # fmt: skip
    assert not plain.of_kind("ClusterRole")


def test_everything_is_probed(example: Rendered) -> None:
    for name, spec in pod_specs(example):
        if "fetch" in name:
            continue
        assert spec["containers"][0].keys() >= {"startupProbe", "readinessProbe", "livenessProbe"}, name


@pytest.mark.parametrize(("mode", "scheme"), [("certManager", "HTTPS"), ("insecure", "HTTP")])
def test_the_admin_api_is_probed_and_scraped_as_it_is_served(mode: str, scheme: str) -> None:
    rendered = render({"tls": {"mode": mode}, "monitoring": {"serviceMonitor": True}})
    container = rendered.get("Deployment", "-controller")["spec"]["template"]["spec"]["containers"][0]
    probes = [container[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert {probe["scheme"] for probe in probes} == {scheme}
    (endpoint,) = rendered.get("ServiceMonitor", "-controller")["spec"]["endpoints"]
    assert endpoint.get("scheme", "http") == scheme.lower()
    assert ("tlsConfig" in endpoint) == (scheme == "HTTPS")


def test_expert_pods_hear_routers_and_controllers_alone(plain: Rendered) -> None:
    assert plain.get("NetworkPolicy", "-deny")["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in plain.get("NetworkPolicy", "-deny")["spec"]
    (rule,) = plain.get("NetworkPolicy", "-experts")["spec"]["ingress"]
    (peer,) = rule["from"]
    components = {item["key"]: item["values"] for item in peer["podSelector"]["matchExpressions"]}
    assert components["app.kubernetes.io/component"] == ["router", "controller"]
    assert rule["ports"] == [{"port": 32768, "endPort": 60999, "protocol": "TCP"}]


def test_rays_ports_are_open_to_this_release_alone(plain: Rendered) -> None:
    """The job API executes what it is sent (CVE-2023-48022)."""
    ray_ports = {6379, 8265, 10001, 52365}
    for policy in plain.of_kind("NetworkPolicy"):
        for rule in policy["spec"].get("ingress", ()):
            opened = {port for item in rule["ports"] for port in ray_ports
                      if item["port"] <= port <= item.get("endPort", item["port"])}  # fmt: skip
            if opened:
                (peer,) = rule["from"]
                instance = {item["key"]: item["values"] for item in peer["podSelector"]["matchExpressions"]}
                assert instance["app.kubernetes.io/instance"] == ["test"]
                assert "namespaceSelector" not in peer


def test_budgets_count_pods_as_a_ray_cluster_has_no_scale(example: Rendered) -> None:
    experts = [group for group in worker_groups(example) if group["groupName"] != "routers"]
    budget = example.get("PodDisruptionBudget", "-experts")["spec"]
    assert budget["minAvailable"] == sum(group["minReplicas"] for group in experts) - 1
    assert "maxUnavailable" not in budget


@pytest.mark.parametrize(
    ("tls", "settings"),
    [
        ({"mode": "insecure"}, {"insecure_cluster_network": True}),
        ({"mode": "certManager"}, {"cluster_tls_dir": "/etc/shoal/tls"}),
        ({"mode": "secret", "existingSecret": "mine"}, {"cluster_tls_dir": "/etc/shoal/tls"}),
    ],
)
def test_the_network_is_encrypted_or_said_to_be_insecure(tls: dict[str, Any], settings: dict[str, Any]) -> None:
    rendered = render({"tls": tls})
    found = {key: rendered.settings[key] for key in ("insecure_cluster_network", "cluster_tls_dir")
             if key in rendered.settings}  # fmt: skip
    assert found == settings
    mounted = [
        any(mount["mountPath"] == "/etc/shoal/tls" for mount in spec["containers"][0]["volumeMounts"])
        for _, spec in pod_specs(rendered)
    ]
    assert all(mounted) if tls["mode"] != "insecure" else not any(mounted)


def test_a_claim_is_filled_by_a_job_and_read_by_pods_that_wait_for_it() -> None:
    rendered = render({"fetch": {"source": "s3://models/R1", "credentials": [{"name": "bucket"}]}})
    (job,) = rendered.of_kind("Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["args"] == ["fetch", "s3://models/R1", "/models/model", "--verify-digests"]
    assert container["envFrom"] == [{"secretRef": {"name": "bucket"}}]
    for name, spec in pod_specs(rendered):
        if name in ("head", "routers", "g0"):
            assert spec["initContainers"][0]["args"][:2] == ["fetch", "--wait"]
            models = [mount for mount in spec["containers"][0]["volumeMounts"] if mount["name"] == "models"]
            assert models[0]["readOnly"] is True


def test_another_source_is_another_job() -> None:
    names = {
        render({"fetch": {"source": source}}).of_kind("Job")[0]["metadata"]["name"]
        for source in ("s3://a/b", "s3://a/c")
    }
    assert len(names) == 2


def test_the_controller_takes_the_settings_file(example: Rendered) -> None:
    """It finds the checkpoint and the certificates only in its pod; everything else is checked as it will be there."""
    settings = ServeSettings(**example.settings)
    assert settings.groups == sum(group["groupName"].startswith("g") for group in worker_groups(example))
    assert settings.resolved_kubernetes_lease == "test-shoal-controller"
    assert settings.drain_timeout_s < min(
        spec["terminationGracePeriodSeconds"] for name, spec in pod_specs(example) if name.startswith("g")
    )


def test_what_rolls_expert_pods_changes_their_revision() -> None:
    def revision(values: dict[str, Any]) -> str:
        group = next(group for group in worker_groups(render(values)) if group["groupName"] == "g0")
        return group["template"]["metadata"]["labels"]["shoal.dev/revision"]

    base = revision({})
    assert revision({"image": {"tag": "2"}}) != base
    assert revision({"model": {"folder": "other"}}) != base
    assert revision({"controller": {"replicas": 3}, "settings": {"log_level": "debug"}}) == base


def test_scaling_by_load_bounds_every_group_by_its_pool() -> None:
    pools = [{**POOL, "maxReplicas": 3}, {**POOL, "pool": "q", "count": 1, "maxReplicas": 2}]
    rendered = render({"scaling": {"byLoad": True}, "expertGroups": pools})
    assert rendered.settings["autoscale"] == {
        "g0": {"min": 1, "max": 3}, "g1": {"min": 1, "max": 3}, "g2": {"min": 1, "max": 2}
    }  # fmt: skip


@pytest.mark.parametrize(("cpu", "threads"), [("8", 8), (4, 4), ("2500m", 2), ("250m", 1), ("1.5", 1)])
def test_threads_are_the_cores_that_pods_ask_for(cpu: str | float, threads: int) -> None:
    resources = {"requests": {"cpu": cpu, "memory": "1Gi"}}
    pools = [{**POOL, "resources": {"requests": {"cpu": "16"}}}, {**POOL, "resources": resources}]
    rendered = render({"expertGroups": pools, "routers": [{**ROUTERS, "resources": resources}]})
    assert (rendered.settings["expert_threads"], rendered.settings["router_threads"]) == (threads, threads)
    assert render({"expertGroups": pools, "settings": {"expert_threads": 3}}).settings["expert_threads"] == 3


def test_the_api_is_closed_with_keys_and_open_without() -> None:
    closed = render({"apiKeys": {"existingSecret": "keys"}})
    assert closed.settings["keys_file"] == "/etc/shoal/keys/keys.json"
    assert "auth" not in closed.settings
    for name, spec in pod_specs(closed):
        mounted = {mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
        assert ("/etc/shoal/keys" in mounted) is (name == "head")
    assert render().settings["auth"] is False


def test_a_head_that_is_lost_keeps_its_state_where_it_is_asked_for() -> None:
    wanted = {"enabled": True, "redisAddress": "redis.data:6379", "redisPasswordSecret": "pw"}
    spec = render({"gcsFaultTolerance": wanted}).get("RayCluster")["spec"]
    assert spec["gcsFaultToleranceOptions"] == {
        "backend": "redis",
        "redisAddress": "redis.data:6379",
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "pw", "key": "password"}}},
    }


def test_optional_objects_are_there_when_asked_for() -> None:
    rendered = render(
        {**MONITORED, "ingress": {"enabled": True, "host": "llm.example.org", "className": "nginx", "tlsSecret": "t"}}
    )
    (ingress,) = rendered.of_kind("Ingress")
    kubernetes_validate.validate(ingress, KUBERNETES_VERSION, strict=True)
    assert rendered.of_kind("PodMonitor")
    assert rendered.of_kind("ServiceMonitor")
    assert not render().of_kind("PodMonitor")


def _pool(**changes: Any) -> dict[str, Any]:
    return {"expertGroups": [{**POOL, **changes}]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replicas": 3}, "Additional property replicas is not allowed"),
        ({"image": {"repositry": "x"}}, "Additional property repositry is not allowed"),
        ({"image": {"pullPolicy": "Sometimes"}}, "image.pullPolicy must be one of"),
        ({"image": {"digest": "latest"}}, "image.digest: Does not match pattern"),
        ({"fullnameOverride": "Shoal"}, "fullnameOverride: Does not match pattern"),
        ({"rayVersion": 2.6}, "rayVersion: Invalid type. Expected: string"),
        ({"cache": {"type": "nfs"}}, "cache.type must be one of"),
        ({"cache": {"size": "800 GB"}}, "cache.size: Does not match pattern"),
        ({"cache": {"accessModes": ["ReadWriteOnce"]}}, "must be ReadWriteMany or ReadOnlyMany"),
        ({"cache": {"hostPath": "models"}}, "cache.hostPath: Does not match pattern"),
        ({"fetch": {"source": "/data/model"}}, "fetch.source: Does not match pattern"),
        ({"fetch": {"source": "s3://a/b", "sourceClaim": "c"}}, "fetch.source must be file:///source/FOLDER"),
        ({"fetch": {"source": "s3://a/b"}, "cache": {"type": "image"}}, "there is nowhere to fetch to"),
        ({"scaling": {"mode": "both"}}, "scaling.mode must be one of"),
        ({"expertGroups": []}, "expertGroups: Array must have at least 1 items"),
        (_pool(count=0), "expertGroups.0.count: Must be greater than or equal to 1"),
        (_pool(maxReplicas=-1), "expertGroups.0.maxReplicas: Must be greater than or equal to 1"),
        (_pool(minReplicas=3), "minReplicas 3 is above maxReplicas 2"),
        (_pool(gpus=2), "expertGroups.0.gpus: Must be less than or equal to 1"),
        (_pool(gpus=1), "all or none compute on cards"),
        (_pool(nodeSelector={"disk": True}), "nodeSelector.disk: Invalid type. Expected: string"),
        (_pool(resources={"requests": {"memory": "32 GB"}}), "memory: Does not match pattern"),
        ({"routers": [ROUTERS, ROUTERS]}, 'the name "routers" is there twice'),
        ({"routers": [{**ROUTERS, "name": "g0"}]}, "is that of an expert group"),
        ({"tls": {"mode": "none"}}, "tls.mode must be one of"),
        ({"tls": {"mode": "secret"}}, "tls.mode secret needs tls.existingSecret"),
        ({"tls": {"existingSecret": "mine"}}, "not used by tls.mode certManager"),
        ({"settings": {"groups": 8}}, "settings.groups is set by the chart, from expertGroups[].count"),
        ({"settings": {"drain_timeout_s": 900}}, "would be killed while they drain"),
        ({"service": {"port": 70000}}, "service.port: Must be less than or equal to 65535"),
        ({"ingress": {"enabled": True}}, "ingress.enabled needs ingress.host"),
        ({"gcsFaultTolerance": {"enabled": True}}, "needs gcsFaultTolerance.redisAddress"),
        ({"securityContext": {"runAsUser": 0}}, "securityContext.runAsUser: Must be greater than or equal to 1"),
        ({"networkPolicy": {"kubernetesApiCidr": "10.0.0.1"}}, "kubernetesApiCidr: Does not match pattern"),
        ({"nameOverride": "x" * 50}, "of which KubeRay leaves room for 40"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_with_a_message_that_names_them(values: dict[str, Any], message: str) -> None:
    with pytest.raises(HelmFailed) as refused:
        render(values)
    assert message in str(refused.value)


def test_every_value_is_documented_and_every_documented_one_is_known() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    text = (CHART / "values.yaml").read_text()
    values = yaml.safe_load(text)
    assert values.keys() == schema["properties"].keys() - {"global"}
    lines = text.splitlines()
    for key in values:
        line = lines[lines.index(next(line for line in lines if line.startswith(f"{key}:"))) - 1]
        value = values[key]
        assert line.startswith("#") or isinstance(value, dict), f"{key} is not documented"


def test_the_examples_say_what_they_are_for() -> None:
    assert {path.stem for path in EXAMPLES} == {"cpu-demo", "r1-32x24gb", "r1-16x48gb", "r1-mixed"}
    for path in EXAMPLES:
        assert path.read_text().startswith("# ")
    assert render(example=CHART / "examples" / "r1-32x24gb.yaml").settings["groups"] == 32
    assert render(example=CHART / "examples" / "r1-16x48gb.yaml").settings["groups"] == 16
