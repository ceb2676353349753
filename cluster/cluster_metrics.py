"""What the controller knows of the cluster, as Prometheus metrics: /metrics on the admin port. Pure.

The front's /metrics has requests, routers and the traffic to expert groups; here are the states of all replicas, how
busy they say they are, which experts are asked for, what happened, and what the processes use. No name is in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from cluster.planner import ActorState

_STATES = tuple(state.value for state in ActorState)
_PROCESS_GAUGES = {
    "resident_bytes": ("shoal_process_resident_memory_bytes", "Resident memory of a router's process", 1),
    "num_open_files": ("shoal_process_open_fds", "Open files of a router's process", 1),
    "num_threads": ("shoal_process_threads", "Threads of a router's process", 1),
    "started_ms": ("shoal_process_start_time_seconds", "When it started, since the epoch", 1000),
}


def build_cluster_metrics(
    status: Mapping[str, Any], expert_load: Mapping[str, Any], event_counts: Mapping[tuple[str, str], int]
) -> list[Metric]:
    """status: of build_status. expert_load: of build_expert_load. event_counts: by kind of object and action."""
    return [
        _make_gauge("shoal_cluster_ready", "1 if requests can be served", status["ready"]),
        _make_gauge("shoal_cluster_draining", "1 while the cluster is being stopped", status["draining"]),
        _make_gauge("shoal_cluster_settled", "1 if what there is is what is desired", status["settled"]),
        _make_gauge("shoal_control_plane_up", "1 if Ray's control service answers", status["control_plane"]),
        _make_gauge("shoal_expert_table_version", "Version of the expert table", status["table_version"]),
        _make_gauge("shoal_desired_version", "Version of the desired state", status["desired_version"]),
        *_build_groups(status["groups"]),
        *_build_routers(status["routers"]),
        *_build_expert_load(status["groups"], expert_load),
        _build_events(event_counts),
    ]


def _build_groups(groups: Sequence[Mapping[str, Any]]) -> list[Metric]:
    desired = GaugeMetricFamily("shoal_group_desired_replicas", "Replicas that a group should have", labels=["group"])
    states = GaugeMetricFamily("shoal_group_replicas", "Replicas of a group, by state", labels=["group", "state"])
    labels = ["group", "replica"]
    busy = GaugeMetricFamily("shoal_replica_busy_share", "Part of the time that a replica computes", labels=labels)
    queue = GaugeMetricFamily("shoal_replica_queue_seconds", "Mean wait of its frames", labels=labels)
    speed = GaugeMetricFamily(
        "shoal_replica_pairs_per_busy_second", "(row, expert) pairs per second of computing", labels=labels
    )
    failed = GaugeMetricFamily("shoal_replica_failed_starts", "Starts in a row that ended early", labels=labels)
    for group in groups:
        name, replicas = group["name"], group["replicas"]
        desired.add_metric([name], group["desired_replicas"])
        for state in _STATES:
            states.add_metric([name, state], sum(replica["state"] == state for replica in replicas))
        for replica in replicas:
            failed.add_metric([name, replica["id"]], replica["num_failed_starts"])
            load = replica.get("load")
            if load is None:
                continue
            busy.add_metric([name, replica["id"]], load["busy_share"])
            queue.add_metric([name, replica["id"]], load["queue_ms"] / 1000)
            if load["pairs_per_busy_s"] is not None:
                speed.add_metric([name, replica["id"]], load["pairs_per_busy_s"])
    return [desired, states, busy, queue, speed, failed]


def _build_routers(routers: Sequence[Mapping[str, Any]]) -> list[Metric]:
    states = GaugeMetricFamily("shoal_routers", "Routers, by state", labels=["state"])
    for state in _STATES:
        states.add_metric([state], sum(router["state"] == state for router in routers))
    cpu = CounterMetricFamily("shoal_process_cpu_seconds", "CPU time of a router's process", labels=["process"])
    gauges = {
        field: GaugeMetricFamily(name, text, labels=["process"]) for field, (name, text, _) in _PROCESS_GAUGES.items()
    }
    for router in routers:
        figures = router.get("figures", {}).get("process")
        if not figures or not figures["resident_bytes"]:
            continue
        cpu.add_metric([router["id"]], figures["cpu_ms"] / 1000)
        for field, gauge in gauges.items():
            gauge.add_metric([router["id"]], figures[field] / _PROCESS_GAUGES[field][2])
    return [states, cpu, *gauges.values()]


def _build_expert_load(groups: Sequence[Mapping[str, Any]], expert_load: Mapping[str, Any]) -> list[Metric]:
    imbalance = GaugeMetricFamily(
        "shoal_expert_load_imbalance",
        "Pairs of a layer's most wanted expert over the mean of its experts, in the last minutes",
        labels=["layer"],
    )
    share = GaugeMetricFamily(
        "shoal_group_load_share", "Part of all pairs that a group's experts were asked for; copies count once",
        labels=["group"],
    )  # fmt: skip
    counts = {layer["layer"]: layer["pairs"] for layer in expert_load["layers"]}
    total = sum(map(sum, counts.values()))
    for layer, pairs in counts.items():
        if sum(pairs):
            imbalance.add_metric([str(layer)], max(pairs) * len(pairs) / sum(pairs))
    for group in groups if total else ():
        own = sum(
            sum(counts[layer][first:last])
            for (first_layer, last_layer), (first, last) in zip(group["layers"], group["experts"], strict=True)
            for layer in range(first_layer, last_layer)
            if layer in counts
        )
        share.add_metric([group["name"]], own / total)
    return [imbalance, share]


def _build_events(event_counts: Mapping[tuple[str, str], int]) -> Metric:
    events = CounterMetricFamily("shoal_events", "What happened, as `shoal events` says", labels=["kind", "action"])
    for (kind, action), count in sorted(event_counts.items()):
        events.add_metric([kind, action], count)
    return events


def _make_gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=float(value))
