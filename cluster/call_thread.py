"""Blocking calls into something that may hang, from an event loop that may not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from cluster.errors import StoreUnavailable

CALL_TIMEOUT_S = 10.0

T = TypeVar("T")


class CallThread:
    """Runs blocking calls one at a time, each with a deadline; while one hangs, further ones fail at once.

    The controller's turns and the admin API's requests call at the same time: they wait for each other.
    """

    def __init__(self, name: str) -> None:
        """name: of what answers, for errors."""
        self._name = name
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._turn = asyncio.Lock()
        # A call that did not answer in time and still runs.
        self._hanging: asyncio.Future[Any] | None = None

    async def call(self, function: Callable[[], T]) -> T:
        """Raises StoreUnavailable when there is no answer in time, or what function raises."""
        async with self._turn:
            if self._hanging is not None and not self._hanging.done():
                raise StoreUnavailable(f"{self._name} still hangs in an earlier call")
            future = asyncio.get_running_loop().run_in_executor(self._executor, function)
            done, _ = await asyncio.wait([future], timeout=CALL_TIMEOUT_S)
            if not done:
                self._hanging = future
                future.add_done_callback(_discard_outcome)
                raise StoreUnavailable(f"{self._name} did not answer within {CALL_TIMEOUT_S:.0f} s")
            return future.result()


def _discard_outcome(future: asyncio.Future[Any]) -> None:
    """A late error has been told as a timeout already."""
    if not future.cancelled():
        future.exception()
