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

from cluster.admin_tls import get_ca_time_ns, list_client_options, list_request_options
from cluster.errors import BadRecord, StoreUnavailable
from cluster.record_store import RecordStore
from cluster.records import CONTROLLER_KEY, controller_from_json
from experts.errors import ConfigError

logger = logging.getLogger(__name__)

# Of the status page, which shows what it has when the controller is away.
CALL_TIMEOUT_S = 3.0


class AdminSource:
    """A router.api.cluster_source.ClusterSource. Use it on one event loop only."""

    def __init__(self, store: RecordStore, viewer_token: str, tls_dir: str | None = None) -> None:
        """tls_dir: folder with the ca.crt that controllers are known by; None: http."""
        self._store = store
        self._viewer_token = viewer_token
        self._tls_dir = tls_dir
        self._request_options = list_request_options(tls_dir)
        # The last one is used; requests may still be on their way with those before.
        self._clients: list[httpx.AsyncClient] = []
        self._ca_time_ns = 0
        self._admin_url: str | None = None

    async def fetch_status(self) -> dict[str, Any] | None:
        return await self._get("/status")

    async def fetch_events(self, after: int) -> Sequence[dict[str, Any]] | None:
        document = await self._get(f"/events?after={after}")
        return None if document is None else document["events"]

    async def fetch_expert_load(self) -> dict[str, Any] | None:
        return await self._get("/load")

    async def close(self) -> None:
        await asyncio.gather(*(client.aclose() for client in self._clients))

    async def _get(self, path: str) -> dict[str, Any] | None:
        try:
            admin_url = self._admin_url
            if admin_url is None:
                data = await asyncio.to_thread(self._store.get, CONTROLLER_KEY)
                if data is None:
                    return None
                admin_url = self._admin_url = controller_from_json(data).admin_url
            response = await self._get_client().get(admin_url + path, **self._request_options)
            response.raise_for_status()
            return response.json()
        except (httpx.HTTPError, StoreUnavailable, BadRecord, ConfigError, ValueError) as error:
            self._admin_url = None
            logger.info("the controller does not answer path=%s: %s", path, error or type(error).__name__)
            return None

    def _get_client(self) -> httpx.AsyncClient:
        """Another one when the CA has been changed: the one before believes nobody else."""
        changed_ns = 0 if self._tls_dir is None else get_ca_time_ns(self._tls_dir)
        if self._clients and self._ca_time_ns == changed_ns:
            return self._clients[-1]
        self._ca_time_ns = changed_ns
        self._clients.append(
            httpx.AsyncClient(
                headers={"Authorization": f"Bearer {self._viewer_token}"},
                timeout=CALL_TIMEOUT_S,
                trust_env=False,
                **list_client_options(self._tls_dir),
            )
        )
        return self._clients[-1]
