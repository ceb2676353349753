"""How many pods a worker group should have and which of them go: (group, pods, demand) -> change or None. Pure.

The operator deletes pods that are named in `workersToDelete`, and where that leaves more than `replicas`, any it
likes. So a change always names as many empty pods as are too many, and leaves it no choice. The number is written
whenever it is not the one that the demand asks for, whoever changed it: an operator's or `helm upgrade`'s reset is
corrected so.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cluster.fleet import GroupDemand
from cluster.worker_groups import Pod, WorkerGroup, find_bounds_problem


@dataclass(frozen=True, slots=True)
class GroupChange:
    """What to write into one worker group, and why; the reason is one line for an Event."""

    replicas: int
    workers_to_delete: tuple[str, ...]
    action: str
    reason: str


def plan_change(group: WorkerGroup, pods: Sequence[Pod], demand: GroupDemand) -> GroupChange | None:
    """None if the group is as it should be, or its bounds cannot be kept.

    pods: of this group, those that are leaving included.
    """
    if find_bounds_problem(group) is not None:
        return None
    replicas = clamp(group, demand.num_pods)
    # Names of pods that are gone would hit a later pod that gets the same name.
    pod_names = {pod.name for pod in pods}
    pending = tuple(name for name in group.workers_to_delete if name in pod_names)
    named = (*pending, *_choose_departures(group, pods, demand, replicas, pending))
    if replicas == group.replicas and named == group.workers_to_delete:
        return None
    return GroupChange(replicas, named, *_explain(group, replicas, named, demand))


def plan_renewal(group: WorkerGroup, pods: Sequence[Pod], addresses: Collection[str]) -> GroupChange | None:
    """Have the pods of these addresses deleted and made anew: a named pod goes whatever `replicas` says."""
    pod_names = {pod.name for pod in pods}
    pending = tuple(name for name in group.workers_to_delete if name in pod_names)
    renewed = (pod.name for pod in pods if pod.address in addresses and not pod.is_leaving and pod.name not in pending)
    named = (*pending, *renewed)
    if named == group.workers_to_delete:
        return None
    if set(named) <= set(group.workers_to_delete):
        return GroupChange(
            group.replicas, named, "NamesCleared", f"worker group {group.name}: names of gone pods cleared"
        )
    return GroupChange(group.replicas, named, "PodsRenewed", f"worker group {group.name}: renewing {', '.join(named)}")


def share_out(groups: Sequence[WorkerGroup], pods: Sequence[Pod], demand: GroupDemand) -> dict[str, GroupDemand]:
    """What each of several worker groups takes of a demand for pods that any of them may have: its fewest, and those
    that are occupied, so that none has to choose among these; then the first ones that may have more."""
    counts: dict[str, int] = {}
    for group in groups:
        occupied = sum(pod.group_name == group.name and pod.address in demand.occupied for pod in pods)
        counts[group.name] = max(group.min_replicas, min(group.max_replicas, occupied))
    missing = demand.num_pods - sum(counts.values())
    for group in groups:
        more = max(0, min(missing, group.max_replicas - counts[group.name]))
        counts[group.name] += more
        missing -= more
    return {name: GroupDemand(count, demand.occupied) for name, count in counts.items()}


def clamp(group: WorkerGroup, num_pods: int) -> int:
    """Within the group's own bounds; the operator would do so too, and not say it."""
    return max(group.min_replicas, min(group.max_replicas, num_pods))


def _choose_departures(
    group: WorkerGroup, pods: Sequence[Pod], demand: GroupDemand, replicas: int, pending: Sequence[str]
) -> list[str]:
    """Empty pods that are too many: those that leave anyway, then the youngest names."""
    empty = [pod for pod in pods if pod.name not in pending and (not pod.address or pod.address not in demand.occupied)]
    staying = [pod for pod in pods if pod.name not in pending and not pod.is_leaving and not pod.is_over]
    surplus = len(staying) - replicas
    chosen = [pod.name for pod in empty if pod in staying]
    # A pod with an address is one that a replica may have left; one without is still being made.
    chosen.sort(key=lambda name: next(not pod.address for pod in staying if pod.name == name))
    departures = chosen[: max(0, surplus)]
    if replicas < group.replicas:
        # The operator may still count them: named, they are not taken for pods that should stay.
        departures = [pod.name for pod in empty if pod.is_leaving] + departures
    return departures


def _explain(group: WorkerGroup, replicas: int, named: tuple[str, ...], demand: GroupDemand) -> tuple[str, str]:
    reason = f"worker group {group.name}: {demand.num_pods} replicas need a pod"
    if replicas != demand.num_pods:
        reason += f" (bounds {group.min_replicas} to {group.max_replicas})"
    if replicas > group.replicas:
        return "ScaledUp", f"{reason}, replicas {group.replicas} -> {replicas}"
    if replicas < group.replicas:
        removed = f", removing {', '.join(named)}" if named else ""
        return "ScaledDown", f"{reason}, replicas {group.replicas} -> {replicas}{removed}"
    if named and set(named) - set(group.workers_to_delete):
        return "PodsNamed", f"{reason}, removing {', '.join(named)}"
    return "NamesCleared", f"worker group {group.name}: {', '.join(group.workers_to_delete)} gone, names cleared"
