"""Where the HTTP front finds routers: their records, the ones that are ready.

The answer of the last look is kept: with the Ray head gone, requests still reach the routers that were there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from cluster.errors import BadRecord, StoreUnavailable
from cluster.record_store import RecordStore
from cluster.records import ROUTER_PREFIX, RouterRecord, StartState

logger = logging.getLogger(__name__)


class RecordedEndpoints:
    """A router.api.router_client.RouterEndpoints over the record store."""

    def __init__(self, store: RecordStore) -> None:
        self._store = store
        self._known: Sequence[str] = ()

    async def get(self) -> Sequence[str]:
        """host:port of the routers, by router id. Never raises: a look that fails gives the last answer."""
        try:
            values = await asyncio.to_thread(self._store.get_all, ROUTER_PREFIX)
        except StoreUnavailable as error:
            logger.warning("using the routers known before: %s", error)
            return self._known
        endpoints: list[str] = []
        for key in sorted(values):
            try:
                record = RouterRecord.from_json(values[key])
            except BadRecord as error:
                logger.warning("ignoring the record %s: %s", key.decode(errors="replace"), error)
                continue
            if record.state is StartState.READY and record.endpoint is not None:
                endpoints.append(record.endpoint)
        self._known = endpoints
        return endpoints
