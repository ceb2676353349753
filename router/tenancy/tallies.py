"""What processes tell each other of the service that accounts got, so that shares and limits hold over all of them.

Every router and every HTTP front keeps a tally: for each account what it has given since it started, and what waits or
runs there. Routers do not know each other, and the controller may be away; but each front knows all routers. So the
fronts carry the tallies: several times a second each gives every router all that it knows, and takes back all that the
router knows. Numbers only ever grow and a tally has a number, so it does not matter in which order, how often or by
whom one is brought. What is not heard of for a while counts no more as waiting or running.

Pure: no network; the clock is passed in.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from router.v1 import router_pb2

# A front that lives brings a new tally every quarter of a second.
EXCHANGE_INTERVAL_S = 0.25
SILENT_AFTER_S = 5.0
FORGET_AFTER_S = 60.0
# Of one exchange; a cluster has some routers and fronts, and its key file some teams.
MAX_TALLIES = 256
# A source that has told so often at most began within the last minute.
YOUNG_NUMBER = int(60 / EXCHANGE_INTERVAL_S)
MAX_ACCOUNTS = 4096

Key = tuple[int, str]


class Change(NamedTuple):
    """What all other sources together gave an account since the last call, and what is there now."""

    band: int
    account: str
    service: float
    num_requests: int
    num_tokens: int
    num_running: int
    is_backlogged: bool


class _Heard(NamedTuple):
    tally: router_pb2.Tally
    at_s: float


class TallyBook:
    """The newest tally of every source. Used by one thread."""

    def __init__(self, kind: router_pb2.TallyKind, clock: Callable[[], float]) -> None:
        """kind: of this process, whose changes take_changes() tells. clock: seconds, monotonic."""
        self._kind = kind
        self._clock = clock
        self._source = uuid.uuid4().hex
        self._number = 0
        self._heard: dict[str, _Heard] = {}
        # What was told last of an account; to be taken back when its sources fall silent.
        self._told: set[Key] = set()
        self._pending: dict[Key, Change] = {}

    def write_own(self, accounts: Iterable[router_pb2.AccountTally]) -> router_pb2.Tally:
        """The tally of this process, newer than those before."""
        self._number += 1
        return router_pb2.Tally(source=self._source, number=self._number, kind=self._kind, accounts=accounts)

    def list_known(self) -> list[router_pb2.Tally]:
        """Of other sources that are not silent."""
        now_s = self._clock()
        return [heard.tally for heard in self._heard.values() if now_s - heard.at_s < SILENT_AFTER_S][:MAX_TALLIES]

    def merge(self, tallies: Iterable[router_pb2.Tally]) -> None:
        """Tallies that somebody brought; those that are not new change nothing."""
        now_s = self._clock()
        for source, heard in list(self._heard.items()):
            if now_s - heard.at_s > FORGET_AFTER_S:
                del self._heard[source]
        for tally in tallies:
            heard = self._heard.get(tally.source)
            if tally.source == self._source or (heard is not None and tally.number <= heard.tally.number):
                continue
            if (heard is None and len(self._heard) >= MAX_TALLIES) or not _is_sound(tally):
                continue
            # Of a source that has been there for long the first one heard is where counting begins: what was given
            # before this process knew of it is nobody's advantage now.
            if tally.kind == self._kind and (heard is not None or tally.number <= YOUNG_NUMBER):
                self._note_growth(router_pb2.Tally() if heard is None else heard.tally, tally)
            self._heard[tally.source] = _Heard(tally, now_s)

    def take_changes(self) -> Iterator[Change]:
        """Growth since the last call, and the present state, of the accounts of all other processes of this kind."""
        now_s = self._clock()
        running: dict[Key, int] = {}
        backlogged: dict[Key, bool] = {}
        for heard in self._heard.values():
            if heard.tally.kind != self._kind or now_s - heard.at_s >= SILENT_AFTER_S:
                continue
            for account in heard.tally.accounts:
                key = (account.band, account.account)
                running[key] = running.get(key, 0) + account.num_running
                backlogged[key] = backlogged.get(key, False) or account.is_backlogged
        grown, self._pending = self._pending, {}
        for key in {*running, *grown, *self._told}:
            change = grown.get(key, Change(*key, 0.0, 0, 0, 0, False))
            yield change._replace(num_running=running.get(key, 0), is_backlogged=backlogged.get(key, False))
        self._told = set(running)

    def _note_growth(self, before: router_pb2.Tally, after: router_pb2.Tally) -> None:
        old = {(account.band, account.account): account for account in before.accounts}
        nothing = router_pb2.AccountTally()
        for account in after.accounts:
            key = (account.band, account.account)
            last = old.get(key, nothing)
            grown = self._pending.get(key, Change(*key, 0.0, 0, 0, 0, False))
            self._pending[key] = grown._replace(
                service=grown.service + account.service - last.service,
                num_requests=grown.num_requests + max(0, account.num_requests - last.num_requests),
                num_tokens=grown.num_tokens + max(0, account.num_tokens - last.num_tokens),
            )


def _is_sound(tally: router_pb2.Tally) -> bool:
    """Whether it may be counted: it came from the network."""
    return len(tally.accounts) <= MAX_ACCOUNTS and all(math.isfinite(account.service) for account in tally.accounts)
