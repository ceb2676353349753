"""SIGTERM and SIGINT as something to wait for.

A handler runs in the main thread between any two of its instructions, so it may take no lock which that thread can
hold: threading.Event has one, and a signal that arrives while the event is waited for, or a second signal during the
first, would stop the process for ever. queue.SimpleQueue.put() is reentrant (Python's documentation of queue says so).
"""

from __future__ import annotations

import contextlib
import queue
import signal
from types import FrameType


class StopSignal:
    """Set once, by a handler; waited for by one thread."""

    def __init__(self) -> None:
        self._is_set = False
        self._wake = queue.SimpleQueue[None]()

    def install(self) -> None:
        """Be set by SIGTERM and SIGINT. From the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.set()

    def set(self) -> None:
        self._is_set = True
        self._wake.put(None)

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until it is set, for timeout_s at most. Returns whether it is."""
        if not self._is_set:
            with contextlib.suppress(queue.Empty):
                self._wake.get(timeout=timeout_s)
        return self._is_set
