"""What a RayCluster and its pods look like to us: the few fields that we go by, read once, checked before use. Pure.

KubeRay's CRD accepts `maxReplicas: -1` and a minimum above the maximum, and the operator clamps without a word, so the
checks are ours. One worker group holds one expert group and has its name; its pods advertise a Ray resource that no
other group has, so an actor that asks for it lands there and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cluster.errors import BadRecord
from cluster.pod_resources import ROUTER_RESOURCE, expert_resource

Scaling = Literal["ray", "controller"]

CLUSTER_LABEL = "ray.io/cluster"
GROUP_LABEL = "ray.io/group"
REVISION_LABEL = "shoal.dev/revision"


@dataclass(frozen=True, slots=True)
class Template:
    """What tells an older pod from a newer one: the chart's revision label, else the image of the first container."""

    image: str
    revision: str

    def has_made(self, pod: Template) -> bool:
        """Whether a pod that was made like this is current. With a revision the image does not count: an admission
        webhook may have put another name for it into the pod."""
        return self.revision == pod.revision if self.revision else self.image == pod.image


@dataclass(frozen=True, slots=True)
class WorkerGroup:
    """One entry of workerGroupSpecs. resources: names that its pods advertise to Ray."""

    name: str
    replicas: int
    min_replicas: int
    max_replicas: int
    num_of_hosts: int
    workers_to_delete: tuple[str, ...]
    resources: frozenset[str]
    template: Template


@dataclass(frozen=True, slots=True)
class RayClusterView:
    """resource_version: of the object that this was read from, for a guarded write."""

    name: str
    uid: str
    resource_version: str
    in_tree_autoscaling: bool
    groups: tuple[WorkerGroup, ...]

    def find_group(self, name: str) -> tuple[int, WorkerGroup] | None:
        """Index in workerGroupSpecs and the group; None unless exactly one has this name."""
        found = [(index, group) for index, group in enumerate(self.groups) if group.name == name]
        return found[0] if len(found) == 1 else None


@dataclass(frozen=True, slots=True)
class Pod:
    """address: its IP, "" before it has one. is_leaving: it has a deletion timestamp. is_over: it has ended."""

    name: str
    group_name: str
    address: str
    is_leaving: bool
    is_over: bool
    template: Template


def read_cluster(document: Mapping[str, Any]) -> RayClusterView:
    """Raises BadRecord if the object lacks what the CRD demands."""
    try:
        metadata, spec = document["metadata"], document["spec"]
        return RayClusterView(
            name=metadata["name"],
            uid=metadata["uid"],
            resource_version=metadata["resourceVersion"],
            in_tree_autoscaling=bool(spec.get("enableInTreeAutoscaling")),
            groups=tuple(_read_group(group) for group in spec.get("workerGroupSpecs") or ()),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadRecord(f"the RayCluster cannot be read: {type(error).__name__}: {error}") from error


def read_pod(document: Mapping[str, Any]) -> Pod:
    """Raises BadRecord."""
    try:
        metadata, status = document["metadata"], document.get("status") or {}
        return Pod(
            name=metadata["name"],
            group_name=(metadata.get("labels") or {}).get(GROUP_LABEL, ""),
            address=status.get("podIP") or "",
            is_leaving=metadata.get("deletionTimestamp") is not None,
            is_over=status.get("phase") in ("Succeeded", "Failed"),
            template=_read_template(document),
        )
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise BadRecord(f"a pod cannot be read: {type(error).__name__}: {error}") from error


def find_problems(view: RayClusterView, group_names: Collection[str], scaling: Scaling) -> list[str]:
    """Why expert groups of these names cannot be scaled in this RayCluster; one line each, with the remedy."""
    problems: list[str] = []
    if scaling == "controller" and view.in_tree_autoscaling:
        problems.append(
            "kubernetes_scaling is controller, but the RayCluster has enableInTreeAutoscaling: true, and Ray's "
            "autoscaler would undo every change: set one of them"
        )
    if scaling == "ray" and not view.in_tree_autoscaling:
        problems.append(
            "kubernetes_scaling is ray, but the RayCluster has enableInTreeAutoscaling: false, so no pod would ever be "
            "added: set kubernetes_scaling to controller or turn it on"
        )
    for name in group_names:
        entry = view.find_group(name)
        if entry is None:
            count = sum(group.name == name for group in view.groups)
            problems.append(f"there are {count} worker groups named {name!r}, one per expert group is needed")
        else:
            problems.extend(_find_group_problems(entry[1]))
        problems.extend(_find_resource_problems(view, expert_resource(name), [name]))
    routers = [group.name for group in view.groups if ROUTER_RESOURCE in group.resources]
    if not routers:
        problems.append(f"no worker group advertises the Ray resource {ROUTER_RESOURCE!r}, so routers find no place")
    return problems


def find_bounds_problem(group: WorkerGroup) -> str | None:
    """What the CRD does not check."""
    if group.min_replicas < 0 or group.max_replicas < group.min_replicas:
        return (
            f"worker group {group.name}: minReplicas {group.min_replicas} and maxReplicas {group.max_replicas} are no "
            "range"
        )
    return None


def _find_group_problems(group: WorkerGroup) -> list[str]:
    problems = [problem] if (problem := find_bounds_problem(group)) is not None else []
    if group.num_of_hosts != 1:
        problems.append(f"worker group {group.name}: numOfHosts is {group.num_of_hosts}, a replica is one pod")
    return problems


def _find_resource_problems(view: RayClusterView, resource: str, owners: Sequence[str]) -> list[str]:
    found = [group.name for group in view.groups if resource in group.resources]
    if found == list(owners):
        return []
    return [
        f"the Ray resource {resource!r} must be advertised by worker group {', '.join(owners)} alone, in "
        f"rayStartParams.resources; it is by {', '.join(found) or 'none'}"
    ]


def _read_group(document: Mapping[str, Any]) -> WorkerGroup:
    return WorkerGroup(
        name=document["groupName"],
        # An absent number means 0 to the operator, an absent maximum no bound.
        replicas=int(document.get("replicas") or 0),
        min_replicas=int(document.get("minReplicas") or 0),
        max_replicas=int(document["maxReplicas"]) if document.get("maxReplicas") is not None else 2**31 - 1,
        num_of_hosts=int(document.get("numOfHosts") or 1),
        workers_to_delete=tuple((document.get("scaleStrategy") or {}).get("workersToDelete") or ()),
        resources=_read_resources(document),
        template=_read_template(document["template"]),
    )


def _read_resources(document: Mapping[str, Any]) -> frozenset[str]:
    """From rayStartParams.resources, a JSON text that KubeRay puts on a command line, quotes included."""
    text = (document.get("rayStartParams") or {}).get("resources", "")
    # As written for the shell: '"{\"expert_group_g0\": 1}"' in single or double quotes, with escaped ones inside.
    text = text.strip().strip("'")
    if text.startswith('"') and text.endswith('"') and len(text) > 1:
        text = text[1:-1]
    try:
        values = json.loads(text.replace('\\"', '"') or "{}")
    except ValueError:
        return frozenset()
    return frozenset(name for name, amount in values.items() if amount) if isinstance(values, dict) else frozenset()


def _read_template(document: Mapping[str, Any]) -> Template:
    """Of a pod, or of a pod template."""
    labels = (document.get("metadata") or {}).get("labels") or {}
    return Template(document["spec"]["containers"][0].get("image") or "", labels.get(REVISION_LABEL, ""))
