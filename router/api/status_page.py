"""The JSON that the status page and `shoal top` show: one picture of front, routers, groups and queues. Pure.

With a controller its word counts for what runs where; without one the routers' does, which know their replicas.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from router.tenancy.key_ring import ANONYMOUS_TEAM
from router.v1 import router_pb2

_STEP_PARTS = ("attention", "gate", "scatter", "wait", "shared", "head", "sample", "overhead")


def build_page(
    *,
    model: str,
    version: str,
    activity: Mapping[str, Any],
    statuses: Mapping[str, router_pb2.StatusResponse | None],
    cluster: Mapping[str, Any] | None,
    max_step_s: float,
    only_team: str | None = None,
) -> dict[str, Any]:
    """statuses: of routers by endpoint; None: no answer. cluster: the controller's status; None: no controller.
    only_team: whose queue is shown; None: all."""
    answered = [status for status in statuses.values() if status is not None]
    is_serving = any(status.ready and status.current_step_ms <= max_step_s * 1000 for status in answered)
    state = "ready" if is_serving else "not ready"
    if cluster is not None and cluster["draining"]:
        state = "draining"
    return {
        "model": model,
        "version": version,
        "time_s": time.time(),
        "state": state,
        "table_version": max((status.table_version for status in answered), default=0),
        "control_plane": None if cluster is None else cluster["control_plane"],
        "activity": dict(activity),
        "routers": _build_routers(statuses, cluster),
        "groups": _build_groups(answered, cluster),
        "teams": [team for team in _build_teams(answered) if only_team in (None, team["team"])],
        "steps": _build_steps(answered),
    }


def _build_routers(
    statuses: Mapping[str, router_pb2.StatusResponse | None], cluster: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    known = {router["id"]: router for router in cluster["routers"]} if cluster is not None else {}
    routers: list[dict[str, Any]] = []
    for endpoint, status in statuses.items():
        if status is None:
            continue
        found = known.pop(status.router_id, {})
        routers.append(
            {
                "id": status.router_id,
                "state": found.get("state") or _name_state(status),
                "message": found.get("message") or status.message,
                "node": found.get("node"),
                "endpoint": endpoint,
                "pid": status.pid,
                "num_running": status.num_running,
                "num_waiting": status.num_waiting,
                "kv_usage": status.num_blocks_held / status.num_blocks if status.num_blocks else 0.0,
                "load_progress": status.load_progress,
                "num_generated_tokens": status.num_generated_tokens,
                "resident_bytes": status.process.resident_bytes,
                "drafts": [
                    {"drafted": drafted, "accepted": accepted}
                    for drafted, accepted in zip(status.num_drafted, status.num_accepted, strict=False)
                ],
            }
        )
    silent = [endpoint for endpoint, status in statuses.items() if status is None]
    by_endpoint = {router["endpoint"]: router_id for router_id, router in known.items()}
    for endpoint in silent:
        found = known.pop(by_endpoint.get(endpoint, ""), {})
        routers.append(
            {
                "id": found.get("id", endpoint),
                "state": "dead",
                "message": "does not answer",
                "node": found.get("node"),
                "endpoint": endpoint,
                "pid": found.get("pid"),
            }
        )
    routers.extend(
        {name: router[name] for name in ("id", "state", "message", "node", "endpoint", "pid")}
        for router in known.values()
    )
    return sorted(routers, key=lambda router: router["id"])


def _name_state(status: router_pb2.StatusResponse) -> str:
    if status.draining:
        return "draining"
    return "ready" if status.ready else "starting"


def _build_groups(
    statuses: Sequence[router_pb2.StatusResponse], cluster: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    traffic: defaultdict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for status in statuses:
        for group in status.groups:
            found = traffic[group.name]
            found["num_frames"] += group.num_frames
            found["num_pairs"] += group.num_pairs
            found["bytes"] += group.sent_bytes + group.received_bytes
            found["latency_us"] += group.latency_us
            found["num_answers"] += sum(group.latency_counts)
            found["num_retries"] += group.num_retries
            found["num_hedges"] += group.num_hedges
    times = {replica.replica_id: replica for status in statuses for replica in status.replicas}
    if cluster is None:
        groups = _guess_groups(times)
    else:
        groups = [
            {
                "name": group["name"],
                "desired_replicas": group["desired_replicas"],
                "experts": group["experts"],
                "layers": group["layers"],
                "replicas": [
                    {
                        "id": replica["id"],
                        "state": replica["state"],
                        "message": replica["message"],
                        "node": replica["node"],
                        "pid": replica["pid"],
                        "load": replica.get("load"),
                    }
                    for replica in group["replicas"]
                ],
            }
            for group in cluster["groups"]
        ]
    for group in groups:
        group["traffic"] = dict(traffic.get(group["name"], {}))
        for replica in group["replicas"]:
            found = times.get(replica["id"])
            replica["frame_ms"] = None if found is None else round(found.frame_ms, 3)
            replica["outstanding"] = None if found is None else found.num_outstanding
    return groups


def _guess_groups(times: Mapping[str, router_pb2.ReplicaTimes]) -> list[dict[str, Any]]:
    """Replicas are called after their group: g0-1."""
    groups: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for replica_id, replica in times.items():
        groups[replica_id.rpartition("-")[0] or replica_id].append(
            {
                "id": replica_id,
                "state": "ready" if replica.connected else "dead",
                "message": "" if replica.connected else "no router is connected",
                "node": None,
                "pid": None,
                "load": None,
            }
        )
    return [
        {"name": name, "desired_replicas": len(replicas), "experts": [], "layers": [], "replicas": replicas}
        for name, replicas in groups.items()
    ]


def _build_teams(statuses: Sequence[router_pb2.StatusResponse]) -> list[dict[str, Any]]:
    teams: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    for status in statuses:
        for team in status.teams:
            counts = teams[team.fairness_key or ANONYMOUS_TEAM]
            counts[0] += team.num_running
            counts[1] += team.num_waiting
    return [
        {"team": name, "num_running": running, "num_waiting": waiting}
        for name, (running, waiting) in sorted(teams.items(), key=lambda item: (-sum(item[1]), item[0]))
    ]


def _build_steps(statuses: Sequence[router_pb2.StatusResponse]) -> dict[str, Any]:
    """Sums since the routers started; the page takes differences."""
    parts = {part: sum(getattr(status.step_times, f"{part}_ns") for status in statuses) / 1e9 for part in _STEP_PARTS}
    return {"num_steps": sum(status.num_steps for status in statuses), "parts_s": parts}
