"""The listening socket of an expert server: tells routers' streams from everybody else's connections.

A connection that begins as routers begin theirs (http2_stream.make_client_opening) is handed to the thread that
computes. Any other, a generated stub or a health check for instance, is forwarded byte by byte to the ordinary gRPC
server of the same process. So there is one address, any gRPC client can use it, and only the way of the activations is
our own. One thread, which has nothing to do while routers compute. Routers on the same host come in by a unix socket
beside it (experts/stream_socket.py).

With certificates every connection is encrypted, nobody without one gets as far as an opening, and there is no unix
socket.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable

from experts.stream_socket import listen_beside, set_stream_options
from experts.tls import ClusterTls
from experts.tls_socket import StreamSocket, TlsSocket

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 256 * 1024
# Of one direction: then its sender is slowed down.
_MAX_HELD_BYTES = 1024 * 1024
# A connection that has not said what it is by then is nobody's.
_OPENING_TIMEOUT_S = 10.0
_MAX_UNDECIDED = 256
_BACKLOG = 128


class FrontDoor:
    """start() listens; close() ends the thread and what it forwards."""

    def __init__(
        self, opening: bytes, on_router: Callable[[StreamSocket], None], tls: ClusterTls | None = None
    ) -> None:
        """on_router gets a connection whose opening was read, from this object's thread. tls: None: unencrypted."""
        self._opening = opening
        self._on_router = on_router
        self._tls = tls
        self._selector = selectors.DefaultSelector()
        self._undecided: dict[StreamSocket, _Undecided] = {}
        self._forwards: set[_Forward] = set()
        self._wake_in, self._wake_out = socket.socketpair()
        self._is_closing = False
        self._is_listening = True
        self._listeners: list[socket.socket] = []
        self._forward_to = ("", 0)
        self._thread = threading.Thread(target=self._run, name="experts-door", daemon=True)

    def start(self, host: str, port: int, forward_to: tuple[str, int]) -> int:
        """Listen; returns the port. Raises OSError if it is taken."""
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # create_server sets SO_REUSEADDR, so that a restarted replica gets its port back, but never SO_REUSEPORT.
        listener = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
        port = listener.getsockname()[1]
        self._listeners.append(listener)
        if self._tls is None and (beside := listen_beside(f"{host}:{port}", _BACKLOG)) is not None:
            self._listeners.append(beside)
        self._forward_to = forward_to
        for listener in self._listeners:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ, functools.partial(self._accept, listener))
        self._wake_in.setblocking(False)
        self._selector.register(self._wake_in, selectors.EVENT_READ, self._on_wake)
        self._thread.start()
        return port

    def stop_listening(self) -> None:
        """Take no new connections. What is forwarded goes on."""
        self._is_listening = False
        self._wake()

    def close(self, timeout_s: float) -> None:
        """End the thread, and with it every connection that it holds."""
        self._is_closing = True
        self._wake()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # the thread has ended
            self._wake_out.send(b"x")

    def _run(self) -> None:
        try:
            while not self._is_closing:
                for key, mask in self._selector.select(_OPENING_TIMEOUT_S if self._undecided else None):
                    key.data(mask)
                self._drop_silent()
        finally:
            for forward in list(self._forwards):
                forward.close()
            for undecided in list(self._undecided):
                undecided.close()
            for end in (*self._listeners, self._wake_in, self._wake_out):
                end.close()
            self._selector.close()

    def _on_wake(self, _mask: int) -> None:
        self._wake_in.recv(1024)
        if self._is_listening:
            return
        for listener in self._listeners:
            self._selector.unregister(listener)
            listener.close()
        self._listeners.clear()

    def _accept(self, listener: socket.socket, _mask: int) -> None:
        try:
            connection, _ = listener.accept()
        except OSError as error:  # it went away again, or there is no file descriptor left
            logger.debug("no connection accepted: %s", error)
            return
        if len(self._undecided) >= _MAX_UNDECIDED:
            connection.close()
            return
        connection.setblocking(False)
        set_stream_options(connection)
        undecided = _Undecided(time.monotonic() + _OPENING_TIMEOUT_S)
        if self._tls is None:
            self._expect_opening(connection, undecided)
            return
        try:
            encrypted = TlsSocket(connection, self._tls.server_context)
        except OSError as error:
            logger.debug("no connection accepted: %s", error)
            return
        self._undecided[encrypted] = undecided
        self._selector.register(encrypted, selectors.EVENT_READ, lambda _: self._shake_hands(encrypted))

    def _shake_hands(self, connection: TlsSocket) -> None:
        try:
            mask = connection.handshake()
        except OSError as error:
            logger.warning("a client was turned away: %s", error)
            del self._undecided[connection]
            self._selector.unregister(connection)
            connection.close()
            return
        if mask is not None:
            self._selector.modify(connection, mask, lambda _: self._shake_hands(connection))
            return
        undecided = self._undecided[connection]
        self._selector.unregister(connection)
        self._expect_opening(connection, undecided)
        # It may have come with the end of the handshake, and no selector would tell of it.
        self._read_opening(connection)

    def _expect_opening(self, connection: StreamSocket, undecided: _Undecided) -> None:
        self._undecided[connection] = undecided
        self._selector.register(connection, selectors.EVENT_READ, lambda _: self._read_opening(connection))

    def _read_opening(self, connection: StreamSocket) -> None:
        undecided = self._undecided[connection]
        try:
            data = connection.recv(len(self._opening) - len(undecided.received))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        undecided.received += data
        if data and undecided.received != self._opening and self._opening.startswith(undecided.received):
            return
        del self._undecided[connection]
        self._selector.unregister(connection)
        if not data:
            connection.close()
        elif undecided.received == self._opening:
            self._on_router(connection)
        else:
            self._forward(connection, undecided.received)

    def _forward(self, connection: StreamSocket, received: bytes) -> None:
        try:
            # Of the same process: it connects at once or not at all.
            inner = socket.create_connection(self._forward_to, timeout=_OPENING_TIMEOUT_S)
        except OSError as error:
            logger.warning("no connection to the gRPC server of this process: %s", error)
            connection.close()
            return
        inner.setblocking(False)
        set_stream_options(inner)
        self._forwards.add(_Forward(self._selector, connection, inner, received, self._forwards.discard))

    def _drop_silent(self) -> None:
        now_s = time.monotonic()
        for connection, undecided in list(self._undecided.items()):
            if now_s >= undecided.deadline_s:
                del self._undecided[connection]
                self._selector.unregister(connection)
                connection.close()


class _Undecided:
    """A connection that has not yet sent enough to tell what it is."""

    def __init__(self, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self.received = b""


class _Forward:
    """Two sockets and the bytes on their way between them, at most _MAX_HELD_BYTES in each direction."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        outer: StreamSocket,
        inner: StreamSocket,
        received: bytes,
        on_close: Callable[[_Forward], None],
    ) -> None:
        self._selector = selector
        self._on_close = on_close
        self._peers: dict[StreamSocket, StreamSocket] = {outer: inner, inner: outer}
        # By the socket that they go to.
        self._held: dict[StreamSocket, collections.deque[bytes]] = {
            outer: collections.deque(),
            inner: collections.deque([received]),
        }
        self._ended: set[StreamSocket] = set()
        self._is_closed = False
        # What came with the opening may lie where no selector sees it.
        self._serve(outer, selectors.EVENT_READ)

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        for end in self._peers:
            if end in self._selector.get_map():
                self._selector.unregister(end)
            end.close()
        self._on_close(self)

    def _serve(self, end: StreamSocket, mask: int) -> None:
        if self._is_closed:
            return
        try:
            if mask & selectors.EVENT_READ:
                self._read(end)
            if mask & selectors.EVENT_WRITE:
                self._write(end)
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        if len(self._ended) == 2 and not any(self._held.values()):
            self.close()
        else:
            self._watch()

    def _read(self, end: StreamSocket) -> None:
        data = end.recv(_CHUNK_BYTES)
        peer = self._peers[end]
        if data:
            self._held[peer].append(data)
        else:
            self._ended.add(end)
        self._write(peer)

    def _write(self, end: StreamSocket) -> None:
        held = self._held[end]
        while held:
            data = held.popleft()
            try:
                sent = end.send(data)
            except BlockingIOError:
                sent = 0
            if sent < len(data):
                held.appendleft(data[sent:])
                return
        if self._peers[end] in self._ended:
            end.shutdown(socket.SHUT_WR)

    def _watch(self) -> None:
        for end, peer in self._peers.items():
            mask = selectors.EVENT_WRITE if self._held[end] else 0
            if end not in self._ended and sum(map(len, self._held[peer])) < _MAX_HELD_BYTES:
                mask |= selectors.EVENT_READ
            key = self._selector.get_map().get(end)
            if key is None:
                if mask:
                    self._selector.register(end, mask, lambda mask, end=end: self._serve(end, mask))
            elif not mask:
                self._selector.unregister(end)
            elif key.events != mask:
                self._selector.modify(end, mask, key.data)
