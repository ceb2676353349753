"""An error for a client that is still sending its body, and whose connection is to be closed.

A server that closes a connection with unread bytes resets it, and the reset overtakes the answer: the client sees a
broken connection and never learns what was wrong (RFC 9112, section 9.6). So the answer goes out whole, and what still
arrives is dropped until the client has sent everything, or leaves, or takes too long.
"""

from __future__ import annotations

import asyncio
import contextlib

from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

LINGER_S = 10.0


class LingeringResponse(JSONResponse):
    """Its Content-Length tells the client that it is complete, although the connection stays open for a while."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while (await receive()).get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})
