"""The last minutes as this front saw them: tokens and requests per second, and what clients waited. For people who look
at the status page; Prometheus has histograms. No clock in here: times are handed in, in seconds of a monotonic clock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WINDOW_S = 300
# At 100 requests per second the last 40 s of them.
MAX_LATENCIES = 4096


@dataclass(slots=True)
class _Second:
    second: int
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    num_requests: int = 0


class RecentActivity:
    """Owned by one event loop."""

    def __init__(self) -> None:
        self._seconds: deque[_Second] = deque(maxlen=WINDOW_S)
        # (when, seconds)
        self._ttft_s: deque[tuple[float, float]] = deque(maxlen=MAX_LATENCIES)
        self._tpot_s: deque[tuple[float, float]] = deque(maxlen=MAX_LATENCIES)

    def add_tokens(self, now_s: float, num_tokens: int) -> None:
        self._at(now_s).num_tokens += num_tokens

    def add_request(self, now_s: float, num_prompt_tokens: int) -> None:
        second = self._at(now_s)
        second.num_requests += 1
        second.num_prompt_tokens += num_prompt_tokens

    def add_ttft(self, now_s: float, ttft_s: float) -> None:
        self._ttft_s.append((now_s, ttft_s))

    def add_tpot(self, now_s: float, tpot_s: float) -> None:
        self._tpot_s.append((now_s, tpot_s))

    def snapshot(self, now_s: float) -> dict[str, Any]:
        """Per second, oldest first and without the running one; latencies of the window in ms, None without any."""
        last = int(now_s) - 1
        found = {item.second: item for item in self._seconds}
        seconds = [found.get(second, _Second(second)) for second in range(last - WINDOW_S + 1, last + 1)]
        since_s = now_s - WINDOW_S
        return {
            "window_s": WINDOW_S,
            "tokens_per_s": [item.num_tokens for item in seconds],
            "prompt_tokens_per_s": [item.num_prompt_tokens for item in seconds],
            "requests_per_s": [item.num_requests for item in seconds],
            "ttft_ms": _describe([value for when, value in self._ttft_s if when >= since_s]),
            "tpot_ms": _describe([value for when, value in self._tpot_s if when >= since_s]),
        }

    def _at(self, now_s: float) -> _Second:
        second = int(now_s)
        if not self._seconds or self._seconds[-1].second < second:
            self._seconds.append(_Second(second))
        return self._seconds[-1]


def _describe(values_s: Sequence[float]) -> dict[str, float | int | None]:
    ordered = sorted(values_s)

    def quantile_ms(share: float) -> float | None:
        return round(ordered[max(0, math.ceil(share * len(ordered)) - 1)] * 1000, 3) if ordered else None

    return {"num": len(ordered), "p50": quantile_ms(0.5), "p90": quantile_ms(0.9), "p99": quantile_ms(0.99)}
