"""A stream of http2_stream.py, lent to the native library (experts/kernels/cpu/link.h) between two messages.

The library knows the usual case only; whatever else arrives comes back here with the bytes that it did not use.
"""

from __future__ import annotations

import ctypes
import weakref

from experts.http2_stream import MessageStream, StreamState
from experts.wire import Buffer

_State = ctypes.c_int64 * 5


class NativeLink:
    """Open from open() to close_into()."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Raises MemoryError."""
        self._library = library
        self.address: int = library.shoal_link_new() or 0
        if not self.address:
            raise MemoryError("no memory for a stream")
        self._state = _State()
        self._sizes = (ctypes.c_int64 * 2)()
        self._addresses = (ctypes.c_void_p * 2)()
        weakref.finalize(self, library.shoal_link_free, self.address)

    def open(self, descriptor: int, state: StreamState) -> None:
        """descriptor: of the socket."""
        self._state[:] = state
        self._library.shoal_link_open(self.address, descriptor, self._state)

    def close_into(self, stream: MessageStream, key: int, messages: list[Buffer]) -> None:
        """Give the stream back. See MessageStream.take_back()."""
        self._library.shoal_link_close(self.address, self._state, self._sizes, self._addresses)
        received, unsent = (
            ctypes.string_at(address, size) if address and size else b""
            for address, size in zip(self._addresses, self._sizes, strict=True)
        )
        stream.take_back(StreamState(*self._state), received, unsent, key, messages)
