"""The client's side of a request: noticing that it has gone, and streaming to it.

ASGI tells of a lost client only to those who ask, so whatever takes long is raced against that message here.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from router.api.errors import ApiError, ClientGone, InternalError
from router.api.settings import ApiSettings

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

_PING = b": ping\n\n"


class StreamFormat(NamedTuple):
    """How one API writes its events. prefix: before every chunk; ending: behind the last event."""

    prefix: bytes
    ending: bytes
    write_error: Callable[[ApiError], bytes]


def encode_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")


def encode_with_items(head: Mapping[str, Any], name: str, items: Iterable[bytes], tail: Mapping[str, Any]) -> bytes:
    """An object with the fields of head, a list called name of items that are encoded one by one, so that no more than
    one of them needs be there decoded, and the fields of tail. Neither head nor tail is empty."""
    return b"".join(
        [encode_json(head)[:-1], b',"', name.encode(), b'":[', b",".join(items), b"],", encode_json(tail)[1:]]
    )


def encode_event(value: dict[str, Any]) -> bytes:
    """A chunk of a NAMED stream: the event has the name that its data gives as type."""
    return b"event: " + value["type"].encode() + b"\ndata: " + encode_json(value)


# The events of OpenAI's older APIs have no names, and one more tells of the end.
UNNAMED = StreamFormat(b"data: ", b"data: [DONE]\n\n", lambda error: encode_json(error.body()))
# Those of Anthropic's: chunks are made by encode_event, and the last one says that it is.
NAMED = StreamFormat(b"", b"", lambda error: encode_event({"type": "error", **error.body()}))


async def until_gone(request: Request, work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Await work, whose body must already be read. Cancels it and raises ClientGone when the client disconnects."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.create_task(_wait_until_gone(request.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        await _cancel(task, watcher)


# One per event, as the stream's format has them: encoded JSON objects where it is UNNAMED.
Chunks = AsyncGenerator[bytes, None]


async def open_stream(
    request: Request, chunks: Chunks, settings: ApiSettings, stream_format: StreamFormat = UNNAMED
) -> Response:
    """Start an event stream of chunks.

    Waits up to status_line_wait_s for the first chunk, so that a request refused by then gets a proper status. Raises
    ApiError, or ClientGone.
    """
    first = asyncio.ensure_future(anext(chunks))
    watcher = asyncio.create_task(_wait_until_gone(request.receive))
    is_handed_over = False
    try:
        await asyncio.wait({first, watcher}, timeout=settings.status_line_wait_s, return_when=asyncio.FIRST_COMPLETED)
        if watcher.done():
            raise ClientGone
        if first.done() and first.exception() is not None:
            raise first.exception() or InternalError()
        is_handed_over = True
        return EventStream(first, chunks, settings, stream_format)
    finally:
        await _cancel(watcher)
        if not is_handed_over:
            await _cancel(first)
            await chunks.aclose()


class EventStream(Response):
    """Server-sent events: one per chunk, comments while nothing comes, an error event if the work fails midway, and
    always the format's ending (`[DONE]`). Cancels the work when the client disconnects or stops reading."""

    media_type = "text/event-stream"

    def __init__(
        self,
        first: asyncio.Future[bytes],
        chunks: Chunks,
        settings: ApiSettings,
        stream_format: StreamFormat,
    ) -> None:
        """first: the pending or finished step of chunks that yields its first item."""
        self.status_code = 200
        self.background = None
        self.body = b""
        self._first = first
        self._chunks = chunks
        self._settings = settings
        self._format = stream_format
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(_wait_until_gone(receive))
        sender = asyncio.create_task(self._send_all(send))
        try:
            await asyncio.wait({sender, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
        except OSError as error:
            raise ClientGone from error
        finally:
            await _cancel(sender, watcher)

    async def _send_all(self, send: Send) -> None:
        next_chunk = self._first
        try:
            await self._send(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            while True:
                await asyncio.wait({next_chunk}, timeout=self._settings.ping_interval_s)
                if not next_chunk.done():
                    await self._send_body(send, _PING)
                    continue
                try:
                    chunk = next_chunk.result()
                except StopAsyncIteration:
                    break
                except ApiError as error:
                    await self._send_event(send, self._format.write_error(error))
                    break
                except Exception:
                    logger.exception("stream failed")
                    await self._send_event(send, self._format.write_error(InternalError()))
                    break
                await self._send_event(send, chunk)
                next_chunk = asyncio.ensure_future(anext(self._chunks))
            await self._send_body(send, self._format.ending, more_body=False)
        finally:
            await _cancel(next_chunk)
            await self._chunks.aclose()

    async def _send_event(self, send: Send, data: bytes) -> None:
        await self._send_body(send, self._format.prefix + data + b"\n\n")

    async def _send_body(self, send: Send, body: bytes, *, more_body: bool = True) -> None:
        await self._send(send, {"type": "http.response.body", "body": body, "more_body": more_body})

    async def _send(self, send: Send, message: dict[str, Any]) -> None:
        """Raises ClientGone when the client's buffers stay full."""
        try:
            async with asyncio.timeout(self._settings.send_timeout_s):
                await send(message)
        except TimeoutError as error:
            raise ClientGone from error


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancel what still runs and wait until it has cleaned up."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
