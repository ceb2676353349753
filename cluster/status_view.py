"""The objects of `shoal status --json` and `shoal plan --json`, and their pictures for people. Pure."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.autoscaler import Decision, ReplicaLoad
from cluster.desired_state import DesiredState
from cluster.planner import (
    ActorState,
    CreateReplica,
    CreateRouter,
    DrainReplica,
    HostExperts,
    Observation,
    Plan,
    PushTable,
    RemoveReplica,
    is_ready,
)
from cluster.records import ActorRecord, StartState
from cluster.spec import ClusterSpec, GroupSpec, parse_replica_id


def build_status(
    spec: ClusterSpec,
    desired: DesiredState,
    observation: Observation,
    plan: Plan,
    details: Mapping[str, Mapping[str, Any]],
    loads: Mapping[tuple[str, int], ReplicaLoad],
) -> dict[str, Any]:
    """The status object. details: figures of each router by id, as its own Status gave them. loads: of replicas, by id
    and incarnation."""
    return {
        "model": spec.model_name,
        "checkpoint": spec.checkpoint,
        "ready": is_ready(plan, spec),
        "draining": observation.draining,
        # False: Ray's control service does not answer; nothing is restarted or scaled, tokens still flow.
        "control_plane": observation.existing_ids is not None,
        "table_version": plan.table.version,
        "desired_version": desired.version,
        # Nothing starts, leaves or waits: what there is is what is desired.
        "settled": plan.is_settled(desired),
        "routers": [
            {
                "id": router_id,
                **_describe_process(observation.routers.get(router_id)),
                "state": plan.routers[router_id].state.value,
                "message": plan.routers[router_id].message,
                **details.get(router_id, {}),
            }
            for router_id in spec.router_ids
        ],
        "groups": [_describe_group(spec_group, desired, observation, plan, loads) for spec_group in spec.groups],
    }


def _describe_group(
    group: GroupSpec,
    desired: DesiredState,
    observation: Observation,
    plan: Plan,
    loads: Mapping[tuple[str, int], ReplicaLoad],
) -> dict[str, Any]:
    entry = plan.table.group(group.name)
    hosted = group.hosted if entry is None else entry.hosted
    return {
        "name": group.name,
        "desired_replicas": len(desired.get_group(group.name).member_ids),
        "experts": [[block.expert_start, block.expert_end] for block in hosted],
        "layers": [[block.layer_start, block.layer_end] for block in hosted],
        "replicas": [
            {
                "id": replica_id,
                **_describe_process(observation.replicas.get(replica_id)),
                "state": plan.replicas[replica_id].state.value,
                "message": plan.replicas[replica_id].message,
                "weight_digest": record.weight_digest
                if (record := observation.replicas.get(replica_id)) is not None
                else None,
                "load": _describe_load(loads.get((replica_id, record.incarnation))) if record is not None else None,
            }
            for replica_id in plan.replicas
            if parse_replica_id(replica_id)[0] == group.name
        ],
    }


def _describe_process(record: ActorRecord | None) -> dict[str, Any]:
    """None where nothing is known yet."""
    if record is None:
        return {"pid": None, "node": None, "endpoint": None, "incarnation": None, "num_failed_starts": 0}
    failed = 1 if record.state is StartState.FAILED else 0
    return {
        "pid": record.pid,
        "node": record.node,
        "endpoint": record.endpoint,
        "incarnation": record.incarnation,
        "num_failed_starts": record.num_failed_starts + failed,
        "started_at": record.started_at,
        "ready_at": record.ready_at,
    }


def _describe_load(load: ReplicaLoad | None) -> dict[str, float | None] | None:
    if load is None:
        return None
    speed = load.pairs_per_busy_s
    return {
        "busy_share": round(load.busy_share, 4),
        "queue_ms": round(load.queue_ms, 3),
        "pairs_per_busy_s": None if speed is None else round(speed, 1),
    }


def build_plan_view(
    desired: DesiredState, observation: Observation, plan: Plan, decisions: Sequence[Decision]
) -> dict[str, Any]:
    """What the controller does now and what it waits for.

    action of a step is one of push, create, host, drain, remove, wait, replace.
    """
    steps: list[dict[str, str]] = []
    for action in plan.actions:
        match action:
            case PushTable(router_id):
                steps.append(_make_step(f"router {router_id}", "push", f"it lacks table {plan.table.version}"))
            case CreateRouter(router_id):
                steps.append(_make_step(f"router {router_id}", "create", action.reason))
            case CreateReplica(replica_id):
                steps.append(_make_step(f"replica {replica_id}", "create", action.reason))
            case HostExperts(replica_id):
                steps.append(_make_step(f"replica {replica_id}", "host", action.reason))
            case DrainReplica(replica_id):
                steps.append(_make_step(f"replica {replica_id}", "drain", action.reason))
            case RemoveReplica(replica_id):
                steps.append(_make_step(f"replica {replica_id}", "remove", action.reason))
    steps.extend(_make_step(item.object, "wait", item.reason) for item in plan.waiting)
    steps.extend(_make_step(f"replica {replica_id}", "replace", "its turn comes") for replica_id in desired.rollout)
    return {
        "desired_version": desired.version,
        "table_version": plan.table.version,
        "control_plane": observation.existing_ids is not None,
        "settled": plan.is_settled(desired),
        "groups": [{"name": group.name, "members": list(group.member_ids)} for group in desired.groups],
        "steps": steps,
        "autoscale": [
            {
                "group": decision.group_name,
                "action": decision.action,
                "replicas": decision.num_replicas,
                "reason": decision.reason,
            }
            for decision in decisions
        ],
    }


def render_plan(view: Mapping[str, Any]) -> str:
    """One line per step."""
    lines = [] if view["control_plane"] else ["Ray's control service does not answer: all of this waits for it"]
    if not view["steps"]:
        lines.append(f"nothing to do: the cluster is as desired (version {view['desired_version']})")
    lines.extend(f"{step['action']:8} {step['object']}: {step['reason']}" for step in view["steps"])
    lines.extend(
        f"{item['action']:8} group {item['group']}: {item['replicas']} replicas; {item['reason']}"
        for item in view["autoscale"]
    )
    return "\n".join(lines)


def render_event(event: Mapping[str, Any]) -> str:
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
    return f"{moment}  {event['object']}: {event['action']} ({event['reason']})"


def render_status(status: Mapping[str, Any]) -> str:
    """A table for a terminal."""
    state = "draining" if status["draining"] else "ready" if status["ready"] else "not ready"
    lines = [f"{status['model']}: {state}, expert table version {status['table_version']}"]
    if not status["control_plane"]:
        lines.append("Ray's control service does not answer: nothing is restarted until it does")
    if status.get("balancer_alarm"):
        lines.append(status["balancer_alarm"])
    rows: list[Sequence[str]] = [("", "STATE", "PID", "NODE", "ENDPOINT", "")]
    for router in status["routers"]:
        running = f"{router['num_running']} running, {router['num_waiting']} waiting" if "num_running" in router else ""
        rows.append((f"router {router['id']}", *_render_process(router), router["message"] or running))
    for group in status["groups"]:
        experts = _render_experts(group)
        for replica in group["replicas"]:
            rows.append((f"group {replica['id']}", *_render_process(replica), replica["message"] or experts))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines.extend("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def _make_step(object_name: str, action: str, reason: str) -> dict[str, str]:
    return {"object": object_name, "action": action, "reason": reason}


def _render_process(item: Mapping[str, Any]) -> tuple[str, str, str, str]:
    return (
        item["state"],
        "-" if item["pid"] is None else str(item["pid"]),
        item["node"] or "-",
        item["endpoint"] or "-",
    )


def _render_experts(group: Mapping[str, Any]) -> str:
    """Which experts, or how many where a rebalancing has made them differ from layer to layer."""
    if len({tuple(layers) for layers in group["layers"]}) == 1:
        return ", ".join(f"experts {start}-{end - 1}" for start, end in group["experts"])
    areas = zip(group["experts"], group["layers"], strict=True)
    count = sum((end - start) * (last - first) for (start, end), (first, last) in areas)
    return f"{count} (layer, expert) pairs, rebalanced"


def list_failures(status: Mapping[str, Any], max_failed_starts: int) -> list[str]:
    """Actors that failed to start so often that waiting is pointless, one line each."""
    items = [
        *((f"router {item['id']}", item) for item in status["routers"]),
        *((f"expert group replica {item['id']}", item) for group in status["groups"] for item in group["replicas"]),
    ]
    return [
        f"{name} failed to start {item['num_failed_starts']} times: {item['message'] or 'its process ended'}"
        for name, item in items
        if item["num_failed_starts"] >= max_failed_starts and item["state"] != ActorState.READY.value
    ]
