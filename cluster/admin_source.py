"""The front's view of the cluster: the controller's admin API, read with the viewer token.

The controller's address is in the record store and changes when it is restarted, so it is looked up again after every
failure.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import httpx

from cluster.errors import BadRecord, StoreUnavailable
from cluster.record_store import RecordStore
from cluster.records import CONTROLLER_KEY, controller_from_json

logger = logging.getLogger(__name__)

# Of the status page, which shows what it has when the controller is away.
CALL_TIMEOUT_S = 3.0


class AdminSource:
    """A router.api.cluster_source.ClusterSource. Use it on one event loop only."""

    def __init__(self, store: RecordStore, viewer_token: str) -> None:
        self._store = store
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {viewer_token}"}, timeout=CALL_TIMEOUT_S, trust_env=False
        )
        self._admin_url: str | None = None

    async def fetch_status(self) -> dict[str, Any] | None:
        return await self._get("/status")

    async def fetch_events(self, after: int) -> Sequence[dict[str, Any]] | None:
        document = await self._get(f"/events?after={after}")
        return None if document is None else document["events"]

    async def fetch_expert_load(self) -> dict[str, Any] | None:
        return await self._get("/load")

    async def close(self) -> None:
        await self._client.aclose()

    async def _get(self, path: str) -> dict[str, Any] | None:
        try:
            admin_url = self._admin_url
            if admin_url is None:
                data = await asyncio.to_thread(self._store.get, CONTROLLER_KEY)
                if data is None:
                    return None
                admin_url = self._admin_url = controller_from_json(data).admin_url
            response = await self._client.get(admin_url + path)
            response.raise_for_status()
            return response.json()
        except (httpx.HTTPError, StoreUnavailable, BadRecord, ValueError) as error:
            self._admin_url = None
            logger.info("the controller does not answer path=%s: %s", path, error or type(error).__name__)
            return None
