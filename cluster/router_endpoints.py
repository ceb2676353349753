"""Where the HTTP front finds routers: their records, the ones that are ready.

While a cluster is upgraded there are routers of two checkpoints. The stored spec says which of them new requests go to;
the others are there for answers that were begun with their weights.

The answer of the last look is kept: with the Ray head gone, requests still reach the routers that were there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from cluster.errors import BadRecord, StoreUnavailable
from cluster.record_store import RecordStore
from cluster.records import ROUTER_PREFIX, SPEC_KEY, RouterRecord, StartState
from cluster.spec import spec_from_json
from router.api.router_client import RouterEndpoint

logger = logging.getLogger(__name__)


class RecordedEndpoints:
    """A router.api.router_client.RouterEndpoints over the record store."""

    def __init__(self, store: RecordStore) -> None:
        self._store = store
        self._known: Sequence[RouterEndpoint] = ()

    async def get(self) -> Sequence[RouterEndpoint]:
        """Of the routers, by router id. Never raises: a look that fails gives the last answer."""
        try:
            values = await asyncio.to_thread(self._store.get_all, ROUTER_PREFIX)
            spec = await asyncio.to_thread(self._store.get, SPEC_KEY)
            serving_version = 1 if spec is None else spec_from_json(spec).weights_version
        except (StoreUnavailable, BadRecord) as error:
            logger.warning("using the routers known before: %s", error)
            return self._known
        endpoints: list[RouterEndpoint] = []
        for key in sorted(values):
            try:
                record = RouterRecord.from_json(values[key])
            except BadRecord as error:
                logger.warning("ignoring the record %s: %s", key.decode(errors="replace"), error)
                continue
            if record.state is StartState.READY and record.endpoint is not None:
                version = record.weights_version
                endpoints.append(RouterEndpoint(record.endpoint, version, takes_new=version == serving_version))
        self._known = endpoints
        return endpoints
