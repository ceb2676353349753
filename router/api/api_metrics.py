"""What this front counts of its own work, as Prometheus metrics in a registry of its own.

Names end as vLLM's do, so that people find what they look for; router/api/vllm_metrics.py gives them its names
altogether. One process counts for itself: it needs neither prometheus-client's multi-process files nor a push, since
what several processes know together (running, waiting, KV cache, expert groups) is the routers' and is asked of them
at each scrape (router_metrics.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics

from router.api.recent_activity import RecentActivity
from router.tenancy.key_ring import ANONYMOUS_TEAM

# Label values that clients could make up are bounded: further teams are counted as one.
MAX_TEAMS = 100
OTHER_TEAM = "other"


# From a cached prompt on a card to a long prompt on a CPU; the longest life of a request is 600 s.
_LATENCY_BOUNDS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 320, 640,
)  # fmt: skip
_TOKEN_BOUNDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)


class ApiMetrics:
    """Owned by one event loop."""

    def __init__(self, model: str) -> None:
        disable_created_metrics()
        self.model = model
        self.registry = CollectorRegistry()
        self.recent = RecentActivity()
        ProcessCollector(registry=self.registry)
        self._teams: dict[str, TeamMetrics] = {}
        labels = ("model", "team")
        self._http_requests = self._counter(
            "shoal_http_requests", "HTTP requests answered, by route and status; 499: the client left",
            ("route", "status"),
        )  # fmt: skip
        self._rejected = self._counter(
            "shoal_rejected_requests", "Requests that were turned away, by the code of the answer", ("reason",)
        )
        self._http_seconds = self._histogram(
            "shoal_http_request_duration_seconds", "From a request's arrival to the last byte of its answer", ("route",)
        )
        self.prompt_tokens = self._counter("shoal_prompt_tokens", "Prompt tokens of sequences that began", labels)
        self.cached_tokens = self._counter("shoal_cached_prompt_tokens", "Those of them found in a KV cache", labels)
        self.generation_tokens = self._counter("shoal_generation_tokens", "Tokens received from routers", labels)
        self.finished = self._counter(
            "shoal_request_success", "Sequences that ended well, by reason: stop, length", (*labels, "finished_reason")
        )
        self.failed = self._counter(
            "shoal_request_failed", "Sequences that did not, by reason: abort (the client left) or the error's code",
            (*labels, "reason"),
        )  # fmt: skip
        self.ttft = self._histogram(
            "shoal_time_to_first_token_seconds", "From a request's arrival to a sequence's first token", labels
        )
        self.inter_token = self._histogram(
            "shoal_inter_token_latency_seconds", "Between tokens; a mean where several came together", labels
        )
        self.tpot = self._histogram(
            "shoal_request_time_per_output_token_seconds", "Mean time per token behind the first, by sequence", labels
        )
        self.e2e = self._histogram("shoal_e2e_request_latency_seconds", "From arrival to a sequence's end", labels)
        self.queue = self._histogram(
            "shoal_request_queue_time_seconds", "In a router, from arrival to the first step", labels
        )
        self.prefill = self._histogram(
            "shoal_request_prefill_time_seconds", "In a router, from the first step to the first token", labels
        )
        self.decode = self._histogram(
            "shoal_request_decode_time_seconds", "In a router, from the first token to the last", labels
        )
        self.inference = self._histogram(
            "shoal_request_inference_time_seconds", "In a router, prefill and decode together", labels
        )
        self.num_prompt_tokens = self._histogram(
            "shoal_request_prompt_tokens", "Prompt tokens per sequence", labels, _TOKEN_BOUNDS
        )
        self.num_generation_tokens = self._histogram(
            "shoal_request_generation_tokens", "Generated tokens per sequence", labels, _TOKEN_BOUNDS
        )

    def for_team(self, fairness_key: str) -> TeamMetrics:
        """fairness_key: of the request; empty where there are no teams."""
        team = fairness_key or ANONYMOUS_TEAM
        found = self._teams.get(team)
        if found is None:
            if len(self._teams) >= MAX_TEAMS and team != OTHER_TEAM:
                return self.for_team(OTHER_TEAM)
            found = self._teams[team] = TeamMetrics(self, team)
        return found

    def count_http(self, route: str, status: int, arrived_s: float, error_code: str | None) -> None:
        """An HTTP request was answered. error_code: of an error body; None: there was none."""
        self._http_requests.labels(route, str(status)).inc()
        self._http_seconds.labels(route).observe(time.monotonic() - arrived_s)
        if error_code is not None:
            self._rejected.labels(error_code).inc()

    def _counter(self, name: str, text: str, labels: Sequence[str]) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, labels: Sequence[str], bounds: Sequence[float] = _LATENCY_BOUNDS_S
    ) -> Histogram:
        return Histogram(name, text, labels, registry=self.registry, buckets=bounds)


class TeamMetrics:
    """The metrics of one team, their labels looked up once."""

    def __init__(self, metrics: ApiMetrics, team: str) -> None:
        labels = (metrics.model, team)
        self.recent = metrics.recent
        self.prompt_tokens = metrics.prompt_tokens.labels(*labels)
        self.cached_tokens = metrics.cached_tokens.labels(*labels)
        self.generation_tokens = metrics.generation_tokens.labels(*labels)
        self.ttft = metrics.ttft.labels(*labels)
        self.inter_token = metrics.inter_token.labels(*labels)
        self.tpot = metrics.tpot.labels(*labels)
        self.e2e = metrics.e2e.labels(*labels)
        self.queue = metrics.queue.labels(*labels)
        self.prefill = metrics.prefill.labels(*labels)
        self.decode = metrics.decode.labels(*labels)
        self.inference = metrics.inference.labels(*labels)
        self.num_prompt_tokens = metrics.num_prompt_tokens.labels(*labels)
        self.num_generation_tokens = metrics.num_generation_tokens.labels(*labels)
        self._finished, self._failed, self._labels = metrics.finished, metrics.failed, labels

    def count_finished(self, reason: str) -> None:
        self._finished.labels(*self._labels, reason).inc()

    def count_failed(self, reason: str) -> None:
        self._failed.labels(*self._labels, reason).inc()
