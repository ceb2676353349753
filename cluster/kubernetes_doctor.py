"""`shoal doctor --kubernetes`: whether the chart can be installed here, judged from the facts and the chart's values.

Pure: cluster/kubernetes_facts.py reads the facts. Without values only what every installation needs is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.errors import PreflightError
from cluster.findings import Finding
from cluster.kubernetes_facts import KubernetesFacts, Node

# NetworkPolicy's endPort and PodDisruptionBudget policy/v1 are stable since then; Chart.yaml says the same.
OLDEST_VERSION = (1, 25)
RAY_CRD = "rayclusters.ray.io"
# Of KubeRay's CRD: what the chart sets and an older operator would prune without a word.
_RAY_FIELDS = ("authOptions", "autoscalerOptions", "gcsFaultToleranceOptions", "workerGroupSpecs")
_TLS_KEYS = frozenset({"tls.crt", "tls.key", "ca.crt"})


class _Part(BaseModel):
    # The chart's own schema refuses what it does not know; this reads what it looks at.
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Resources(_Part):
    requests: dict[str, str | int | float] = Field(default_factory=dict[str, str | int | float])


class _Pool(_Part):
    """A pool of routers or of expert groups. count: of groups; replicas, minReplicas: of routers, of each group."""

    name: str = ""
    pool: str = ""
    count: Annotated[int, Field(ge=1)] = 1
    replicas: Annotated[int, Field(ge=1)] = 1
    minReplicas: Annotated[int, Field(ge=1)] = 1
    gpus: Annotated[int, Field(ge=0)] = 0
    resources: _Resources = _Resources()
    nodeSelector: dict[str, str] = Field(default_factory=dict[str, str])
    tolerations: list[dict[str, Any]] = Field(default_factory=list[dict[str, Any]])

    @property
    def num_pods(self) -> int:
        return self.count * self.minReplicas * self.replicas


class _Cache(_Part):
    type: Literal["pvc", "hostPath", "image"] = "pvc"
    existingClaim: str = ""
    storageClass: str = ""


class _Tls(_Part):
    mode: Literal["secret", "certManager", "insecure"] = "certManager"
    existingSecret: str = ""
    apiSecret: str = ""


class _Monitoring(_Part):
    podMonitor: bool = False
    serviceMonitor: bool = False
    prometheusRule: bool = False


class _ApiKeys(_Part):
    existingSecret: str = ""


class ChartValues(_Part):
    """What the doctor looks at of the chart's values; defaults are the chart's."""

    cache: _Cache = _Cache()
    tls: _Tls = _Tls()
    apiKeys: _ApiKeys = _ApiKeys()
    monitoring: _Monitoring = _Monitoring()
    gpuResource: str = "nvidia.com/gpu"
    routers: list[_Pool] = Field(default_factory=list[_Pool])
    expertGroups: list[_Pool] = Field(default_factory=list[_Pool])


@dataclass(slots=True)
class _Demand:
    """Pods of pools that go to the same nodes."""

    names: list[str] = field(default_factory=list[str])
    num_pods: int = 0


def load_values(path: Path) -> ChartValues:
    """Raises PreflightError."""
    try:
        return ChartValues.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except OSError as error:
        raise PreflightError(f"cannot read the values {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValidationError) as error:
        reason = " ".join(str(error).split())[:300]
        raise PreflightError(f"{path} holds no values of the chart: {reason} (helm lint says more)") from None


def examine_kubernetes(facts: KubernetesFacts, values: ChartValues | None) -> list[Finding]:
    """In the order in which one would mend things."""
    wanted = values or ChartValues()
    findings = [*_check_version(facts), *_check_ray_crd(facts), *_check_operator(facts), *_check_rights(facts)]
    findings += [*_check_cards(facts, wanted.gpuResource)]
    if values is not None:
        findings += [*_check_nodes(facts, values), *_check_storage(facts, values.cache), *_check_tls(facts, values.tls)]
        findings += [*_check_monitoring(facts, values.monitoring), *_check_secrets(facts, values)]
    else:
        findings += [*_check_storage(facts, wanted.cache)]
    return findings


def _unread(check: str, facts: KubernetesFacts, name: str) -> Finding:
    reason = facts.unread.get(name, "not asked for")
    return Finding(check, "warning", f"could not be read: {reason}", "ask whoever may read it, or look yourself")


def _check_version(facts: KubernetesFacts) -> Iterator[Finding]:
    if facts.version is None:
        yield _unread("version", facts, "version")
        return
    found, oldest = (".".join(map(str, version)) for version in (facts.version, OLDEST_VERSION))
    if facts.version < OLDEST_VERSION:
        message = f"Kubernetes {found}: NetworkPolicy port ranges and policy/v1 need {oldest}"
        yield Finding("version", "failure", message, f"upgrade to {oldest} or newer")
    else:
        yield Finding("version", "ok", f"Kubernetes {found}")


def _check_ray_crd(facts: KubernetesFacts) -> Iterator[Finding]:
    if facts.crds is None:
        yield _unread("kuberay crds", facts, "crds")
        return
    crd = facts.crds.get(RAY_CRD)
    versions = {} if crd is None else {item["name"]: item for item in crd["spec"]["versions"] if item.get("served")}
    if "v1" not in versions:
        message = f"{RAY_CRD} is not there" if crd is None else f"{RAY_CRD} serves {', '.join(versions)} and no v1"
        yield Finding("kuberay crds", "failure", message, "helm install kuberay-operator kuberay/kuberay-operator")
        return
    known = versions["v1"].get("schema", {}).get("openAPIV3Schema", {}).get("properties", {}).get("spec", {})
    missing = [name for name in _RAY_FIELDS if name not in known.get("properties", {})]
    if missing:
        message = (
            f"{RAY_CRD} v1 does not know {', '.join(missing)}: what the chart says there would be dropped silently"
        )
        yield Finding("kuberay crds", "failure", message, "upgrade KubeRay's CRDs and operator to 1.5 or newer")
    else:
        yield Finding("kuberay crds", "ok", f"{RAY_CRD} v1")


def _check_operator(facts: KubernetesFacts) -> Iterator[Finding]:
    if facts.operator_images is None:
        yield _unread("kuberay operator", facts, "operator_images")
    elif not facts.operator_images:
        remedy = "helm install kuberay-operator kuberay/kuberay-operator"
        yield Finding("kuberay operator", "failure", "no deployment runs it: nobody would make pods", remedy)
    else:
        yield Finding("kuberay operator", "ok", ", ".join(facts.operator_images))


def _check_rights(facts: KubernetesFacts) -> Iterator[Finding]:
    if facts.forbidden is None:
        yield _unread("rights", facts, "forbidden")
    elif facts.forbidden:
        message = f"may not create {', '.join(facts.forbidden)} in this namespace"
        yield Finding("rights", "failure", message, "install with an account that is admin of the namespace")
    else:
        yield Finding("rights", "ok", "may create everything that the chart installs")


def _check_cards(facts: KubernetesFacts, resource: str) -> Iterator[Finding]:
    if facts.nodes is None:
        yield _unread("cards", facts, "nodes")
        return
    counts = [int(node.allocatable.get(resource, 0)) for node in facts.nodes if node.is_schedulable]
    if any(counts):
        yield Finding("cards", "ok", f"{sum(counts)} of {resource} on {sum(map(bool, counts))} nodes")
    else:
        message = f"no node offers {resource}: only pools with gpus: 0 can run"
        yield Finding("cards", "warning", message, "install the vendor's device plugin, if there are cards")


def _check_nodes(facts: KubernetesFacts, values: ChartValues) -> Iterator[Finding]:
    """Whether the pods of the pools would fit, if nothing else ran on their nodes."""
    if facts.nodes is None:
        yield _unread("nodes", facts, "nodes")
        return
    demands: dict[frozenset[str], _Demand] = {}
    capacity: dict[frozenset[str], int] = {}
    for pool in (*values.routers, *values.expertGroups):
        room = {node.name: _count_pods(node, pool, values.gpuResource) for node in facts.nodes}
        names = frozenset(name for name, count in room.items() if count)
        demand = demands.setdefault(names, _Demand())
        demand.names.append(pool.pool or pool.name or "pool")
        demand.num_pods += pool.num_pods
        # Pools on the same nodes may ask for different amounts: the larger one decides.
        capacity[names] = min(capacity.get(names, sum(room.values())), sum(room.values()))
    for names, demand in demands.items():
        message = f"{', '.join(demand.names)}: {demand.num_pods} pods, room for {capacity[names]} on {len(names)} nodes"
        if capacity[names] < demand.num_pods:
            remedy = "look at nodeSelector, tolerations, gpus and requests of the pool, or add nodes"
            yield Finding("nodes", "failure", message, remedy)
        else:
            yield Finding("nodes", "ok", message)


def _count_pods(node: Node, pool: _Pool, gpu_resource: str) -> int:
    from kubernetes.utils.quantity import parse_quantity

    if not node.is_schedulable or any(node.labels.get(key) != value for key, value in pool.nodeSelector.items()):
        return 0
    for taint in node.taints:
        if taint.get("effect") != "PreferNoSchedule" and not any(_tolerates(item, taint) for item in pool.tolerations):
            return 0
    wanted = {name: float(parse_quantity(value)) for name, value in pool.resources.requests.items()}
    if pool.gpus:
        wanted[gpu_resource] = float(pool.gpus)
    # A pod that asks for nothing would fit any number of times.
    return min(
        (int(node.allocatable.get(name, 0) // amount) for name, amount in wanted.items() if amount > 0),
        default=int(node.allocatable.get("pods", 0)),
    )


def _tolerates(toleration: Mapping[str, Any], taint: Mapping[str, str]) -> bool:
    if toleration.get("effect") not in (None, "", taint.get("effect")):
        return False
    if toleration.get("operator", "Equal") == "Exists":
        return toleration.get("key") in (None, "", taint["key"])
    return toleration.get("key") == taint["key"] and toleration.get("value", "") == taint.get("value", "")


def _check_storage(facts: KubernetesFacts, cache: _Cache) -> Iterator[Finding]:
    if cache.type != "pvc":
        yield Finding("storage", "ok", f"cache.type {cache.type} needs no claim")
    elif cache.existingClaim:
        if facts.claims is None:
            yield _unread("storage", facts, "claims")
        elif cache.existingClaim not in facts.claims:
            yield Finding(
                "storage", "failure", f"there is no claim {cache.existingClaim}", "create it, or name another"
            )
        else:
            yield Finding("storage", "ok", f"claim {cache.existingClaim}: {facts.claims[cache.existingClaim]}")
    elif facts.storage_classes is None:
        yield _unread("storage", facts, "storage_classes")
    else:
        yield _judge_class(facts.storage_classes, cache.storageClass)


def _judge_class(classes: Mapping[str, bool], wanted: str) -> Finding:
    remedy = "set cache.storageClass to one for ReadWriteMany, cache.existingClaim, or cache.type hostPath"
    if wanted and wanted not in classes:
        there = ", ".join(classes) or "none"
        return Finding("storage", "failure", f"there is no storage class {wanted}; there are: {there}", remedy)
    defaults = [name for name, is_default in classes.items() if is_default]
    if not wanted and not defaults:
        return Finding("storage", "failure", "no storage class is the default, and none is asked for", remedy)
    message = f"storage class {wanted or defaults[0]}; whether it can be mounted by many nodes only its makers say"
    return Finding("storage", "ok", message)


def _check_tls(facts: KubernetesFacts, tls: _Tls) -> Iterator[Finding]:
    if tls.mode == "insecure":
        message = "tls.mode insecure: prompts and activations travel unencrypted between pods"
        yield Finding("encryption", "warning", message, "certManager, or secret with what `shoal certs` makes")
    elif tls.mode == "certManager":
        if facts.crds is None:
            yield _unread("encryption", facts, "crds")
        elif "certificates.cert-manager.io" not in facts.crds:
            remedy = "install cert-manager, or tls.mode secret with what `shoal certs` makes"
            yield Finding("encryption", "failure", "tls.mode certManager, and cert-manager is not installed", remedy)
        else:
            yield Finding("encryption", "ok", "cert-manager is there")


def _check_monitoring(facts: KubernetesFacts, monitoring: _Monitoring) -> Iterator[Finding]:
    wanted = {
        "podmonitors": monitoring.podMonitor,
        "servicemonitors": monitoring.serviceMonitor,
        "prometheusrules": monitoring.prometheusRule,
    }
    names = [f"{name}.monitoring.coreos.com" for name, is_wanted in wanted.items() if is_wanted]
    if not names:
        return
    if facts.crds is None:
        yield _unread("monitoring", facts, "crds")
    elif missing := [name for name in names if name not in facts.crds]:
        remedy = "install the Prometheus operator, or turn monitoring off"
        yield Finding("monitoring", "failure", f"{', '.join(missing)} not there", remedy)
    else:
        yield Finding("monitoring", "ok", "the Prometheus operator's CRDs are there")


def _check_secrets(facts: KubernetesFacts, values: ChartValues) -> Iterator[Finding]:
    needed: Sequence[tuple[str, frozenset[str], str]] = (
        (values.tls.existingSecret if values.tls.mode == "secret" else "", _TLS_KEYS, "tls.existingSecret"),
        (values.tls.apiSecret, frozenset({"tls.crt", "tls.key"}), "tls.apiSecret"),
        (values.apiKeys.existingSecret, frozenset({"keys.json"}), "apiKeys.existingSecret"),
    )
    for name, keys, where in needed:
        if not name:
            continue
        if facts.secrets is None:
            yield _unread("secrets", facts, "secrets")
        elif name not in facts.secrets:
            yield Finding("secrets", "failure", f"{where}: there is no Secret {name}", "create it in this namespace")
        elif missing := sorted(keys - facts.secrets[name]):
            message = f"{where}: the Secret {name} lacks {', '.join(missing)}"
            yield Finding("secrets", "failure", message, "add the keys that are missing")
        else:
            yield Finding("secrets", "ok", f"{where}: {name}")
