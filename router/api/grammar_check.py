"""Whether a client's grammar can be followed, found out where nothing else can suffer from it.

A schema may recurse, explode or never end. It is compiled in a process of its own (grammar_worker.py) with bounded
memory; a process that does not answer in time is killed and replaced. Only what has passed goes on to a router.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import sys
from collections import OrderedDict
from pathlib import Path

from router.api.errors import BadRequest, Overloaded, Unavailable
from router.api.form_types import MAX_GRAMMAR_BYTES
from router.v1 import router_pb2

logger = logging.getLogger(__name__)

# Longest time for one grammar, on however busy a machine; a new process may take longer to load its tokenizer.
TIMEOUT_S = 5.0
START_TIMEOUT_S = 20.0
# Requests that may wait for their turn.
MAX_WAITING = 64
# Results that are remembered, by digest.
MAX_KEPT = 1024
# A process may have ended by itself, or for want of the system's memory; two in a row ended because of the grammar.
_MAX_ATTEMPTS = 2
# What writing to a process that has ended comes to, and reading from it; uvloop raises RuntimeError once it knows.
_ENDED = (OSError, ValueError, RuntimeError)


class GrammarChecker:
    """One process, started when it is first needed. Use it on one event loop only."""

    def __init__(self, checkpoint: Path, *, timeout_s: float = TIMEOUT_S, retry_after_s: int = 2) -> None:
        self._checkpoint = checkpoint
        self._timeout_s = timeout_s
        self._retry_after_s = retry_after_s
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._num_waiting = 0
        self._reasons: OrderedDict[bytes, str | None] = OrderedDict()

    async def check(self, grammar: router_pb2.Grammar, param: str) -> None:
        """Raises BadRequest naming param and the reason, Overloaded, or Unavailable."""
        kind = grammar.WhichOneof("kind")
        text = getattr(grammar, kind or "regex")
        if len(text.encode()) > MAX_GRAMMAR_BYTES:
            raise BadRequest(f"{param}: must not have more than {MAX_GRAMMAR_BYTES} bytes as JSON.", param=param)
        line = json.dumps({"kind": kind, "text": text, "lenient": grammar.lenient}).encode() + b"\n"
        digest = hashlib.blake2b(line, digest_size=16).digest()
        if digest not in self._reasons:
            if self._num_waiting >= MAX_WAITING:
                raise Overloaded("Too many grammars wait to be compiled.", retry_after_s=self._retry_after_s)
            # Shielded: a client that leaves must not leave an answer behind for the next one.
            reason = await asyncio.shield(asyncio.ensure_future(self._compile(line)))
            self._reasons[digest] = reason
            while len(self._reasons) > MAX_KEPT:
                self._reasons.popitem(last=False)
        if (reason := self._reasons[digest]) is not None:
            raise BadRequest(f"{param}: cannot be followed: {reason}.", param=param, code="invalid_grammar")

    async def close(self) -> None:
        await self._kill()

    async def _compile(self, line: bytes) -> str | None:
        self._num_waiting += 1
        try:
            async with self._turn:
                for _ in range(_MAX_ATTEMPTS):
                    if self._process is None:
                        await self._start()
                    try:
                        async with asyncio.timeout(self._timeout_s):
                            return await self._ask(line)
                    except TimeoutError:
                        await self._discard("no answer in time")
                        break
                    except _ENDED as error:
                        await self._discard(repr(error))
                return "it takes too long or too much memory to compile"
        finally:
            self._num_waiting -= 1

    async def _start(self) -> None:
        """Raises Unavailable."""
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "router.api.grammar_worker", str(self._checkpoint),
                    stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                )  # fmt: skip
                await self._ask(json.dumps({"kind": "regex", "text": "ready", "lenient": False}).encode() + b"\n")
        except (TimeoutError, *_ENDED) as error:
            await self._discard(f"does not start: {error!r}")
            raise Unavailable(
                "Grammars cannot be compiled at the moment.", retry_after_s=self._retry_after_s
            ) from error

    async def _ask(self, line: bytes) -> str | None:
        """Raises one of _ENDED if the process ends instead of answering, or has ended."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        process.stdin.write(line)
        await process.stdin.drain()
        return json.loads(await process.stdout.readline())["error"]

    async def _discard(self, reason: str) -> None:
        logger.warning("grammar process killed reason=%s", reason)
        await self._kill()

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
