"""What routers say of themselves and of their expert groups, as Prometheus metrics. Pure.

Every number comes from a router's Status, read when somebody scrapes. Several fronts say the same of a router: take
the maximum by `router` before you add up over routers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from router.group_traffic import LATENCY_BOUNDS_S
from router.tenancy.key_ring import ANONYMOUS_TEAM
from router.v1 import router_pb2

_STEP_PARTS = ("attention", "gate", "scatter", "wait", "shared", "head", "sample", "overhead")
_DISPATCH_COUNTERS = {
    "num_replans": ("shoal_replans", "Layers planned again because the expert table had changed"),
    "num_probes": ("shoal_probes", "Copies of frames that only measured a slow replica"),
    "num_hedges_won": ("shoal_hedges_won", "Late frames that the second replica answered first"),
    "num_rerouted": ("shoal_rerouted_frames", "Frames moved because their replica left the table"),
    "num_missed_heartbeats": ("shoal_missed_heartbeats", "Heartbeats that an expert replica did not answer"),
    "num_dead_replicas": ("shoal_dead_replicas", "Times that a replica was given up for want of heartbeats"),
    "num_left_out": ("shoal_left_out_experts", "Experts that rows had to do without (max_missing_experts)"),
    "num_crossings": ("shoal_numerics_crossings", "Times that a group went on with replicas of another numerics_id"),
}


def build_router_metrics(
    model: str, statuses: Mapping[str, router_pb2.StatusResponse | None], max_step_s: float
) -> list[Metric]:
    """statuses: by endpoint; None: no answer in time. max_step_s: a step that runs longer is stuck."""
    families = _Families(model)
    up = families.gauge("shoal_router_up", "1 if the router answers", ("endpoint",))
    for endpoint, status in statuses.items():
        up.add_metric([model, endpoint], float(status is not None))
    answered = [status for status in statuses.values() if status is not None]
    for status in answered:
        _add_router(families, status, max_step_s)
        for group in status.groups:
            _add_group(families, status.router_id, group)
        for replica in status.replicas:
            _add_replica(families, status.router_id, replica)
    return families.all


class _Families:
    """Metric families by name, made when first asked for; each begins with the label `model`."""

    def __init__(self, model: str) -> None:
        self.model = model
        self._found: dict[str, Metric] = {}

    @property
    def all(self) -> list[Metric]:
        return list(self._found.values())

    def gauge(self, name: str, text: str, labels: Sequence[str] = ("router",)) -> GaugeMetricFamily:
        return self._get(GaugeMetricFamily, name, text, labels)

    def counter(self, name: str, text: str, labels: Sequence[str] = ("router",)) -> CounterMetricFamily:
        return self._get(CounterMetricFamily, name, text, labels)

    def histogram(self, name: str, text: str, labels: Sequence[str]) -> HistogramMetricFamily:
        return self._get(HistogramMetricFamily, name, text, labels)

    def set(self, name: str, text: str, router_id: str, value: float) -> None:
        self.gauge(name, text).add_metric([self.model, router_id], value)

    def count(self, name: str, text: str, router_id: str, value: float) -> None:
        self.counter(name, text).add_metric([self.model, router_id], value)

    def _get(self, family: type, name: str, text: str, labels: Iterable[str]) -> Any:
        found = self._found.get(name)
        if found is None:
            found = self._found[name] = family(name, text, labels=("model", *labels))
        return found


def _add_router(families: _Families, status: router_pb2.StatusResponse, max_step_s: float) -> None:
    model, router_id = families.model, status.router_id
    step_s = status.current_step_ms / 1000
    is_ready = status.ready and step_s <= max_step_s
    families.set("shoal_router_ready", "1 if the router takes requests and moves", router_id, float(is_ready))
    families.set("shoal_num_requests_running", "Sequences in the batch", router_id, status.num_running)
    families.set("shoal_num_requests_waiting", "Sequences that wait for a place in it", router_id, status.num_waiting)
    families.set("shoal_current_step_seconds", "How long the current step has run; 0: idle", router_id, step_s)
    families.set(
        "shoal_experts_unserved_seconds",
        "How long some expert has had no connected replica; 0: all have",
        router_id,
        status.unserved_ms / 1000,
    )
    families.set("shoal_router_table_version", "Version of the expert table in force", router_id, status.table_version)
    if status.num_blocks:
        share = status.num_blocks_held / status.num_blocks
        families.set("shoal_kv_cache_usage_perc", "Share of KV blocks in use, from 0 to 1", router_id, share)
        families.set("shoal_kv_cache_blocks", "KV blocks of the router", router_id, status.num_blocks)
        families.set(
            "shoal_kv_cache_blocks_held", "Those that running sequences hold", router_id, status.num_blocks_held
        )
    families.count("shoal_steps", "Steps finished", router_id, status.num_steps)
    families.count(
        "shoal_num_preemptions", "Sequences that gave their KV blocks back", router_id, status.num_preemptions
    )
    families.count(
        "shoal_prefix_cache_queries", "Prompt tokens looked up in the KV cache", router_id, status.num_prompt_tokens
    )
    families.count("shoal_prefix_cache_hits", "Those found there", router_id, status.num_cached_tokens)
    families.count("shoal_router_generation_tokens", "Tokens generated", router_id, status.num_generated_tokens)
    times = families.counter("shoal_step_seconds", "Time of the steps, by part", ("router", "part"))
    for part in _STEP_PARTS:
        times.add_metric([model, router_id, part], getattr(status.step_times, f"{part}_ns") / 1e9)
    families.count("shoal_whole_step_seconds", "Time of whole steps", router_id, status.step_times.step_ns / 1e9)
    drafted = families.counter("shoal_draft_tokens", "Drafts verified, by position", ("router", "position"))
    accepted = families.counter("shoal_accepted_draft_tokens", "Those that held, by position", ("router", "position"))
    for index, (num_drafted, num_accepted) in enumerate(zip(status.num_drafted, status.num_accepted, strict=False), 1):
        drafted.add_metric([model, router_id, str(index)], num_drafted)
        accepted.add_metric([model, router_id, str(index)], num_accepted)
    for name, (metric, text) in _DISPATCH_COUNTERS.items():
        families.count(metric, text, router_id, getattr(status.dispatch, name))
    errors = families.counter("shoal_expert_errors", "Frames that a replica failed, by kind", ("router", "kind"))
    for kind, count in sorted(status.dispatch.errors.items()):
        errors.add_metric([model, router_id, kind], count)
    running = families.gauge("shoal_team_requests_running", "Sequences in the batch, by team", ("router", "team"))
    waiting = families.gauge("shoal_team_requests_waiting", "Sequences that wait, by team", ("router", "team"))
    for team in status.teams:
        labels = [model, router_id, team.fairness_key or ANONYMOUS_TEAM]
        running.add_metric(labels, team.num_running)
        waiting.add_metric(labels, team.num_waiting)


def _add_group(families: _Families, router_id: str, group: router_pb2.GroupTraffic) -> None:
    labels = [families.model, router_id, group.name]
    for name, text, value in (
        ("shoal_group_frames", "Frames sent to an expert group", group.num_frames),
        ("shoal_group_rows", "Rows in them", group.num_rows),
        ("shoal_group_pairs", "(row, expert) pairs in them", group.num_pairs),
        ("shoal_group_sent_bytes", "Bytes of them", group.sent_bytes),
        ("shoal_group_received_bytes", "Bytes of the answers", group.received_bytes),
        ("shoal_group_retries", "Frames sent again because a replica failed them", group.num_retries),
        ("shoal_group_hedges", "Frames sent to another replica as well because the first was late", group.num_hedges),
    ):
        families.counter(name, text, ("router", "group")).add_metric(labels, value)
    counts, total, buckets = list(group.latency_counts), 0, []
    for bound_s, count in zip((*LATENCY_BOUNDS_S, None), counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound_s is None else repr(bound_s), float(total)))
    families.histogram(
        "shoal_group_rpc_seconds", "From sending a frame to its answer, by expert group", ("router", "group")
    ).add_metric(labels, buckets, group.latency_us / 1e6)


def _add_replica(families: _Families, router_id: str, replica: router_pb2.ReplicaTimes) -> None:
    labels = [families.model, router_id, replica.replica_id]
    for name, text, value in (
        ("shoal_replica_connected", "1 if the router has a stream to the replica", float(replica.connected)),
        ("shoal_replica_outstanding_frames", "Frames without an answer", replica.num_outstanding),
        ("shoal_replica_slowness", "Its time relative to the fastest of its group; 0: unknown", replica.slowness),
        ("shoal_replica_frame_seconds", "Time of its latest frames; 0: unknown", replica.frame_ms / 1000),
    ):
        families.gauge(name, text, ("router", "replica")).add_metric(labels, value)
