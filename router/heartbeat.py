"""Signs of life of a replica: HTTP/2 pings on a connection of their own.

The thread that reads a router's stream also computes, so it says nothing for as long as a frame takes. The pings go to
the gRPC server of the same process (experts/front_door.py), whose threads answer while the other one computes; a
process that is stopped, hangs as a whole or lost its network answers neither. Any gRPC server answers pings (RFC 9113,
section 6.7).
"""

from __future__ import annotations

import asyncio
import logging
import struct
import time
from collections.abc import Callable
from typing import NamedTuple, cast

from experts.http2_stream import PREFACE, make_frame

logger = logging.getLogger(__name__)

_SETTINGS, _PING, _GOAWAY = 4, 6, 7
_ACK = 0x1
_HEADER = struct.Struct(">IBI")
# No server sends longer frames to a client that has not said it takes them.
_MAX_FRAME_BYTES = 16_384
# A beat that comes so much later than due, in intervals, says that this loop was busy, not that the replica is silent.
_LATE_SHARE = 0.5


class HeartbeatOptions(NamedTuple):
    """interval_s: between two pings. num_missed: unanswered ones in a row after which a replica counts as dead."""

    interval_s: float = 0.2
    num_missed: int = 3

    @property
    def dead_after_s(self) -> float:
        return self.interval_s * self.num_missed


DEFAULT_HEARTBEATS = HeartbeatOptions()


class Heartbeat(asyncio.Protocol):
    """Made by loop.create_connection(); begins when connected and ends with close() or after on_dead."""

    def __init__(
        self, options: HeartbeatOptions, on_missed: Callable[[], None], on_dead: Callable[[str], None]
    ) -> None:
        """on_missed: called for every ping that was not answered until the next one was due. on_dead: called once, with
        the reason, when too many were, or when the connection broke."""
        self._options = options
        self._on_missed = on_missed
        self._on_dead = on_dead
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._received = b""
        self._num_sent = 0
        self._num_unanswered = 0
        self._due_s = 0.0
        self._was_late = False
        self._is_over = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is none by its class.
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(PREFACE + make_frame(_SETTINGS, 0, 0))
        self._beat()

    def data_received(self, data: bytes) -> None:
        self._received += data
        while len(self._received) >= _HEADER.size:
            length_type, flags, _ = _HEADER.unpack_from(self._received)
            length, kind = length_type >> 8, length_type & 0xFF
            if length > _MAX_FRAME_BYTES:
                self._end(f"answered a ping with a frame of {length} bytes")
                return
            end = _HEADER.size + length
            if len(self._received) < end:
                return
            payload, self._received = self._received[_HEADER.size : end], self._received[end:]
            self._handle(kind, flags, payload)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end("the connection of its heartbeats broke")

    def close(self) -> None:
        self._is_over = True
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()

    def _handle(self, kind: int, flags: int, payload: bytes) -> None:
        if kind == _PING and flags & _ACK:
            self._num_unanswered = 0
        elif kind in (_SETTINGS, _PING) and not flags & _ACK:
            self._write(make_frame(kind, _ACK, 0, payload if kind == _PING else b""))
        elif kind == _GOAWAY:
            # It stops, and answers what it has until it ends the stream; or it is a gRPC server with the library's
            # default limits, which allow no pings: TCP's keepalive and the frames' deadlines are left.
            logger.info("a replica's server takes no more heartbeats: %s", payload[8:].decode(errors="replace"))
            self.close()

    def _beat(self) -> None:
        """Judge the pings sent so far and send another. Between two calls the loop has read what there was."""
        if self._is_over:
            return
        now_s = time.monotonic()
        is_late = self._due_s > 0 and now_s - self._due_s > self._options.interval_s * _LATE_SHARE
        if self._num_unanswered and is_late and not self._was_late:
            # The answer may lie in the socket: this loop had no time to read it.
            self._was_late = True
            self._timer = self._loop.call_later(self._options.interval_s * _LATE_SHARE / 2, self._beat)
            return
        self._was_late = False
        if self._num_unanswered:
            self._on_missed()
            if self._num_unanswered >= self._options.num_missed:
                silent_s = self._options.dead_after_s
                self._end(f"no heartbeat for {silent_s:.1f} s")
                return
        self._num_unanswered += 1
        self._num_sent += 1
        self._write(make_frame(_PING, 0, 0, self._num_sent.to_bytes(8, "big")))
        self._due_s = now_s + self._options.interval_s
        self._timer = self._loop.call_later(self._options.interval_s, self._beat)

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._is_over:
            self._transport.write(data)

    def _end(self, reason: str) -> None:
        if self._is_over:
            return
        self.close()
        self._on_dead(reason)
