"""What `shoal bench` reports: latencies, rates and goodput of a list of outcomes. Pure.

TTFT  time to first token: from when the request was due to the first text of its answer.
TPOT  time per output token: from first to last, divided by the tokens after the first; one number per request.
ITL   inter-token latency: every pause between two pieces of an answer.
E2E   end to end: from when the request was due to the end of its answer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import SettingsError

_METRICS = ("ttft", "tpot", "e2e")


@dataclass(frozen=True)
class Outcome:
    """One request. Times in seconds from the start of the run. error: None if it was answered to the end, else the
    kind of failure. first_s and last_s: of the pieces of the answer; None if there was none. gaps_s: between them."""

    due_s: float
    ended_s: float
    error: str | None = None
    first_s: float | None = None
    last_s: float | None = None
    gaps_s: tuple[float, ...] = ()
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_s is None else self.first_s - self.due_s

    @property
    def tpot_s(self) -> float | None:
        """None for an answer of one token."""
        if self.first_s is None or self.last_s is None or self.num_output_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.num_output_tokens - 1)

    @property
    def e2e_s(self) -> float:
        return self.ended_s - self.due_s


def parse_slo(text: str) -> dict[str, float]:
    """ttft=500,tpot=50ms,e2e=10s: limits in seconds by metric; a bare number is milliseconds. Raises SettingsError."""
    limits_s: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)=(\d+(?:\.\d+)?)(ms|s)?\s*", part)
        if match is None or match[1] not in _METRICS:
            raise SettingsError(f"{part!r} is no objective: write ttft=500,tpot=50,e2e=10s (milliseconds unless said)")
        limits_s[match[1]] = float(match[2]) * (1.0 if match[3] == "s" else 1e-3)
    return limits_s


def meets(outcome: Outcome, limits_s: dict[str, float]) -> bool:
    """Whether a request counts for goodput. An answer of one token has no TPOT to miss."""
    if outcome.error is not None:
        return False
    values = {"ttft": outcome.ttft_s, "tpot": outcome.tpot_s, "e2e": outcome.e2e_s}
    return all((value := values[name]) is None or value <= limit_s for name, limit_s in limits_s.items())


def summarize(outcomes: Sequence[Outcome], duration_s: float, limits_s: dict[str, float]) -> dict[str, Any]:
    """The report's figures. Latencies are those of answered requests, in milliseconds."""
    answered = [outcome for outcome in outcomes if outcome.error is None]
    num_output = sum(outcome.num_output_tokens for outcome in answered)
    num_prompt = sum(outcome.num_prompt_tokens for outcome in answered)
    errors = Counter(outcome.error for outcome in outcomes if outcome.error is not None)
    report: dict[str, Any] = {
        "duration_s": round(duration_s, 3),
        "num_requests": len(outcomes),
        "num_answered": len(answered),
        "errors": dict(sorted(errors.items())),
        "num_prompt_tokens": num_prompt,
        "num_output_tokens": num_output,
        "requests_per_s": _rate(len(answered), duration_s),
        "output_tokens_per_s": _rate(num_output, duration_s),
        "total_tokens_per_s": _rate(num_prompt + num_output, duration_s),
        "ttft_ms": _describe([value for outcome in answered if (value := outcome.ttft_s) is not None]),
        "tpot_ms": _describe([value for outcome in answered if (value := outcome.tpot_s) is not None]),
        "itl_ms": _describe([gap_s for outcome in answered for gap_s in outcome.gaps_s]),
        "e2e_ms": _describe([outcome.e2e_s for outcome in answered]),
    }
    if limits_s:
        num_good = sum(meets(outcome, limits_s) for outcome in outcomes)
        report["slo_ms"] = {name: limit_s * 1e3 for name, limit_s in limits_s.items()}
        report["goodput_requests_per_s"] = _rate(num_good, duration_s)
        report["goodput_fraction"] = round(num_good / len(outcomes), 4) if outcomes else None
    return report


def compute_percentile(ordered: Sequence[float], percent: float) -> float:
    """Of ascending values, linear between neighbours. Raises ValueError if there are none."""
    if not ordered:
        raise ValueError("no values have no percentile")
    position = percent / 100 * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def _describe(values_s: Sequence[float]) -> dict[str, float] | None:
    """In milliseconds; None if there are no values."""
    if not values_s:
        return None
    ordered = sorted(values_s)
    figures = {"mean": sum(ordered) / len(ordered)}
    figures |= {f"p{percent}": compute_percentile(ordered, percent) for percent in (50, 90, 99)}
    return {name: round(value * 1e3, 3) for name, value in figures.items()}


def _rate(count: int, duration_s: float) -> float:
    return round(count / duration_s, 3) if duration_s > 0 else 0.0
