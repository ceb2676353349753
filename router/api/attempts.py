"""How long, and how often, one sequence is offered to routers. Pure but for the pause; times are the event loop's."""

from __future__ import annotations

import asyncio
import enum
from typing import NamedTuple

from router.api.errors import ApiError, Overloaded, Unavailable

# Pause before a request is offered again to routers that have all turned it away.
_FIRST_PAUSE_S = 0.05
_LAST_PAUSE_S = 1.0
# A request that has cost this many routers their life or their connection may be what kills them...
_MAX_ROUTERS_LOST = 3
# ...unless they got on with it: a request that is poison kills at once or, where one token is enough, a few later.
_PROGRESS_TOKENS = 16


class FailureKind(enum.Enum):
    """LOST: the router, or the connection to it. UNREACHED: it could not even be asked. REFUSED: it answered that it
    cannot now, because it starts, drains or stops. OVERLOADED: its queue is full. NO_EXPERTS: it has waited for an
    expert group for as long as anybody may wait."""

    LOST = "lost"
    UNREACHED = "unreached"
    REFUSED = "refused"
    OVERLOADED = "overloaded"
    NO_EXPERTS = "no experts"


class Failure(NamedTuple):
    """since_s: from when on the time without a router counts."""

    kind: FailureKind
    reason: str
    since_s: float


class Attempts:
    """Mutated as one sequence is offered. Everything but the count of lost routers starts anew with every token."""

    def __init__(self, router_wait_s: float) -> None:
        self._router_wait_s = router_wait_s
        self.tried: set[str] = set()
        self._kinds: set[FailureKind] = set()
        self._give_up_at_s: float | None = None
        self._pause_s = _FIRST_PAUSE_S
        self._num_lost = 0
        self._num_tokens = 0
        self._is_accepted = False

    @property
    def is_first(self) -> bool:
        """Whether nothing has failed since the last token."""
        return self._give_up_at_s is None

    @property
    def is_dangerous(self) -> bool:
        """Whether routers keep dying of this sequence."""
        return self._num_lost >= _MAX_ROUTERS_LOST

    def progressed(self) -> None:
        """The sequence has got something new."""
        self._is_accepted = True
        self.tried.clear()
        self._kinds.clear()
        self._give_up_at_s = None
        self._pause_s = _FIRST_PAUSE_S

    def failed(self, endpoint: str, failure: Failure, num_tokens: int) -> None:
        """num_tokens: that the sequence has, all attempts together."""
        if num_tokens >= self._num_tokens + _PROGRESS_TOKENS:
            self._num_lost = 0
        self._num_tokens = num_tokens
        if failure.kind is FailureKind.LOST:
            self._num_lost += 1
            self._is_accepted = True
        self.tried.add(endpoint)
        self._kinds.add(failure.kind)
        if self._give_up_at_s is None:
            self._give_up_at_s = failure.since_s + self._router_wait_s

    async def pause(self, now_s: float) -> bool:
        """All known routers were tried: wait a moment and forget about it. False: give up instead."""
        if self._give_up_at_s is None:
            self._give_up_at_s = now_s + self._router_wait_s
        if self._is_final() or now_s + self._pause_s > self._give_up_at_s:
            return False
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, _LAST_PAUSE_S)
        self.tried.clear()
        self._kinds.clear()
        return True

    def error(self, retry_after_s: int) -> ApiError:
        """What the client is told."""
        if FailureKind.NO_EXPERTS in self._kinds:
            return Unavailable("Experts of the model are not served at the moment.", retry_after_s=retry_after_s)
        if FailureKind.OVERLOADED in self._kinds:
            return Overloaded("The server is at its limit of waiting requests.", retry_after_s=retry_after_s)
        return Unavailable("No router can take the request at the moment.", retry_after_s=retry_after_s)

    def _is_final(self) -> bool:
        """Whether the answer of a router that lives is that waiting does not help. A new request is then turned away
        while others may be starting. One that a router had taken waits for those, and for room."""
        if self._is_accepted:
            return self._kinds == {FailureKind.NO_EXPERTS}
        return FailureKind.NO_EXPERTS in self._kinds or FailureKind.OVERLOADED in self._kinds
