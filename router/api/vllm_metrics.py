"""The same figures under vLLM's names (--metrics-compat=vllm), for boards and endpoint pickers that know only these.

Names and meanings: https://docs.vllm.ai/en/latest/usage/metrics.html. Labels that vLLM has not are added up: `team`
and `router`; shares are averaged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from prometheus_client.metrics_core import Metric

_NAMES = {
    f"shoal_{name}": f"vllm:{name}"
    for name in (
        *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions"),
        *("prefix_cache_queries", "prefix_cache_hits", "prompt_tokens", "generation_tokens", "request_success"),
        *("time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds"),
        *("e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds"),
        *("request_decode_time_seconds", "request_inference_time_seconds"),
        *("request_prompt_tokens", "request_generation_tokens"),
    )
}
_AVERAGED = frozenset({"shoal_kv_cache_usage_perc"})
_DROPPED_LABELS = frozenset({"team", "router"})


def add_vllm_names(families: Iterable[Metric]) -> list[Metric]:
    """The families, and behind them those that vLLM has, too, under its names."""
    families = list(families)
    return [*families, *(_translate(family) for family in families if family.name in _NAMES)]


def _translate(family: Metric) -> Metric:
    name = _NAMES[family.name]
    grouped: defaultdict[tuple[str, tuple[tuple[str, str], ...]], list[float]] = defaultdict(list)
    for sample in family.samples:
        labels = tuple(
            ("model_name" if key == "model" else key, value)
            for key, value in sample.labels.items()
            if key not in _DROPPED_LABELS
        )
        grouped[sample.name.replace(family.name, name, 1), labels].append(sample.value)
    translated = Metric(name, family.documentation, family.type)
    for (sample_name, labels), values in grouped.items():
        value = sum(values) / (len(values) if family.name in _AVERAGED else 1)
        translated.add_sample(sample_name, dict(labels), value)
    return translated
