"""Requests and tokens per minute, and requests at once, per key and per team.

Each limit per minute is a bucket that refills evenly. A request is let in if its prompt is covered; what it generates
is taken as it comes and may overdraw the bucket, which the following requests then wait for: nobody knows beforehand
how long an answer gets, and reserving max_tokens would refuse most of what fits. Pure; the clock is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from router.tenancy.key_file import Limits
from router.tenancy.key_ring import Account

# Of scopes that nobody has used for so long nothing is remembered: their buckets are full again.
FORGET_AFTER_S = 120.0


class Refusal(NamedTuple):
    """reason: for the client. retry_after_s: when it is worth trying again."""

    reason: str
    retry_after_s: float


class LimitState(NamedTuple):
    """Of one limit, as headers tell it. reset_s: until all of it is there again."""

    limit: int
    remaining: int
    reset_s: float


class ScopeUse(NamedTuple):
    """Of one key or team: requests and tokens since it was first seen, and requests being worked on."""

    scope_id: str
    num_requests: int
    num_tokens: int
    num_running: int


class Bucket:
    """What is left of a limit per minute. May be overdrawn."""

    def __init__(self, per_minute: int, now_s: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at_s = now_s

    def change(self, per_minute: int, now_s: float) -> None:
        """Another limit from now on; what was used stays used."""
        used = self.per_minute - self.level(now_s)
        self.per_minute = per_minute
        self._level = per_minute - used

    def level(self, now_s: float) -> float:
        if now_s > self._at_s:
            self._level = min(self.per_minute, self._level + (now_s - self._at_s) * self.per_minute / 60)
            self._at_s = now_s
        return self._level

    def take(self, amount: float, now_s: float) -> None:
        self._level = self.level(now_s) - amount

    def wait_s(self, amount: float, now_s: float) -> float:
        """Until amount is there, or the bucket full: one that asks for more than it ever holds gets in then."""
        missing = min(amount, self.per_minute) - self.level(now_s)
        return max(0.0, missing * 60 / self.per_minute)

    def state(self, now_s: float) -> LimitState:
        level = self.level(now_s)
        return LimitState(self.per_minute, max(0, math.floor(level)), (self.per_minute - level) * 60 / self.per_minute)


class _Scope:
    """Use of one key or one team. num_elsewhere: requests of it that other fronts work on. num_requests, num_tokens:
    taken by this front since the scope was first seen."""

    def __init__(self) -> None:
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None
        self.parallel: int | None = None
        self.num_running = 0
        self.num_elsewhere = 0
        self.num_requests = 0
        self.num_tokens = 0
        self.used_at_s = 0.0

    def set_limits(self, limits: Limits, now_s: float) -> None:
        self.requests = _renew(self.requests, limits.requests_per_minute, now_s)
        self.tokens = _renew(self.tokens, limits.tokens_per_minute, now_s)
        self.parallel = limits.parallel


class LimitBook:
    """What every key and team has left. Used by one thread."""

    def __init__(self, max_parallel: int, clock: Callable[[], float]) -> None:
        """max_parallel: requests that this front works on at once, of all teams. clock: seconds, monotonic."""
        self._max_parallel = max_parallel
        self._clock = clock
        self._scopes: dict[str, _Scope] = {}
        self._num_running = 0
        self._swept_at_s = clock()

    def admit(self, account: Account) -> Refusal | None:
        """Let a request in, or say why not. One that was let in must be ended by release()."""
        now_s = self._clock()
        scopes = self._renew_scopes(account, now_s)
        own = scopes[-1][1]
        # A team holds at most as many places as it leaves to others, so that a flood of one never shuts others out
        # (dynamic thresholds; Choudhury and Hahne, IEEE/ACM Transactions on Networking 6(2), 1998).
        if own.num_running >= self._max_parallel - self._num_running:
            return Refusal("This team has too many requests at once.", 1.0)
        for what, scope in scopes:
            if scope.parallel is not None and scope.num_running + scope.num_elsewhere >= scope.parallel:
                return Refusal(f"Limit of this {what}: {scope.parallel} requests at once.", 1.0)
            if scope.requests is not None and (wait_s := scope.requests.wait_s(1, now_s)) > 0:
                return Refusal(f"Limit of this {what}: {scope.requests.per_minute} requests per minute.", wait_s)
            # Nothing is known of its tokens yet; but with a bucket that is overdrawn it cannot begin.
            if scope.tokens is not None and (wait_s := scope.tokens.wait_s(1, now_s)) > 0:
                return Refusal(f"Limit of this {what}: {scope.tokens.per_minute} tokens per minute.", wait_s)
        self._num_running += 1
        for _, scope in scopes:
            scope.num_running += 1
            scope.num_requests += 1
            if scope.requests is not None:
                scope.requests.take(1, now_s)
        return None

    def release(self, account: Account) -> None:
        """A request that admit() let in has ended."""
        self._num_running -= 1
        for scope_id in account.scope_ids:
            self._scopes[scope_id].num_running -= 1

    def admit_tokens(self, account: Account, num_tokens: int) -> Refusal | None:
        """Take the tokens of a prompt, or say why they are not to be had now."""
        now_s = self._clock()
        scopes = self._renew_scopes(account, now_s)
        for what, scope in scopes:
            if scope.tokens is not None and (wait_s := scope.tokens.wait_s(num_tokens, now_s)) > 0:
                return Refusal(f"Limit of this {what}: {scope.tokens.per_minute} tokens per minute.", wait_s)
        _take_tokens((scope for _, scope in scopes), num_tokens, now_s)
        return None

    def bind_take(self, account: Account) -> Callable[[int], None]:
        """What takes tokens that were generated, as long as a request of the account runs. Overdraws where there are
        not enough."""
        scopes, clock = [self._scopes[scope_id] for scope_id in account.scope_ids], self._clock
        return lambda num_tokens: _take_tokens(scopes, num_tokens, clock())

    def note_elsewhere(
        self, scope_id: str, limits: Limits, num_requests: int, num_tokens: int, num_running: int
    ) -> None:
        """What other fronts took since they last told, and how many requests they work on now. limits: of the scope."""
        scope = self._scopes.get(scope_id)
        if scope is None:
            if num_requests == num_tokens == num_running == 0:
                return
            scope = self._scopes[scope_id] = _Scope()
        now_s = self._clock()
        scope.set_limits(limits, now_s)
        scope.num_elsewhere = num_running
        if num_requests or num_tokens or num_running:
            scope.used_at_s = now_s
        if scope.requests is not None:
            scope.requests.take(num_requests, now_s)
        if scope.tokens is not None:
            scope.tokens.take(num_tokens, now_s)

    def list_uses(self) -> list[ScopeUse]:
        """What this front let in, of the keys and teams that are not forgotten."""
        return [
            ScopeUse(scope_id, scope.num_requests, scope.num_tokens, scope.num_running)
            for scope_id, scope in self._scopes.items()
        ]

    def describe(self, account: Account) -> tuple[LimitState | None, LimitState | None]:
        """Requests and tokens per minute: of key or team, whichever has less left. None: no limit."""
        now_s = self._clock()
        scopes = [self._scopes[scope_id] for scope_id in account.scope_ids if scope_id in self._scopes]
        requests = [scope.requests.state(now_s) for scope in scopes if scope.requests is not None]
        tokens = [scope.tokens.state(now_s) for scope in scopes if scope.tokens is not None]
        least = min(requests, key=_remaining_share, default=None), min(tokens, key=_remaining_share, default=None)
        return least

    def _renew_scopes(self, account: Account, now_s: float) -> list[tuple[str, _Scope]]:
        """Those of key and team, with the limits that hold now. The team's is the last."""
        if now_s - self._swept_at_s > FORGET_AFTER_S:
            self._sweep(now_s)
        scopes: list[tuple[str, _Scope]] = []
        for scope_id, each in zip(account.scope_ids, account.scope_limits, strict=True):
            scope = self._scopes.setdefault(scope_id, _Scope())
            scope.used_at_s = now_s
            scope.set_limits(each, now_s)
            scopes.append((scope_id.partition(":")[0], scope))
        return scopes

    def _sweep(self, now_s: float) -> None:
        self._swept_at_s = now_s
        for scope_id, scope in list(self._scopes.items()):
            is_owed = scope.tokens is not None and scope.tokens.level(now_s) < scope.tokens.per_minute
            if scope.num_running == 0 and now_s - scope.used_at_s > FORGET_AFTER_S and not is_owed:
                del self._scopes[scope_id]


def _take_tokens(scopes: Iterable[_Scope], num_tokens: int, now_s: float) -> None:
    for scope in scopes:
        scope.num_tokens += num_tokens
        if scope.tokens is not None:
            scope.tokens.take(num_tokens, now_s)


def _renew(bucket: Bucket | None, per_minute: int | None, now_s: float) -> Bucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return Bucket(per_minute, now_s)
    if bucket.per_minute != per_minute:
        bucket.change(per_minute, now_s)
    return bucket


def _remaining_share(state: LimitState) -> float:
    return state.remaining / state.limit
