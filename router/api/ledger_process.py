"""The ledger's writer as a child of the front: a database must not share the interpreter that sends tokens.

It is started again when it ends. When the front ends, however that happens, the child sees its input closed, collects
what the front left, and ends too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from router.api.settings import ApiSettings

logger = logging.getLogger(__name__)

_LOOK_INTERVAL_S = 1.0


@asynccontextmanager
async def ledger_writer(settings: ApiSettings) -> AsyncGenerator[None, None]:
    """As long as it is entered, the journal goes into the ledger. Nothing happens without a ledger."""
    if settings.usage_journal is None or settings.ledger_url is None:
        yield
        return
    writer = _Writer(settings)
    task = asyncio.create_task(writer.keep_running(), name="ledger")
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        writer.release()


class _Writer:
    def __init__(self, settings: ApiSettings) -> None:
        self._arguments = [
            *(sys.executable, "-m", "router.tenancy", "--until-input-closes"),
            *("--journal", str(settings.usage_journal), "--retention-days", str(settings.ledger_retention_days)),
            *("--log-format", settings.log_format),
        ]
        # Not among the arguments, which every user of the machine can read: it may hold a password.
        self._url = settings.ledger_url or ""
        self._process: subprocess.Popen[bytes] | None = None

    async def keep_running(self) -> None:
        while True:
            if self._process is None or self._process.poll() is not None:
                if self._process is not None:
                    logger.error("the ledger's writer ended with %s; starting it again", self._process.returncode)
                self._start()
            await asyncio.sleep(_LOOK_INTERVAL_S)

    def release(self) -> None:
        """Let it collect once more and end."""
        if self._process is None or self._process.stdin is None:
            return
        self._process.stdin.close()

    def _start(self) -> None:
        process = subprocess.Popen(self._arguments, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(self._url.encode() + b"\n")
            process.stdin.flush()
        self._process = process
        logger.info("ledger writer pid=%d", process.pid)
