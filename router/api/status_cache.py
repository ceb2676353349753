"""The routers' statuses, at most a second old, however many ask."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from router.api.router_client import RouterClient, RouterStatus

MAX_AGE_S = 1.0


class StatusCache:
    """Use it on one event loop only."""

    def __init__(self, routers: RouterClient, max_age_s: float = MAX_AGE_S) -> None:
        self.max_age_s = max_age_s
        self._routers = routers
        self._fetch: asyncio.Task[list[RouterStatus]] | None = None
        self._started_s = 0.0

    async def get(self) -> Sequence[RouterStatus]:
        """Those who ask while an answer is on its way share it."""
        loop = asyncio.get_running_loop()
        if self._fetch is None or (self._fetch.done() and loop.time() - self._started_s > self.max_age_s):
            self._started_s = loop.time()
            self._fetch = loop.create_task(self._routers.fetch_statuses())
        return await asyncio.shield(self._fetch)
