"""Where the status page learns of the cluster around the routers. Known only where a controller runs (cluster/)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class ClusterSource(Protocol):
    """Objects of the admin API, see cluster/status_view.py; each None when the controller does not answer in time."""

    async def fetch_status(self) -> dict[str, Any] | None: ...

    async def fetch_events(self, after: int) -> Sequence[dict[str, Any]] | None:
        """Events with a greater sequence number, oldest first."""
        ...

    async def fetch_expert_load(self) -> dict[str, Any] | None: ...

    async def close(self) -> None: ...


class NoCluster:
    """For a front that runs by itself."""

    async def fetch_status(self) -> None:
        return None

    async def fetch_events(self, after: int) -> None:
        return None

    async def fetch_expert_load(self) -> None:
        return None

    async def close(self) -> None: ...
