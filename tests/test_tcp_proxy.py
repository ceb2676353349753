"""The proxy itself: bytes arrive unchanged and in time, and each fault is the fault it says."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.tcp_proxy import HOST, TcpProxy, tcp_proxy

TIMEOUT_S = 20.0


@pytest.fixture(scope="module")
def echo() -> Iterator[str]:
    """The address of a server that sends everything back."""
    listener = socket.create_server((HOST, 0))

    def serve_one(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(65536):
                connection.sendall(data)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=serve_one, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    yield f"{HOST}:{listener.getsockname()[1]}"
    listener.close()


@pytest.fixture
def proxy(echo: str) -> Iterator[TcpProxy]:
    with tcp_proxy([echo, echo]) as proxy:
        yield proxy


def connect(proxy: TcpProxy, target: int = 0) -> socket.socket:
    host, _, port = proxy.endpoints[target].rpartition(":")
    return socket.create_connection((host, int(port)), timeout=TIMEOUT_S)


def ask(connection: socket.socket, data: bytes = b"hello") -> bytes:
    sender = threading.Thread(target=connection.sendall, args=(data,))
    sender.start()
    received = bytearray()
    while len(received) < len(data):
        part = connection.recv(1 << 20)
        assert part, "the connection ended"
        received += part
    sender.join(TIMEOUT_S)
    return bytes(received)


def test_bytes_arrive_unchanged_and_the_end_is_handed_on(proxy: TcpProxy) -> None:
    data = bytes(range(256)) * 40_000  # more than the proxy holds at once
    with connect(proxy) as one, connect(proxy, 1) as other:
        assert ask(one, data) == data and ask(other) == b"hello"
        one.shutdown(socket.SHUT_WR)
        assert one.recv(1) == b""


def test_a_delay_is_kept_in_each_direction(proxy: TcpProxy) -> None:
    with connect(proxy) as connection:
        ask(connection)
        proxy.set_delay(30.0)
        started_s = time.monotonic()
        ask(connection)
        assert time.monotonic() - started_s >= 0.06


def test_a_stall_holds_everything_and_loses_nothing(proxy: TcpProxy) -> None:
    with connect(proxy) as connection, connect(proxy, 1) as other:
        ask(connection)
        proxy.stall(target=0)
        connection.sendall(b"held")
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            connection.recv(4)
        assert ask(other) == b"hello"
        proxy.resume()
        connection.settimeout(TIMEOUT_S)
        assert connection.recv(4) == b"held"


def test_a_cut_resets_what_is_open_and_takes_new_connections(proxy: TcpProxy) -> None:
    with connect(proxy) as connection:
        ask(connection)
        assert proxy.cut() == 1
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    with connect(proxy) as connection:
        assert ask(connection) == b"hello"


def test_refused_connections_are_reset_until_allowed_again(proxy: TcpProxy) -> None:
    proxy.refuse()
    with pytest.raises(ConnectionResetError), connect(proxy) as connection:
        connection.recv(1)
    proxy.refuse(False)
    with connect(proxy) as connection:
        assert ask(connection) == b"hello"


@pytest.mark.parametrize("direction", ["to_server", "to_client"])
def test_a_black_hole_swallows_one_direction_until_restored(proxy: TcpProxy, direction) -> None:
    with connect(proxy) as connection:
        ask(connection)
        proxy.black_hole(direction)
        connection.sendall(b"lost")
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            connection.recv(4)
        proxy.restore()
        connection.settimeout(TIMEOUT_S)
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    with connect(proxy) as connection:
        assert ask(connection) == b"hello"
