"""How long a sequence may reason: where its reasoning reaches the budget, the marker that ends it is put there.

The router knows nothing of it: what it has computed behind the budget is dropped, and the sequence goes on behind the
marker as if the model had written it, like one that changes its router (continuation.py).
"""

from __future__ import annotations

from typing import NamedTuple

from router.v1 import router_pb2


class ThinkingBudget(NamedTuple):
    """begin_id, end_id: tokens of the markers. is_open: the prompt ends within reasoning."""

    num_tokens: int
    begin_id: int | None
    end_id: int
    is_open: bool


class ThinkingMeter:
    """Of one sequence, over all routers that work on it."""

    def __init__(self, budget: ThinkingBudget) -> None:
        self._budget = budget
        self._is_open = budget.is_open
        self._num_tokens = 0

    def cut_(self, response: router_pb2.GenerateResponse) -> bool:
        """Count response in. Returns whether the budget is used up within it: then it ends in the marker, in place,
        and the sequence must go on from there."""
        for index, token in enumerate(response.tokens):
            if not self._is_open:
                self._is_open = token.token_id == self._budget.begin_id
                continue
            if token.token_id == self._budget.end_id:
                self._is_open = False
                continue
            self._num_tokens += 1
            is_last = index == len(response.tokens) - 1
            if is_last and response.finish_reason != router_pb2.FINISH_REASON_UNSPECIFIED:
                return False
            if self._num_tokens >= self._budget.num_tokens:
                del response.tokens[index + 1 :]
                response.tokens.append(_make_marker(token, self._budget.end_id))
                response.finish_reason = router_pb2.FINISH_REASON_UNSPECIFIED
                response.ClearField("stop_token_id")
                self._is_open = False
                return True
        return False


def _make_marker(like: router_pb2.TokenOutput, token_id: int) -> router_pb2.TokenOutput:
    """It was certain, and nothing else was considered."""
    marker = router_pb2.TokenOutput(token_id=token_id)
    if like.HasField("logprob"):
        marker.logprob = 0.0
    return marker
