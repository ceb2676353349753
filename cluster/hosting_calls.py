"""Has replicas load and release experts: one call per replica at a time, each in a thread of its own.

The controller's turns ask again and again; a call that runs is not repeated, and one that failed only after a while.
Why a replica cannot do what it was asked is kept for the balancer, which then leaves the experts where they are.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Protocol

from cluster.errors import ChangeRefused, StoreUnavailable
from cluster.hosting import Ranges

logger = logging.getLogger(__name__)

# Reading a group's experts from a slow disk.
CALL_TIMEOUT_S = 3600.0
RETRY_S = 5.0


class HostingFactory(Protocol):
    def host_experts(self, replica_id: str, hosted: Ranges, timeout_s: float) -> None: ...


class HostingCalls:
    """Lives on one event loop."""

    def __init__(self, factory: HostingFactory, clock: Callable[[], float]) -> None:
        """clock: seconds, monotonic."""
        self._factory = factory
        self._clock = clock
        self._calls: dict[str, asyncio.Task[Any]] = {}
        # When a replica may be asked again.
        self._retry_at_s: dict[str, float] = {}
        # The last refusal, until it is taken.
        self._refusal: str | None = None

    def ask(self, replica_id: str, hosted: Ranges) -> bool:
        """Have a replica hold exactly these experts. Whether a call was begun."""
        if replica_id in self._calls or self._clock() < self._retry_at_s.get(replica_id, 0.0):
            return False
        self._calls[replica_id] = asyncio.create_task(self._call(replica_id, hosted))
        return True

    def take_refusal(self) -> str | None:
        """Why a replica could not do what it was asked, since this was asked last; None: all could."""
        refusal, self._refusal = self._refusal, None
        return refusal

    async def _call(self, replica_id: str, hosted: Ranges) -> None:
        self._retry_at_s[replica_id] = 0.0
        try:
            await asyncio.to_thread(self._factory.host_experts, replica_id, hosted, CALL_TIMEOUT_S)
        except ChangeRefused as error:
            self._refusal = f"replica {replica_id}: {error}"
            self._retry_at_s[replica_id] = self._clock() + RETRY_S
        except StoreUnavailable as error:
            # The replica is being restarted, or Ray is away.
            logger.info("not asked to host experts replica_id=%s: %s", replica_id, error)
            self._retry_at_s[replica_id] = self._clock() + RETRY_S
        finally:
            del self._calls[replica_id]
