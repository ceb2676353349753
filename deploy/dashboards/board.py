"""The Grafana dashboard: what users feel first, then where the time goes, then the machines. Pure.

Panels say only what to plot; places and ids follow from their order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

WIDTH = 24
# Grafana's own variable for a range that fits the scrape interval.
_RANGE = "$__rate_interval"
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Query:
    """legend: of its series, with labels in braces."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """unit: Grafana's id of it. width: of 24 columns."""

    title: str
    queries: tuple[Query, ...]
    unit: str = "short"
    kind: Literal["timeseries", "stat", "heatmap"] = "timeseries"
    width: int = 8
    stacked: bool = False


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


def _rate(name: str, by: str, selector: str = "") -> str:
    return f"sum by ({by}) (rate({name}{selector}[{_RANGE}]))"


def _router_rate(name: str, by: str = "router") -> str:
    """Several fronts say the same of a router."""
    return f"max by ({by}) (rate({name}[{_RANGE}]))"


def _quantiles(name: str, by: str = "") -> tuple[Query, ...]:
    labels = f"le, {by}" if by else "le"
    legend = f"{{{{{by}}}}} " if by else ""
    return tuple(
        Query(f"histogram_quantile({share}, {_rate(f'{name}_bucket', labels)})", f"{legend}p{round(share * 100)}")
        for share in (0.5, 0.9, 0.99)
    )


ROWS = (
    Row(
        "Now",
        (
            Panel("Ready", (Query("min(shoal_cluster_ready)", "ready"),), kind="stat", width=3),
            Panel("Running", (Query("sum(max by (router) (shoal_num_requests_running))", "running"),), kind="stat",
                  width=3),
            Panel("Waiting", (Query("sum(max by (router) (shoal_num_requests_waiting))", "waiting"),), kind="stat",
                  width=3),
            Panel("Output", (Query(f"sum(rate(shoal_generation_tokens_total[{_RANGE}]))", "tokens/s"),), kind="stat",
                  width=4),
            Panel("Prompts", (Query(f"sum(rate(shoal_prompt_tokens_total[{_RANGE}]))", "tokens/s"),), kind="stat",
                  width=4),
            Panel("Replicas ready", (Query('sum(shoal_group_replicas{state="ready"})', "ready"),), kind="stat",
                  width=3),
            Panel("KV cache", (Query("max(shoal_kv_cache_usage_perc)", "used"),), "percentunit", "stat", 4),
        ),
    ),
    Row(
        "What users feel",
        (
            Panel("Time to first token", _quantiles("shoal_time_to_first_token_seconds"), "s"),
            Panel("Time per token", _quantiles("shoal_request_time_per_output_token_seconds"), "s"),
            Panel("Between tokens", _quantiles("shoal_inter_token_latency_seconds"), "s"),
            Panel("Whole requests", _quantiles("shoal_e2e_request_latency_seconds"), "s"),
            Panel("Waiting in the router", _quantiles("shoal_request_queue_time_seconds"), "s"),
            Panel("Prefill", _quantiles("shoal_request_prefill_time_seconds"), "s"),
            Panel("HTTP requests by status", (Query(_rate("shoal_http_requests_total", "status"), "{{status}}"),),
                  "reqps", stacked=True),
            Panel("Turned away", (Query(_rate("shoal_rejected_requests_total", "reason"), "{{reason}}"),), "reqps"),
            Panel("Sequences by end", (
                Query(_rate("shoal_request_success_total", "finished_reason"), "{{finished_reason}}"),
                Query(_rate("shoal_request_failed_total", "reason"), "{{reason}}"),
            ), "reqps"),
        ),
    ),
    Row(
        "Teams",
        (
            Panel("Output by team", (Query(_rate("shoal_generation_tokens_total", "team"), "{{team}}"),), "short",
                  stacked=True),
            Panel("Prompt tokens by team", (Query(_rate("shoal_prompt_tokens_total", "team"), "{{team}}"),), "short",
                  stacked=True),
            Panel("Waiting by team", (
                Query("sum by (team) (max by (router, team) (shoal_team_requests_waiting))", "{{team}}"),
            ), stacked=True),
        ),
    ),
    Row(
        "Routers",
        (
            Panel("Step time by part", (
                Query(_router_rate("shoal_step_seconds_total", "router, part"), "{{router}} {{part}}"),
            ), "s", stacked=True),
            Panel("Time of a step", (
                Query(f"{_router_rate('shoal_whole_step_seconds_total')} / {_router_rate('shoal_steps_total')}",
                      "{{router}}"),
            ), "s"),
            Panel("Batch", (
                Query("max by (router) (shoal_num_requests_running)", "{{router}} running"),
                Query("max by (router) (shoal_num_requests_waiting)", "{{router}} waiting"),
            )),
            Panel("KV cache", (Query("max by (router) (shoal_kv_cache_usage_perc)", "{{router}}"),), "percentunit"),
            Panel("Prefix cache hits", (
                Query(f"{_router_rate('shoal_prefix_cache_hits_total')} / "
                      f"{_router_rate('shoal_prefix_cache_queries_total')}", "{{router}}"),
            ), "percentunit"),
            Panel("Drafts that hold, by position", (
                Query(f"{_router_rate('shoal_accepted_draft_tokens_total', 'router, position')} / "
                      f"{_router_rate('shoal_draft_tokens_total', 'router, position')}", "{{router}} {{position}}"),
            ), "percentunit"),
            Panel("Preemptions", (Query(_router_rate("shoal_num_preemptions_total"), "{{router}}"),), "ops"),
            Panel("CPU", (
                Query(f"rate(shoal_process_cpu_seconds_total[{_RANGE}])", "{{process}}"),
                Query(f"rate(process_cpu_seconds_total[{_RANGE}])", "{{job}} {{instance}}"),
            ), "percentunit"),
            Panel("Memory", (
                Query("shoal_process_resident_memory_bytes", "{{process}}"),
                Query("process_resident_memory_bytes", "{{job}} {{instance}}"),
            ), "bytes"),
        ),
    ),
    Row(
        "Expert groups",
        (
            Panel("Replicas ready", (
                Query('sum by (group) (shoal_group_replicas{state="ready"})', "{{group}}"),
            )),
            Panel("Busy share", (Query("avg by (group) (shoal_replica_busy_share)", "{{group}}"),), "percentunit"),
            Panel("Queue in the replicas", (Query("max by (group) (shoal_replica_queue_seconds)", "{{group}}"),), "s"),
            Panel("Answer time, 99th percentile", (
                Query(f"histogram_quantile(0.99, {_rate('shoal_group_rpc_seconds_bucket', 'le, group')})",
                      "{{group}}"),
            ), "s"),
            Panel("Rows", (Query(_router_rate("shoal_group_rows_total", "router, group"), "{{router}} {{group}}"),)),
            Panel("Bytes", (
                Query(_router_rate("shoal_group_sent_bytes_total", "router, group"), "{{router}} {{group}} out"),
                Query(_router_rate("shoal_group_received_bytes_total", "router, group"), "{{router}} {{group}} back"),
            ), "Bps"),
            Panel("Load share", (Query("shoal_group_load_share", "{{group}}"),), "percentunit", stacked=True),
            Panel("Hottest expert over its layer's mean", (
                Query("shoal_expert_load_imbalance", "layer {{layer}}"),
            )),
            Panel("Frames without an answer", (
                Query("sum by (replica) (max by (router, replica) (shoal_replica_outstanding_frames))", "{{replica}}"),
            )),
        ),
    ),
    Row(
        "Failures",
        (
            Panel("Retries and hedges", (
                Query(_router_rate("shoal_group_retries_total", "router, group"), "{{router}} {{group}} retries"),
                Query(_router_rate("shoal_group_hedges_total", "router, group"), "{{router}} {{group}} hedges"),
            ), "ops"),
            Panel("Errors by kind", (
                Query(_router_rate("shoal_expert_errors_total", "router, kind"), "{{router}} {{kind}}"),
                Query(_router_rate("shoal_missed_heartbeats_total"), "{{router}} missed heartbeat"),
                Query(_router_rate("shoal_numerics_crossings_total"), "{{router}} other arithmetic"),
            ), "ops"),
            Panel("Events", (Query(f"increase(shoal_events_total[{_RANGE}])", "{{kind}} {{action}}"),)),
        ),
    ),
)  # fmt: skip


def build_board() -> dict[str, Any]:
    """Grafana's JSON, schema 39."""
    panels: list[dict[str, Any]] = []
    top = 0
    for row in ROWS:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": top, "w": WIDTH, "h": 1},
                "panels": [],
            }
        )
        top += 1
        left, height = 0, 0
        for panel in row.panels:
            if left + panel.width > WIDTH:
                top, left = top + height, 0
            height = 4 if panel.kind == "stat" else 8
            place = {"x": left, "y": top, "w": panel.width, "h": height}
            panels.append(_build_panel(panel, len(panels) + 1, place))
            left += panel.width
        top += height
    return {
        "uid": "shoal",
        "title": "Shoal",
        "tags": ["shoal"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]},
        "panels": panels,
    }


def _build_panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    custom = {"fillOpacity": 25 if panel.stacked else 8, "showPoints": "never", "lineWidth": 1}
    if panel.stacked:
        custom["stacking"] = {"mode": "normal"}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "datasource": _DATASOURCE,
        "gridPos": place,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0, "custom": custom if panel.kind == "timeseries" else {}},
            "overrides": [],
        },
        "options": {"tooltip": {"mode": "multi", "sort": "desc"}} if panel.kind == "timeseries" else {},
        "targets": [
            {"refId": chr(ord("A") + index), "expr": query.expr, "legendFormat": query.legend}
            for index, query in enumerate(panel.queries)
        ],
    }
