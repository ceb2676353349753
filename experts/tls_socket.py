"""A socket over TLS that behaves like a plain non-blocking one: what MessageStream and FrontDoor need of either.

Python's SSLSocket is close to that but not the same: it has no sendmsg, says "not now" by errors of its own, reads one
record at a time although more lie in its memory where no selector sees them, and forgets its keys on a shutdown().
"""

from __future__ import annotations

import selectors
import socket
import ssl
from collections.abc import Iterator, Sequence
from typing import Protocol

from experts.wire import Buffer

# The largest TLS record (RFC 8446, section 5.1).
_RECORD_BYTES = 16 * 1024


class StreamSocket(Protocol):
    """Non-blocking: recv, recv_into, send and sendmsg raise BlockingIOError when nothing can be done now."""

    def fileno(self) -> int: ...

    def recv(self, bufsize: int, /) -> bytes: ...

    def recv_into(self, buffer: memoryview, /) -> int: ...

    def send(self, data: Buffer, /) -> int: ...

    def sendmsg(self, buffers: Sequence[Buffer], /) -> int: ...

    def shutdown(self, how: int, /) -> None: ...

    def close(self) -> None: ...


class TlsSocket:
    """A StreamSocket. Owned by one thread at a time; handshake() first."""

    def __init__(self, connection: socket.socket, context: ssl.SSLContext, *, server_name: str | None = None) -> None:
        """Takes over a connected, non-blocking socket. server_name: what the server must be; None: this is one."""
        self._tls = context.wrap_socket(
            connection,
            server_side=server_name is None,
            server_hostname=server_name,
            do_handshake_on_connect=False,
        )

    def handshake(self) -> int | None:
        """Go on with it. Returns what to wait for, of selectors, or None when it is done. Raises OSError."""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return selectors.EVENT_READ
        except ssl.SSLWantWriteError:
            return selectors.EVENT_WRITE
        return None

    def fileno(self) -> int:
        return self._tls.fileno()

    def recv(self, bufsize: int, /) -> bytes:
        """At most bufsize bytes; b"" at the end. With a multiple of a record's size nothing is left behind that a
        selector would not tell of."""
        data = bytearray(bufsize)
        return bytes(memoryview(data)[: self.recv_into(memoryview(data))])

    def recv_into(self, buffer: memoryview, /) -> int:
        """Fills the buffer, or takes all that is there."""
        filled = 0
        try:
            while filled < len(buffer) and (count := self._tls.recv_into(buffer[filled:])):
                filled += count
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            if not filled:
                raise BlockingIOError from None
        return filled

    def send(self, data: Buffer, /) -> int:
        return self.sendmsg([data])

    def sendmsg(self, buffers: Sequence[Buffer], /) -> int:
        """Bytes that are on their way. After a BlockingIOError or a smaller number, the next call begins with the bytes
        that come next, as OpenSSL has encrypted a record of them."""
        sent = 0
        for record in _cut_records(buffers):
            try:
                sent += self._tls.send(record)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                if not sent:
                    raise BlockingIOError from None
                break
        return sent

    def shutdown(self, how: int, /) -> None:
        """Of the connection below, which a peer takes for the end of both directions."""
        socket.socket.shutdown(self._tls, how)

    def close(self) -> None:
        self._tls.close()


def _cut_records(buffers: Sequence[Buffer]) -> Iterator[Buffer]:
    """The same bytes in pieces of a record's size: large buffers as they are, small ones joined."""
    waiting: list[memoryview] = []
    size = 0
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        while len(view):
            if not waiting and len(view) >= _RECORD_BYTES:
                yield view[:_RECORD_BYTES]
                view = view[_RECORD_BYTES:]
                continue
            piece = view[: _RECORD_BYTES - size]
            waiting.append(piece)
            size += len(piece)
            view = view[len(piece) :]
            if size == _RECORD_BYTES:
                yield b"".join(waiting)
                waiting, size = [], 0
    if waiting:
        yield b"".join(waiting)
