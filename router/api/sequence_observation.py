"""One sequence as the front sees it go by, counted into the metrics of its team."""

from __future__ import annotations

import time

from router.api.api_metrics import ApiMetrics
from router.api.request_scope import current_request
from router.v1 import router_pb2

_REASONS = {router_pb2.FINISH_REASON_STOP: "stop", router_pb2.FINISH_REASON_LENGTH: "length"}


class SequenceObservation:
    """Begins with the sequence; ends with end() or fail(), of which the first one counts."""

    def __init__(self, metrics: ApiMetrics, request: router_pb2.GenerateRequest) -> None:
        scope = current_request.get()
        self._metrics = metrics.for_team(request.fairness_key)
        self._arrived_s = time.monotonic() if scope is None else scope.arrived_s
        self._num_prompt_tokens = len(request.prompt_token_ids)
        self._num_tokens = 0
        self._first_s = self._last_s = 0.0
        self._has_begun = False
        self._has_ended = False

    def note(self, response: router_pb2.GenerateResponse) -> None:
        """A response that goes to the client."""
        metrics, now_s = self._metrics, time.monotonic()
        if not self._has_begun:
            self._has_begun = True
            metrics.prompt_tokens.inc(self._num_prompt_tokens)
            metrics.cached_tokens.inc(response.cached_tokens)
            metrics.recent.add_request(now_s, self._num_prompt_tokens)
        num_tokens = len(response.tokens)
        if num_tokens:
            if self._num_tokens == 0:
                self._first_s = now_s
                metrics.ttft.observe(now_s - self._arrived_s)
                metrics.recent.add_ttft(now_s, now_s - self._arrived_s)
            else:
                metrics.inter_token.observe((now_s - self._last_s) / num_tokens)
            self._last_s = now_s
            self._num_tokens += num_tokens
            metrics.generation_tokens.inc(num_tokens)
            metrics.recent.add_tokens(now_s, num_tokens)
        if response.HasField("times"):
            times = response.times
            metrics.queue.observe(times.queue_us / 1e6)
            metrics.prefill.observe(times.prefill_us / 1e6)
            metrics.decode.observe(times.decode_us / 1e6)
            metrics.inference.observe((times.prefill_us + times.decode_us) / 1e6)
        reason = _REASONS.get(response.finish_reason)
        if reason is not None:
            self.end(reason)

    def end(self, reason: str) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        metrics, now_s = self._metrics, time.monotonic()
        metrics.count_finished(reason)
        metrics.e2e.observe(now_s - self._arrived_s)
        metrics.num_prompt_tokens.observe(self._num_prompt_tokens)
        metrics.num_generation_tokens.observe(self._num_tokens)
        if self._num_tokens > 1:
            tpot_s = (self._last_s - self._first_s) / (self._num_tokens - 1)
            metrics.tpot.observe(tpot_s)
            metrics.recent.add_tpot(now_s, tpot_s)

    def fail(self, reason: str) -> None:
        """reason: abort, or the code of an error."""
        if not self._has_ended:
            self._has_ended = True
            self._metrics.count_failed(reason)
