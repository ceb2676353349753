"""Ports for servers that a test starts and that must be told their port.

A port that the kernel gave and the test gave back may be anybody's a moment later: every connection on this machine
takes one of the same range. So they are taken from below that range, where only who asks by number gets one, and from
above the ports that Ray gives its workers.
"""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

HOST = "127.0.0.1"
_FIRST_PORT = 20000  # Ray's workers have 10002 to 19999
_TRIES = 200


def find_free_ports(count: int, host: str = HOST) -> list[int]:
    """So many ports in a row that nothing listens on. Raises RuntimeError if there are none."""
    last_port = _find_ephemeral_start() - count
    # Not seeded: test processes beside each other must not look in the same places.
    generator = random.SystemRandom()
    for _ in range(_TRIES):
        first = generator.randint(_FIRST_PORT, last_port)
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind((host, port))
            except OSError:
                continue
            return list(range(first, first + count))
    raise RuntimeError(f"no {count} free ports in a row on {host} between {_FIRST_PORT} and {last_port}")


def _find_ephemeral_start() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        return 32768
