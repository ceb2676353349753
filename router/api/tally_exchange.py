"""A front's part in the exchange of tallies: it carries them between routers, and keeps limits with other fronts.

See router/tenancy/tallies.py. Runs beside the requests, and only where there are keys: without them there is one team.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from router.api.admission import Accounts
from router.api.router_client import RouterClient
from router.tenancy.tallies import EXCHANGE_INTERVAL_S, TallyBook
from router.v1 import router_pb2

logger = logging.getLogger(__name__)

# Of one round; a router that is busy for longer is told the next time.
_ROUND_TIMEOUT_S = 1.0


@asynccontextmanager
async def sharing(routers: RouterClient, accounts: Accounts) -> AsyncGenerator[None, None]:
    """As long as it is entered, shares and limits hold over all routers and fronts."""
    if not accounts.has_keys:
        yield
        return
    task = asyncio.create_task(_exchange_forever(routers, accounts), name="tallies")
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _exchange_forever(routers: RouterClient, accounts: Accounts) -> None:
    book = TallyBook(router_pb2.TALLY_KIND_FRONT, time.monotonic)
    while True:
        await asyncio.sleep(EXCHANGE_INTERVAL_S)
        try:
            await _exchange(routers, accounts, book)
        except Exception:  # The next round may do better; without any, shares and limits hold for each process alone.
            logger.exception("tallies were not exchanged")


async def _exchange(routers: RouterClient, accounts: Accounts, book: TallyBook) -> None:
    own = book.write_own(
        router_pb2.AccountTally(
            account=use.scope_id, num_requests=use.num_requests, num_tokens=use.num_tokens, num_running=use.num_running
        )
        for use in accounts.limits.list_uses()
    )
    book.merge(await routers.exchange_tallies([own, *book.list_known()], _ROUND_TIMEOUT_S))
    for change in book.take_changes():
        if (limits := accounts.find_limits(change.account)) is not None:
            accounts.limits.note_elsewhere(
                change.account, limits, change.num_requests, change.num_tokens, change.num_running
            )
