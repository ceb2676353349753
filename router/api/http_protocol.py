"""The connection under the app, for both servers that host it (uvicorn, and Ray Serve's proxy, which is one).

uvicorn's fast protocol bounds no head: a client may send header fields for ever, as fast or as slowly as it likes, and
all of it is kept. Nor does it notice a client that has stopped reading, unless the app waits for it, which it does not
behind Ray Serve's proxy.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from router.api.errors import BadRequest, HeadTooLarge, RequestTimedOut
from router.api.lingering_response import LINGER_S

# nginx takes 32 KiB, h11 64 KiB. Fields are also counted when they are complete, as a read may bring 256 KiB at once.
MAX_HEAD_BYTES = 64 * 1024


class BoundedProtocol(HttpToolsProtocol):
    """What it turns away itself gets an error body like everything else, and a connection that ends."""

    head_timeout_s = 30.0
    """From the connection, or the first byte of a further request, to the end of its header fields."""
    reader_timeout_s = 60.0
    """A client whose full buffers do not move for this long counts as gone."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._is_in_head = False
        self._is_refused = False
        self._is_head_too_large = False
        self._num_messages = 0
        self._num_raw_bytes = 0
        self._num_field_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._reader_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_reader_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        num_messages = self._num_messages
        super().data_received(data)
        if self._is_refused or self.transport.is_closing():
            return
        if self._is_in_head and num_messages == self._num_messages:
            self._num_raw_bytes += len(data)
            if self._num_raw_bytes > MAX_HEAD_BYTES:
                self._is_head_too_large = True
                self.send_400_response("")
                return
        # Also when the rest of a body drips in that nobody waits for.
        if self._head_timer is None and (self._is_in_head or not self._is_answering()):
            self._start_head_timer()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True
        self._num_raw_bytes = self._num_field_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._count_field(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        # Colon, space and line end.
        self._count_field(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._stop_head_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._num_messages += 1
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls it for what the parser refuses. msg: not for clients."""
        if self._is_head_too_large:
            self._refuse(HeadTooLarge(f"The header fields must not be larger than {MAX_HEAD_BYTES} bytes."))
        else:
            self._refuse(BadRequest("This is no valid HTTP request.", code="invalid_http"))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._stop_reader_timer()
        super().resume_writing()

    def _count_field(self, num_bytes: int) -> None:
        self._num_field_bytes += num_bytes
        if self._num_field_bytes > MAX_HEAD_BYTES:
            self._is_head_too_large = True
            # The parser makes its own error of it, whatever it is.
            raise ValueError("the head is too large")

    def _refuse(self, error: BadRequest | HeadTooLarge | RequestTimedOut) -> None:
        """Answer, then drop what still arrives for a while: see lingering_response."""
        self._is_refused = True
        self._is_in_head = False
        self._stop_head_timer()
        if self._is_answering():
            # To an earlier request; an answer in the middle of that one would be taken for a part of it.
            self.transport.close()
            return
        body = json.dumps(error.body()).encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[error.status] + head + body)
        self._head_timer = self.loop.call_later(LINGER_S, self.transport.close)
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.head_timeout_s, self._end_head)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end_head(self) -> None:
        self._head_timer = None
        if self._is_answering():
            self._start_head_timer()
        elif self._is_in_head:
            self._refuse(RequestTimedOut("The header fields did not arrive in time."))
        else:
            self.transport.close()

    def _watch_reader(self, num_bytes: int) -> None:
        """num_bytes: that waited when the client was last looked at."""
        self._reader_timer = self.loop.call_later(self.reader_timeout_s, self._judge_reader, num_bytes)

    def _stop_reader_timer(self) -> None:
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None

    def _judge_reader(self, num_bytes_before: int) -> None:
        num_bytes = self.transport.get_write_buffer_size()
        if num_bytes < num_bytes_before:
            self._watch_reader(num_bytes)
        else:
            self.transport.abort()
