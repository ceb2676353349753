"""A router's part in the exchange of tallies: it tells what it gave, and hears what other routers gave.

See router/tenancy/tallies.py for how they travel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from router.fair_queue import FairQueue
from router.tenancy.tallies import TallyBook
from router.v1 import router_pb2


class ServiceTallies:
    """Owned by the router's event loop."""

    def __init__(self, queue: FairQueue | None, clock: Callable[[], float]) -> None:
        """queue: None: this router shares out nothing, it only passes on what it hears."""
        self._queue = queue
        self._book = TallyBook(router_pb2.TALLY_KIND_ROUTER, clock)

    def exchange(self, tallies: Iterable[router_pb2.Tally]) -> list[router_pb2.Tally]:
        """Take over what is new. Returns what this router knows, its own tally included."""
        self._book.merge(tallies)
        known = self._book.list_known()
        if self._queue is None:
            return known
        for change in self._book.take_changes():
            self._queue.note_elsewhere(change.band, change.account, change.service, is_backlogged=change.is_backlogged)
        accounts = (
            router_pb2.AccountTally(
                account=each.account, band=each.band, service=each.service, is_backlogged=each.is_backlogged
            )
            for each in self._queue.list_service()
        )
        return [self._book.write_own(accounts), *known]
