"""The routers' streams of an expert server: one thread reads them all, computes and answers, without a hand-over.

It waits for any stream to have something, reads everything that is there, and gives all whole messages to the server at
once, so that frames of several routers, and several frames of one, can be joined. What arrives while it computes waits
in the sockets and in the peers' credit.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from experts.http2_stream import MessageStream, StreamEnded, make_server_opening, make_trailers
from experts.native_link import NativeLink
from experts.native_serving import NativeServing
from experts.tls_socket import StreamSocket
from experts.wire import MAX_MESSAGE_BYTES, Buffer

logger = logging.getLogger(__name__)

# After messages that were none for the native loop, so many turns go without it: the next ones may be like them.
_TURNS_IN_PYTHON = 16

# gRPC's status codes.
UNAVAILABLE, RESOURCE_EXHAUSTED, INVALID_ARGUMENT = 14, 8, 3
_OPENING = make_server_opening()


class StreamBroken(Exception):
    """A stream on which no frame can be answered any more. code: of gRPC."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class RouterStream:
    """One router's stream. Used by the thread of RouterStreams alone."""

    def __init__(self, connection: StreamSocket) -> None:
        self.messages = MessageStream(connection, _OPENING, MAX_MESSAGE_BYTES, knows_settings=True)
        self.number = connection.fileno()
        self.is_open = True
        # What epoll was asked for.
        self.mask = select.EPOLLIN
        # Sizes of the messages that were answered, but whose answers are not sent: no credit for them yet, so that a
        # router that does not read its answers gets no more of them computed.
        self._owed: list[int] = []
        self.link: NativeLink | None = None

    def answer(self, parts: Sequence[Buffer], received_bytes: int) -> None:
        """Send an answer to a message of received_bytes. Does nothing if the stream is over."""
        if not self.is_open:
            return
        self._owed.append(received_bytes)
        try:
            self.messages.send(0, parts, sum(map(len, parts)))
            self.settle()
        except OSError:
            self.is_open = False

    def settle(self) -> None:
        """Give credit for what is done with. Raises OSError if the connection is broken."""
        if self._owed and self.messages.is_idle:
            for size in self._owed:
                self.messages.consume(size)
            self._owed.clear()


class Received(NamedTuple):
    """A whole message. received_s: of time.monotonic."""

    stream: RouterStream
    data: Buffer
    received_s: float


class RouterStreams:
    """start() begins the thread; adopt() gives it a connection; close() ends both."""

    def __init__(
        self,
        serve: Callable[[Sequence[Received]], None],
        on_open: Callable[[], None],
        on_closed: Callable[[], None],
        native: NativeServing | None = None,
    ) -> None:
        """All are called from the thread. serve answers messages; it raises nothing. on_open raises StreamBroken to
        turn a stream away; on_closed is called when one ended that was not.
        native: serves for as long as nothing unusual happens."""
        self._serve = serve
        self._on_open = on_open
        self._on_closed = on_closed
        self._native = native
        self._turns_in_python = 0
        self._poll = select.epoll()
        self._streams: dict[int, RouterStream] = {}
        self._lock = threading.Lock()
        self._adopted: list[StreamSocket] = []
        self._calls: list[tuple[Callable[[], None], Future[None]]] = []
        self._wake_in, self._wake_out = socket.socketpair()
        self._poll.register(self._wake_in, select.EPOLLIN)
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="experts-streams", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def adopt(self, connection: StreamSocket) -> None:
        """Serve a connection whose opening was read. From any thread."""
        with self._lock:
            if not self._is_closing:
                self._adopted.append(connection)
                self._wake_out.send(b"x")
                return
        connection.close()

    def call(self, function: Callable[[], None], timeout_s: float) -> None:
        """Have the thread call a function between two frames, and wait for it. From any other thread.

        Raises TimeoutError if its turn does not come in time, and then it never does; RuntimeError if the streams are
        closing; or what the function raises.
        """
        done: Future[None] = Future()
        with self._lock:
            if self._is_closing:
                raise RuntimeError("the expert server stops")
            self._calls.append((function, done))
            self._wake_out.send(b"x")
        try:
            done.result(timeout_s)
        except TimeoutError:
            if not done.cancel():
                done.result()
                return
            raise

    def end_stream(self, stream: RouterStream, code: int, message: str) -> None:
        """End one stream with a gRPC status. From the thread."""
        self._drop(stream, [make_trailers(code, message)])

    def close(self, grace_s: float) -> None:
        """Let the frames being computed be answered, for grace_s at most, then end every stream."""
        with self._lock:
            if not self._is_closing:
                self._is_closing = True
                self._wake_out.send(b"x")
        if self._thread.ident is None:
            return
        self._thread.join(grace_s)
        if self._thread.is_alive():
            # It is in the middle of a call; its routers shall know at once.
            for stream in list(self._streams.values()):
                with contextlib.suppress(OSError):  # it just ended
                    stream.messages.socket.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        try:
            while not self._is_closing:
                received: list[Received] = []
                served = self._serve_natively(received)
                ready = self._poll.poll(0 if served else None)
                for number, mask in ready:
                    if number == self._wake_in.fileno():
                        self._wake_in.recv(1024)
                        self._take_adopted(received)
                        self._make_calls()
                    elif (stream := self._streams.get(number)) is not None:
                        self._look_at(stream, mask, received)
                if received:
                    self._serve(received)
                for number in {stream.number for stream in served}.union(number for number, _ in ready):
                    if (stream := self._streams.get(number)) is not None:
                        self._settle(stream)
        except Exception:
            logger.critical("the thread of the routers' streams failed", exc_info=True)
            if not self._is_closing:
                # A replica that lives without it is asked again and again, answers nobody and is never restarted.
                os._exit(1)
        finally:
            for stream in list(self._streams.values()):
                self._drop(stream, [make_trailers(UNAVAILABLE, "the expert server stops")])
            with self._lock:
                self._is_closing = True
                for connection in self._adopted:
                    connection.close()
                calls, self._calls = self._calls, []
            for _, done in calls:
                done.set_exception(RuntimeError("the expert server stops"))
            self._poll.close()
            self._wake_in.close()
            self._wake_out.close()

    def _serve_natively(self, received: list[Received]) -> list[RouterStream]:
        """Serve without the interpreter until something else is to be done. Returns the streams that took part."""
        native = self._native
        if native is None or self._turns_in_python:
            self._turns_in_python = max(0, self._turns_in_python - 1)
            return []
        lent: list[tuple[RouterStream, NativeLink]] = []
        for stream in self._streams.values():
            if stream.mask == select.EPOLLIN and (state := stream.messages.lend()) is not None:
                stream.link = stream.link or native.make_link()
                stream.link.open(stream.number, state)
                lent.append((stream, stream.link))
        if not lent:
            return []
        native.serve(self._poll.fileno(), [link for _, link in lent])
        now_s = time.monotonic()
        for stream, link in lent:
            messages: list[Buffer] = []
            try:
                link.close_into(stream.messages, 0, messages)
            except (StreamEnded, OSError) as error:
                logger.debug("stream ended: %s", error)
                self._drop(stream)
            else:
                received += [Received(stream, data, now_s) for data in messages]
        if received:
            self._turns_in_python = _TURNS_IN_PYTHON
        return [stream for stream, _ in lent]

    def _look_at(self, stream: RouterStream, mask: int, received: list[Received]) -> None:
        """Write and read what can be."""
        try:
            if mask & select.EPOLLOUT:
                stream.messages.flush()
            if mask & ~select.EPOLLOUT:
                messages: list[Buffer] = []
                stream.messages.receive(messages)
                now_s = time.monotonic()
                received += [Received(stream, data, now_s) for data in messages]
        except (StreamEnded, OSError) as error:
            logger.debug("stream ended: %s", error)
            self._drop(stream)

    def _settle(self, stream: RouterStream) -> None:
        """After a turn: give credit, and ask to be told what is of use next."""
        try:
            stream.settle()
        except OSError:
            stream.is_open = False
        if not stream.is_open:
            self._drop(stream)
            return
        mask = select.EPOLLIN | (select.EPOLLOUT if stream.messages.wants_write else 0)
        if mask != stream.mask:
            stream.mask = mask
            self._poll.modify(stream.number, mask)

    def _take_adopted(self, received: list[Received]) -> None:
        with self._lock:
            adopted, self._adopted = self._adopted, []
        for connection in adopted:
            stream = RouterStream(connection)
            try:
                stream.messages.flush()
                self._on_open()
            except OSError:
                connection.close()
            except StreamBroken as error:
                stream.messages.end([make_trailers(error.code, str(error))])
            else:
                self._streams[stream.number] = stream
                self._poll.register(stream.number, stream.mask)
                # Over TLS, messages may have come together with the opening, and epoll does not tell of them.
                self._look_at(stream, select.EPOLLIN, received)

    def _make_calls(self) -> None:
        with self._lock:
            calls, self._calls = self._calls, []
        for function, done in calls:
            if not done.set_running_or_notify_cancel():
                continue
            try:
                function()
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)

    def _drop(self, stream: RouterStream, last: Sequence[bytes] = ()) -> None:
        if self._streams.pop(stream.number, None) is None:
            return
        stream.is_open = False
        self._poll.unregister(stream.number)
        stream.messages.end(last)
        self._on_closed()
