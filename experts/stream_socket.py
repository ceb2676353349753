"""The sockets under routers' streams: their options, and the unix socket beside a replica's TCP port.

On one host a round of 64 rows over 4 groups takes 1.6 ms over unix sockets and 3.8 ms over loopback, one of a single
row the same (7168 columns, raw sockets, 2 cores). The name of the unix socket is the endpoint's, in Linux's abstract
namespace. That belongs to the network namespace, as ports do, so whoever finds the name has the same process at its end
as over TCP: nothing is announced, no file is left behind, and a proxy in the way, which has another endpoint, stays in
the way.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import sys

logger = logging.getLogger(__name__)

# What a unix socket holds until the peer reads it: a frame of 64 rows of 7168 in bf16 and the next one's start. The
# system may allow less (net.core.wmem_max); TCP sizes its buffers by itself.
_UNIX_SEND_BYTES = 2 * 1024 * 1024
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: struct ucred, unix(7)


def set_stream_options(connection: socket.socket) -> None:
    """TCP: no delay, and its own keepalive: a host that vanished is noticed after some 25 s. The kernel answers for a
    process that computes, which pings of HTTP/2 would take for dead."""
    if connection.family == socket.AF_UNIX:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_SEND_BYTES)
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 2), ("TCP_USER_TIMEOUT", 25_000)):
        if hasattr(socket, name):  # not every system has all of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def listen_beside(endpoint: str, backlog: int) -> socket.socket | None:
    """A unix socket for whoever knows the TCP endpoint "host:port"; None where there is none to be had."""
    if sys.platform != "linux":
        return None
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(_name_of(endpoint))
        listener.listen(backlog)
    except OSError as error:
        logger.warning("no unix socket beside endpoint=%s: %s", endpoint, error)
        listener.close()
        return None
    return listener


def connect_beside(endpoint: str) -> socket.socket | None:
    """A non-blocking connection to a listen_beside() of this host and user; None if there is none, and TCP is to be
    taken. A name is free to take, other than a port that somebody listens on, so another user's is not trusted."""
    if sys.platform != "linux":
        return None
    connection = socket.socket(socket.AF_UNIX)
    connection.setblocking(False)
    try:
        connection.connect(_name_of(endpoint))
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    except OSError:
        connection.close()
        return None
    if _CREDENTIALS.unpack(credentials)[1] != os.geteuid():
        connection.close()
        return None
    return connection


def _name_of(endpoint: str) -> str:
    return f"\0shoal-experts {endpoint}"
