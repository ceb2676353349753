"""What one sequence has got so far, and what is left to ask of the next router. Pure: it knows no network and no clock.

Tokens that a lost router sent become the end of the next one's prompt, which is told how many they are: to penalties
they are the answer's, and the sampler's noise depends on seed and position only, so the sequence goes on as if nothing
had happened. Only a router of the same weights may do so: no answer is made of two checkpoints.
"""

from __future__ import annotations

from router.api.thinking_budget import ThinkingBudget, ThinkingMeter
from router.v1 import router_pb2


class WeightsPin:
    """Whose weights answer one HTTP request, in all of its choices. version: 0: nothing was answered yet, or routers do
    not say."""

    def __init__(self) -> None:
        self.version = 0


class Continuation:
    """One sequence over all routers that work on it."""

    def __init__(
        self,
        request: router_pb2.GenerateRequest,
        eos_token_ids: frozenset[int],
        pin: WeightsPin,
        thinking: ThinkingBudget | None = None,
    ) -> None:
        self.is_cut = False
        """What this attempt would still bring is not wanted: the next one goes on behind a token put in."""
        self._thinking = None if thinking is None else ThinkingMeter(thinking)
        self._request = request
        self._pin = pin
        self._end_ids = frozenset(request.stop_token_ids) | (frozenset() if request.ignore_eos else eos_token_ids)
        self._token_ids: list[int] = []
        self._num_prompt_tokens = 0
        self._num_to_skip = 0
        self._router_us = _Sum()
        self._expert_us = _Sum()
        self._num_left_out = _Sum()

    @property
    def num_tokens(self) -> int:
        """Generated so far."""
        return len(self._token_ids)

    def begin_attempt(self) -> router_pb2.GenerateRequest:
        """The request for the next router: what goes on behind the tokens received."""
        self.is_cut = False
        self._router_us.begin()
        self._expert_us.begin()
        self._num_left_out.begin()
        self._request.weights_version = self._pin.version
        if not self._token_ids:
            self._num_to_skip = self._num_prompt_tokens  # prompt tokens come again from the first on
            return self._request
        self._num_to_skip = 0
        request = router_pb2.GenerateRequest()
        request.CopyFrom(self._request)
        request.prompt_token_ids.extend(self._token_ids)
        request.num_answer_tokens = self.num_tokens
        request.max_tokens -= self.num_tokens
        request.min_tokens = max(0, request.min_tokens - self.num_tokens)
        request.ClearField("prompt_logprobs")
        return request

    def is_foreign(self, response: router_pb2.GenerateResponse) -> bool:
        """Whether it is of other weights than what the client has, as the first tokens of a choice may be if another
        choice's came meanwhile. It must not be noted."""
        return self._pin.version not in (0, response.weights_version)

    def note_(self, response: router_pb2.GenerateResponse) -> bool:
        """Count response in, and make it one of the whole sequence, in place: without prompt tokens that an earlier
        router has brought, with the cost of all attempts, and with a finish reason if its last token ends the
        sequence, whether or not the router lives to say so. Returns whether it brings anything new."""
        response.router_us = self._router_us.add(response.router_us)
        response.expert_us = self._expert_us.add(response.expert_us)
        response.num_left_out = self._num_left_out.add(response.num_left_out)
        if self._num_to_skip > 0 and response.prompt_tokens:
            num_dropped = min(self._num_to_skip, len(response.prompt_tokens))
            self._num_to_skip -= num_dropped
            del response.prompt_tokens[:num_dropped]
        self._num_prompt_tokens += len(response.prompt_tokens)
        self.is_cut = self._thinking is not None and self._thinking.cut_(response)
        self._token_ids.extend(token.token_id for token in response.tokens)
        if response.tokens and response.finish_reason == router_pb2.FINISH_REASON_UNSPECIFIED:
            self._finish_(response)
        is_new = bool(response.prompt_tokens or response.tokens)
        if is_new:
            self._pin.version = response.weights_version
        return is_new

    def _finish_(self, response: router_pb2.GenerateResponse) -> None:
        last = self._token_ids[-1]
        if last in self._end_ids and self.num_tokens > self._request.min_tokens:
            response.finish_reason = router_pb2.FINISH_REASON_STOP
            response.stop_token_id = last
        elif self.num_tokens >= self._request.max_tokens:
            response.finish_reason = router_pb2.FINISH_REASON_LENGTH


class _Sum:
    """Of a count that begins anew with every attempt."""

    def __init__(self) -> None:
        self._before = 0
        self._total = 0

    def begin(self) -> None:
        self._before = self._total

    def add(self, count: int) -> int:
        """count: of the present attempt so far. Returns that of all."""
        self._total = self._before + count
        return self._total
