"""The alert rules: what is wrong for users, or will be soon. Each says what to look at first.

Expressions use metrics of the front and of the controller's admin port. Several fronts say the same of a router, hence
`max by (router)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

RUNBOOK = "docs/kubernetes.md"


@dataclass(frozen=True)
class Alert:
    """for_minutes: how long expr must hold. summary, description: for whoever is called; may use $labels and $value."""

    name: str
    expr: str
    for_minutes: int
    severity: Literal["critical", "warning"]
    summary: str
    description: str


ALERTS = (
    Alert(
        "ShoalNotReady",
        "shoal_cluster_ready == 0",
        2,
        "critical",
        "The cluster cannot serve requests",
        "No router is ready, or some expert has no live replica. `shoal status` says which.",
    ),
    Alert(
        "ShoalControllerDown",
        "absent(shoal_cluster_ready)",
        5,
        "critical",
        "The controller says nothing",
        "Requests are still served, but nothing is restarted or scaled. Is its process there, is its token right?",
    ),
    Alert(
        "ShoalControlPlaneDown",
        "shoal_control_plane_up == 0",
        2,
        "critical",
        "Ray's control service does not answer",
        "Tokens still flow; nothing is restarted or scaled until Ray's head is back.",
    ),
    Alert(
        "ShoalGroupWithoutReplica",
        'sum by (group) (shoal_group_replicas{state="ready"}) == 0 '
        "and sum by (group) (shoal_group_desired_replicas) > 0",
        1,
        "critical",
        "Expert group {{ $labels.group }} has no live replica",
        "Requests wait for its experts and then fail. `shoal events` says why its replicas ended.",
    ),
    Alert(
        "ShoalReplicasMissing",
        'sum by (group) (shoal_group_replicas{state="ready"}) < sum by (group) (shoal_group_desired_replicas)',
        10,
        "warning",
        "Expert group {{ $labels.group }} has fewer replicas than it should",
        "The next loss may leave it without any. `shoal plan` says what is waited for: a node, a card, weights.",
    ),
    Alert(
        "ShoalReplicaCrashLoops",
        "max by (group, replica) (shoal_replica_failed_starts) >= 3",
        0,
        "warning",
        "Replica {{ $labels.replica }} has failed to start {{ $value }} times in a row",
        "`shoal status` shows its message: memory, checkpoint and card are the usual ones.",
    ),
    Alert(
        "ShoalGroupOverloaded",
        "avg by (group) (shoal_replica_busy_share) > 0.9",
        10,
        "warning",
        "Expert group {{ $labels.group }} computes all the time",
        "It sets the pace of every request. `shoal scale` it, let it autoscale, or look at the experts it hosts.",
    ),
    Alert(
        "ShoalExpertLoadSkewed",
        "max(shoal_expert_load_imbalance) > 10",
        30,
        "warning",
        "One expert is asked for {{ $value }} times as often as the mean of its layer",
        "`shoal rebalance --dry-run` says what hosting it in more groups would gain.",
    ),
    Alert(
        "ShoalRouterDown",
        "max by (endpoint) (shoal_router_up) == 0",
        1,
        "critical",
        "The router at {{ $labels.endpoint }} does not answer",
        "Its streams have moved to another router, if there is one. Look at its process and its node.",
    ),
    Alert(
        "ShoalRouterStuck",
        "max by (router) (shoal_current_step_seconds) > 60",
        0,
        "critical",
        "Router {{ $labels.router }} has been in one step for {{ $value }} s",
        "It answers but does not move. Its log says what it waits for; restart it if it is not an expert group.",
    ),
    Alert(
        "ShoalExpertsUnserved",
        "max by (router) (shoal_experts_unserved_seconds) > 5",
        0,
        "critical",
        "Router {{ $labels.router }} has been without some expert for {{ $value }} s",
        "Running requests wait, and fail after expert_wait_s. `shoal status` shows the group.",
    ),
    Alert(
        "ShoalRequestsFailing",
        'sum(rate(shoal_http_requests_total{route=~"/v1/.*",status=~"5.."}[5m])) '
        '/ sum(rate(shoal_http_requests_total{route=~"/v1/.*"}[5m])) > 0.05',
        2,
        "critical",
        "More than 5 % of requests fail",
        "Statuses and codes: shoal_http_requests_total, shoal_request_failed_total{reason}.",
    ),
    Alert(
        "ShoalRequestsTurnedAway",
        'sum(rate(shoal_rejected_requests_total{reason=~"overloaded|rate_limit_exceeded|unavailable"}[5m])) > 0.2',
        5,
        "warning",
        "Requests are turned away",
        "Queues or limits are full. Which: shoal_rejected_requests_total{reason}, and the queues by team.",
    ),
    Alert(
        "ShoalFirstTokenSlow",
        "histogram_quantile(0.9, sum by (le) (rate(shoal_time_to_first_token_seconds_bucket[10m]))) > 20",
        10,
        "warning",
        "One request in ten waits more than 20 s for its first token",
        "Waiting or computing? Compare shoal_request_queue_time_seconds with shoal_request_prefill_time_seconds.",
    ),
    Alert(
        "ShoalQueueLong",
        "sum(max by (router) (shoal_num_requests_waiting)) > 100",
        10,
        "warning",
        "{{ $value }} requests wait for a place in a batch",
        "Add a router or KV cache, or look at whose they are: shoal_team_requests_waiting.",
    ),
    Alert(
        "ShoalKvCacheFull",
        "max by (router) (shoal_kv_cache_usage_perc) > 0.95",
        10,
        "warning",
        "The KV cache of router {{ $labels.router }} is full",
        "Sequences are preempted and computed anew: raise kv_cache_tokens, add a router, lower max_model_len.",
    ),
    Alert(
        "ShoalFramesRetried",
        "sum by (group) (rate(shoal_group_retries_total[5m])) / sum by (group) (rate(shoal_group_frames_total[5m])) "
        "> 0.01",
        5,
        "warning",
        "More than 1 % of the frames to expert group {{ $labels.group }} are sent again",
        "A replica or its network fails now and then: shoal_expert_errors_total{kind}, shoal_missed_heartbeats_total.",
    ),
)


def build_rules() -> dict[str, Any]:
    """As Prometheus reads it; also the spec of a PrometheusRule."""
    return {
        "groups": [
            {
                "name": "shoal",
                "rules": [
                    {
                        "alert": alert.name,
                        "expr": alert.expr,
                        "for": f"{alert.for_minutes}m",
                        "labels": {"severity": alert.severity},
                        "annotations": {
                            "summary": alert.summary,
                            "description": alert.description,
                            "runbook_url": f"{RUNBOOK}#{alert.name.lower()}",
                        },
                    }
                    for alert in ALERTS
                ],
            }
        ]
    }
