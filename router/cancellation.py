"""Telling our own cancellation from the one that grpc.aio raises.

grpc raises CancelledError, too, from calls that our side ended: by closing their channel, or by giving up on a write,
which ends the whole stream. Taken for our own end, that would silently end whoever waits for the call.
"""

from __future__ import annotations

import asyncio


def is_task_cancelled() -> bool:
    """Whether somebody asked the current task to end. To be asked where a CancelledError is caught."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
