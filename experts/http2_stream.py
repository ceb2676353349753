"""One gRPC stream over an HTTP/2 connection of its own, on a non-blocking socket: the way of the activations.

What travels is gRPC over HTTP/2 (RFC 9113) to the byte, so either side may be a grpcio program. It is written out here
because a library between socket and tensor costs more than everything else in a round: threads that hand messages
over, copies in and out of the library's memory. Here the caller's thread reads the socket straight into the message
and writes header and tensors from where they lie (tests/benchmarks/dispatch.py measures it).

Only what one stream needs is here. Header blocks are prebuilt and never decoded but for grpc-status, so there is no
HPACK table. Flow control is the credit: a peer may send WINDOW_BYTES more than what was consume()d, and what exceeds
that ends the stream; we send no more than the peer's windows allow and keep the rest in the caller's memory.
"""

from __future__ import annotations

import collections
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import quote, unquote

import numpy as np

from experts.tls_socket import StreamSocket
from experts.wire import Buffer

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
STREAM_ID = 1
# Credit of the peer: enough for the frames of two layers of a large batch. A larger message gets more, see receive().
WINDOW_BYTES = 16 * 1024 * 1024

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
_ACK = _END_STREAM = 0x1
_END_HEADERS, _PADDED, _PRIORITY = 0x4, 0x8, 0x20
_HEADER_TABLE_SIZE, _ENABLE_PUSH, _INITIAL_WINDOW_SIZE, _MAX_FRAME_SIZE = 1, 2, 4, 5
_DEFAULT_WINDOW, _DEFAULT_FRAME_SIZE, _LARGEST_FRAME_SIZE = 65_535, 16_384, (1 << 24) - 1
_LARGEST_WINDOW = (1 << 31) - 1
_HEADER_BYTES, _PREFIX_BYTES = 9, 5
_SCRATCH_BYTES = 64 * 1024
# Of headers, settings and the like: they have to fit into the scratch buffer whole.
_MAX_CONTROL_BYTES = 16 * 1024
# Answers to pings and settings that the peer does not read: it is not a peer then.
_MAX_UNSENT_CONTROL_BYTES = 256 * 1024
_MAX_PARTS_PER_WRITE = 64
# Length (24 bits) and type together, flags, stream id.
_FRAME_HEADER = struct.Struct(">IBI")
_MESSAGE_PREFIX = struct.Struct(">BI")
_DATA_START = struct.Struct(">IBIBI")


class StreamEnded(Exception):
    """The stream is over: the message says why."""


class _Unsent(NamedTuple):
    """A message that waits. key: of withdraw()."""

    key: int
    parts: Sequence[Buffer]
    size: int


class StreamState(NamedTuple):
    """What a stream is between two messages: bytes that may be sent and received, and credit not given yet."""

    send_window: int
    send_connection_window: int
    frame_size: int
    receive_window: int
    credit: int


@dataclass(slots=True)
class _Rest:
    """What is not yet framed of the message being sent."""

    key: int
    parts: list[memoryview]
    size: int


class MessageStream:
    """Messages out and in. Owned by one thread at a time; the socket is closed by close().

    send() and flush() write what socket and credit take; `wants_write` says that the socket was full, so that flush()
    must be called when it is writable again. receive() is called when it is readable.
    """

    def __init__(
        self, connection: StreamSocket, opening: bytes, max_message_bytes: int, *, knows_settings: bool = False
    ) -> None:
        """opening: what goes out first. The socket is non-blocking. knows_settings: the peer's opening was read, and
        it is make_client_opening()."""
        self.socket = connection
        # The peer has sent its response headers (to a client).
        self.is_open = False
        self._max_message_bytes = max_message_bytes
        # Bytes on their way into the socket, and those of the message that they belong to.
        self._out: list[Buffer] = [opening]
        self._control: list[bytes] = []
        self._rest: _Rest | None = None
        self._writing_key: int | None = None
        self._waiting: collections.deque[_Unsent] = collections.deque()
        self._peer_initial_window = WINDOW_BYTES if knows_settings else _DEFAULT_WINDOW
        self._send_window = self._send_connection_window = self._peer_initial_window
        self._frame_size = _LARGEST_FRAME_SIZE if knows_settings else _DEFAULT_FRAME_SIZE
        # Unparsed bytes are scratch[start:end].
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._start = self._end = 0
        # Of the DATA frame being read: payload and padding to come.
        self._frame_left = self._padding_left = 0
        self._prefix = b""
        self._message: memoryview | None = None
        self._filled = 0
        self._receive_window = WINDOW_BYTES
        self._credit = 0
        self._in_headers = False

    @property
    def wants_write(self) -> bool:
        """Whether the socket was full."""
        return bool(self._out)

    @property
    def is_idle(self) -> bool:
        """Whether everything that was given to send() went out."""
        return not (self._out or self._waiting or self._rest)

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, key: int, parts: Sequence[Buffer], size: int) -> None:
        """Send a message of size bytes, which are those of parts; they must stay as they are until it is sent.

        key: names the message to withdraw(). Raises OSError if the connection is broken.
        """
        self._waiting.append(_Unsent(key, parts, size))
        if not self._out:
            self.flush()

    def withdraw(self, key: int) -> bool:
        """Take a message back. False if part of it went out already and the rest did not: the peer waits for it."""
        for unsent in self._waiting:
            if unsent.key == key:
                self._waiting.remove(unsent)
                return True
        return self._writing_key != key

    def is_waiting(self, key: int) -> bool:
        """Whether nothing of a message went out yet."""
        return any(unsent.key == key for unsent in self._waiting)

    def detach(self, key: int) -> None:
        """Copy what did not go out yet of a message that is being written, so that its parts may change."""
        if self._writing_key == key:
            self._out = [bytes(part) for part in self._out]
            if self._rest is not None:
                self._rest.parts = [memoryview(bytes(part)) for part in self._rest.parts]

    def flush(self) -> None:
        """Write what can be written. Raises OSError if the connection is broken."""
        while True:
            while self._out:
                try:
                    sent = self.socket.sendmsg(self._out[:_MAX_PARTS_PER_WRITE])
                except BlockingIOError:
                    return
                self._drop_sent(sent)
            if not self._rest:
                self._writing_key = None
            if self._control:
                self._out, self._control = [b"".join(self._control)], []
            self._frame_next()
            if not self._out:
                return

    def receive(self, messages: list[Buffer]) -> None:
        """Read what is there and append the messages that are whole. Raises StreamEnded or OSError, after appending
        what came before the end: a server that stops may send its last answer and the end together.

        A message longer than the window gets the credit that it lacks at once: it can never be consumed otherwise.
        """
        while True:
            direct = self._message is not None and self._frame_left > 0 and self._start == self._end
            if direct:
                assert self._message is not None
                room = min(self._frame_left, len(self._message) - self._filled)
                target = self._message[self._filled : self._filled + room]
            else:
                if self._start:  # a piece of a frame header or of a control frame at most
                    rest = bytes(self._scratch[self._start : self._end])
                    self._scratch[: len(rest)] = rest
                    self._start, self._end = 0, len(rest)
                target = self._scratch[self._end :]
            try:
                count = self.socket.recv_into(target)
            except BlockingIOError:
                break
            if not count:
                raise StreamEnded("the peer closed the connection")
            if direct:
                self._note_data(count, count)
                self._filled += count
                if self._filled == len(self._message or b""):
                    self._end_message(messages)
            else:
                self._end += count
                self._parse(messages)
            if count < len(target):
                break
        if self._control and not self._out:
            self.flush()

    def consume(self, size: int) -> None:
        """A message of size bytes is done with: the peer may send as much again."""
        self._credit += min(size + _PREFIX_BYTES, WINDOW_BYTES)
        # Seldom, but never so late that the message being received lacks it.
        if self._credit >= WINDOW_BYTES // 4 or self._lacks_credit():
            self._grant(0)
            if not self._out:
                self.flush()

    def lend(self) -> StreamState | None:
        """What somebody else needs to go on with this stream, until take_back(). None in the middle of something, and
        over TLS: what is in the socket are other bytes than the stream's then."""
        if not isinstance(self.socket, socket.socket):
            return None
        if not self.is_idle or self._control or self._start != self._end or self._prefix or self._in_headers:
            return None
        if self._message is not None or self._frame_left or self._padding_left:
            return None
        return StreamState(
            self._send_window, self._send_connection_window, self._frame_size, self._receive_window, self._credit
        )

    def take_back(self, state: StreamState, received: bytes, unsent: bytes, key: int, messages: list[Buffer]) -> None:
        """Go on from there. received: read, but not used. unsent: the end of what was sent, of the message key.

        Appends the messages that are whole. Raises StreamEnded or OSError, see receive().
        """
        self._send_window, self._send_connection_window, self._frame_size, self._receive_window, self._credit = state
        if unsent:
            self._out = [unsent]
            self._writing_key = key
        data = memoryview(received)
        while data:
            rest = bytes(self._scratch[self._start : self._end])
            self._scratch[: len(rest)] = rest
            count = min(len(data), _SCRATCH_BYTES - len(rest))
            self._scratch[len(rest) : len(rest) + count] = data[:count]
            self._start, self._end = 0, len(rest) + count
            data = data[count:]
            self._parse(messages)
        if self._control and not self._out:
            self.flush()

    def end(self, last: Sequence[bytes] = ()) -> None:
        """Write last where the socket takes it, and close."""
        try:
            if last and not self._out and self._rest is None:
                self.socket.sendmsg(list(last))
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the peer is gone or does not read
        self.close()

    def close(self) -> None:
        self.socket.close()

    def _drop_sent(self, sent: int) -> None:
        out = self._out
        for index, part in enumerate(out):
            size = len(part)
            if sent < size:
                self._out = [memoryview(part)[sent:] if sent else part, *out[index + 1 :]]
                return
            sent -= size
        self._out = []

    def _frame_next(self) -> None:
        """Put as much of the next message into frames as credit allows."""
        window = min(self._send_window, self._send_connection_window)
        if self._rest is None:
            if not self._waiting or window < 1:
                return
            key, parts, size = self._waiting.popleft()
            self._writing_key = key
            total = size + _PREFIX_BYTES
            if total <= window and total <= self._frame_size:  # the usual case: one frame
                self._send_window -= total
                self._send_connection_window -= total
                self._out.append(_DATA_START.pack(total << 8 | _DATA, 0, STREAM_ID, 0, size))
                self._out += parts
                return
            views = [memoryview(_MESSAGE_PREFIX.pack(0, size)), *(memoryview(part).cast("B") for part in parts)]
            self._rest = _Rest(key, views, total)
        rest = self._rest
        while rest.size and window > 0:
            size = min(rest.size, window, self._frame_size)
            self._out.append(_FRAME_HEADER.pack(size << 8 | _DATA, 0, STREAM_ID))
            self._send_window -= size
            self._send_connection_window -= size
            window -= size
            rest.size -= size
            while size:
                part = rest.parts[0]
                if len(part) <= size:
                    self._out.append(rest.parts.pop(0))
                    size -= len(part)
                else:
                    self._out.append(part[:size])
                    rest.parts[0] = part[size:]
                    size = 0
        if not rest.size:
            self._rest = None

    def _parse(self, messages: list[Buffer]) -> None:
        """Take the scratch buffer apart as far as it goes."""
        scratch = self._scratch
        while True:
            available = self._end - self._start
            if self._frame_left:
                if not available:
                    return
                count = min(available, self._frame_left)
                self._note_data(count, count)
                self._feed(scratch[self._start : self._start + count], messages)
                self._start += count
                continue
            if self._padding_left:
                if not available:
                    return
                count = min(available, self._padding_left)
                self._padding_left -= count
                self._start += count
                continue
            if available < _HEADER_BYTES:
                return
            length_type, flags, stream_id = _FRAME_HEADER.unpack_from(scratch, self._start)
            length, kind = length_type >> 8, length_type & 0xFF
            if kind == _DATA and not flags:
                self._start += _HEADER_BYTES
                self._frame_left = length
                continue
            if kind == _DATA:
                if not self._begin_unusual_data(length, flags, available):
                    return
                continue
            if length > _MAX_CONTROL_BYTES:
                raise StreamEnded(f"the peer sent a frame of type {kind} with {length} bytes")
            if available < _HEADER_BYTES + length:
                return
            begin = self._start + _HEADER_BYTES
            self._start = begin + length
            self._handle_control(kind, flags, stream_id & 0x7FFF_FFFF, bytes(scratch[begin : begin + length]))

    def _begin_unusual_data(self, length: int, flags: int, available: int) -> bool:
        """DATA with padding, or the last. False if its first bytes are not there yet."""
        if flags & _END_STREAM:
            raise StreamEnded("the peer ended the stream")
        padding = 0
        if flags & _PADDED:
            if available < _HEADER_BYTES + 1:
                return False
            padding = self._scratch[self._start + _HEADER_BYTES]
            if padding >= length:
                raise StreamEnded("the peer sent more padding than data")
            self._start += 1
            length -= 1
            self._note_data(0, 1 + padding)
            self._credit += 1 + padding
        self._start += _HEADER_BYTES
        self._frame_left, self._padding_left = length - padding, padding
        return True

    def _note_data(self, payload: int, counted: int) -> None:
        self._frame_left -= payload
        self._receive_window -= counted
        if self._receive_window < 0:
            raise StreamEnded("the peer sent more than its credit")

    def _feed(self, data: memoryview, messages: list[Buffer]) -> None:
        """Add bytes of the stream to the message being received, or begin one."""
        while data:
            if self._message is not None:
                count = min(len(data), len(self._message) - self._filled)
                self._message[self._filled : self._filled + count] = data[:count]
                self._filled += count
                data = data[count:]
                if self._filled == len(self._message):
                    self._end_message(messages)
                continue
            if self._prefix or len(data) < _PREFIX_BYTES:
                missing = _PREFIX_BYTES - len(self._prefix)
                self._prefix += bytes(data[:missing])
                data = data[missing:]
                if len(self._prefix) < _PREFIX_BYTES:
                    return
                is_compressed, size = _MESSAGE_PREFIX.unpack(self._prefix)
                self._prefix = b""
            else:
                is_compressed, size = _MESSAGE_PREFIX.unpack_from(data)
                data = data[_PREFIX_BYTES:]
            if is_compressed or size > self._max_message_bytes:
                raise StreamEnded(f"the peer sent a message of {size} bytes, compressed: {bool(is_compressed)}")
            if len(data) >= size:
                messages.append(bytes(data[:size]))
                data = data[size:]
                continue
            # Not a bytearray: that would be filled with zeros first.
            self._message = np.empty(size, dtype=np.uint8).data
            self._filled = 0
            extra = max(0, size + _PREFIX_BYTES - WINDOW_BYTES)
            if extra or self._lacks_credit(len(data)):
                self._grant(extra)

    def _end_message(self, messages: list[Buffer]) -> None:
        assert self._message is not None
        messages.append(self._message)
        self._message = None

    def _lacks_credit(self, at_hand: int = 0) -> bool:
        """Whether the peer may not yet send the rest of the message being received, of which at_hand bytes are here."""
        return self._message is not None and len(self._message) - self._filled - at_hand > self._receive_window

    def _grant(self, extra: int) -> None:
        """Give the peer the credit that is due, and extra."""
        credit, self._credit = self._credit + extra, 0
        if not credit:
            return
        self._receive_window += credit
        self._control.append(make_window_update(0, credit) + make_window_update(STREAM_ID, credit))

    def _handle_control(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if self._in_headers and kind != _CONTINUATION:
            raise StreamEnded("the peer broke off its headers")
        if kind == _SETTINGS and not flags & _ACK:
            self._apply_settings(payload)
            # Before anything that goes by the new settings: the peer holds us to the old ones until it reads this.
            self._answer(make_frame(_SETTINGS, _ACK, 0))
            self._resume()
        elif kind == _PING and not flags & _ACK:
            self._answer(make_frame(_PING, _ACK, 0, payload))
        elif kind == _WINDOW_UPDATE:
            if len(payload) != 4:
                raise StreamEnded("the peer sent a malformed WINDOW_UPDATE")
            self._raise_window(stream_id, int.from_bytes(payload, "big") & 0x7FFF_FFFF)
        elif kind == _HEADERS:
            if flags & _END_STREAM:
                raise StreamEnded(read_status(payload))
            self.is_open = True
            self._in_headers = not flags & _END_HEADERS
        elif kind == _CONTINUATION:
            self._in_headers = not flags & _END_HEADERS
        elif kind == _RST_STREAM:
            raise StreamEnded(f"the peer reset the stream, code {int.from_bytes(payload, 'big')}")
        elif kind == _GOAWAY:
            raise StreamEnded(f"the peer goes away: {payload[8:200].decode(errors='replace') or 'no reason given'}")
        # Everything else is to be ignored (RFC 9113, section 4.1).

    def _answer(self, frame: bytes) -> None:
        self._control.append(frame)
        if len(self._control) * len(frame) > _MAX_UNSENT_CONTROL_BYTES:
            raise StreamEnded("the peer does not read the answers to its pings")

    def _apply_settings(self, payload: bytes) -> None:
        if len(payload) % 6:
            raise StreamEnded("the peer sent malformed SETTINGS")
        for name, value in struct.iter_unpack(">HI", payload):
            if name == _INITIAL_WINDOW_SIZE:
                if value > _LARGEST_WINDOW:
                    raise StreamEnded(f"the peer set a window of {value}")
                self._send_window += value - self._peer_initial_window
                self._peer_initial_window = value
            elif name == _MAX_FRAME_SIZE:
                if not _DEFAULT_FRAME_SIZE <= value <= _LARGEST_FRAME_SIZE:
                    raise StreamEnded(f"the peer set a frame size of {value}")
                self._frame_size = value

    def _raise_window(self, stream_id: int, credit: int) -> None:
        if stream_id == 0:
            self._send_connection_window += credit
        elif stream_id == STREAM_ID:
            self._send_window += credit
        if max(self._send_window, self._send_connection_window) > _LARGEST_WINDOW:
            raise StreamEnded("the peer gave more credit than there is")
        self._resume()

    def _resume(self) -> None:
        """Credit came: go on with what waited for it."""
        if not self._out and (self._rest or self._waiting):
            self.flush()


def make_frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return _FRAME_HEADER.pack(len(payload) << 8 | kind, flags, stream_id) + payload


def make_window_update(stream_id: int, credit: int) -> bytes:
    return make_frame(_WINDOW_UPDATE, 0, stream_id, credit.to_bytes(4, "big"))


def make_client_opening(path: str) -> bytes:
    """All that a client sends before its first message: preface, settings, credit, headers of stream 1."""
    block = b"".join((
        b"\x83\x86",  # :method POST, :scheme http, of the static table
        _literal(4, path.encode()),
        _literal(1, b"experts"),  # :authority
        _CONTENT_TYPE,
        b"\x00\x02te\x08trailers",
        _literal(58, b"shoal"),  # user-agent
    ))  # fmt: skip
    return PREFACE + _make_settings(is_client=True) + make_frame(_HEADERS, _END_HEADERS, STREAM_ID, block)


def make_server_opening() -> bytes:
    """What a server answers to it: settings, their acknowledgement, credit, response headers."""
    headers = make_frame(_HEADERS, _END_HEADERS, STREAM_ID, b"\x88" + _CONTENT_TYPE)  # :status 200
    return _make_settings(is_client=False) + make_frame(_SETTINGS, _ACK, 0) + headers


def make_trailers(code: int, message: str) -> bytes:
    """The end of the stream with a gRPC status, and of the connection."""
    text = quote(message[:1000]).encode()[:2000]
    block = _named_literal(b"grpc-status", str(code).encode()) + _named_literal(b"grpc-message", text)
    goaway = make_frame(_GOAWAY, 0, 0, STREAM_ID.to_bytes(4, "big") + bytes(4))
    return make_frame(_HEADERS, _END_HEADERS | _END_STREAM, STREAM_ID, block) + goaway


def read_status(block: bytes) -> str:
    """grpc-message of trailers whose strings are plain, as those of make_trailers and grpcio are."""
    _, found, rest = block.partition(b"grpc-message")
    if not found or not rest or rest[0] & 0x80:
        return "the peer ended the stream"
    size, start = rest[0], 1
    if size == 0x7F:
        size, start = 0x7F + (rest[1] & 0x7F if len(rest) > 1 else 0), 2
        if len(rest) > 2 and rest[1] & 0x80:
            size, start = size + (rest[2] << 7), 3
    return unquote(rest[start : start + size].decode("ascii", errors="replace"))


def _make_settings(*, is_client: bool) -> bytes:
    """Settings and credit. No dynamic header table: nobody here keeps one."""
    settings = [(_HEADER_TABLE_SIZE, 0), (_INITIAL_WINDOW_SIZE, WINDOW_BYTES), (_MAX_FRAME_SIZE, _LARGEST_FRAME_SIZE)]
    if is_client:
        settings.append((_ENABLE_PUSH, 0))
    payload = b"".join(struct.pack(">HI", *setting) for setting in settings)
    return make_frame(_SETTINGS, 0, 0, payload) + make_window_update(0, WINDOW_BYTES - _DEFAULT_WINDOW)


def _literal(name_index: int, value: bytes) -> bytes:
    """A header field that nobody is to remember, its name of the static table (RFC 7541, section 6.2.2)."""
    name = bytes((name_index,)) if name_index < 15 else bytes((15, name_index - 15))
    return name + _string(value)


def _named_literal(name: bytes, value: bytes) -> bytes:
    return b"\x00" + _string(name) + _string(value)


def _string(value: bytes) -> bytes:
    size = len(value)
    if size < 0x7F:
        return bytes((size,)) + value
    size -= 0x7F
    encoded = bytearray((0x7F,))
    while size >= 0x80:
        encoded.append(size & 0x7F | 0x80)
        size >>= 7
    encoded.append(size)
    return bytes(encoded) + value


_CONTENT_TYPE = _literal(31, b"application/grpc")
