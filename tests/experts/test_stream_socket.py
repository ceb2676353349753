"""The unix socket beside an endpoint: found by its name, by the same user only."""

import os
import socket
import sys

import pytest

from experts.stream_socket import connect_beside, listen_beside, set_stream_options

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="abstract unix sockets are Linux's")
TIMEOUT_S = 10.0


@pytest.fixture
def endpoint() -> str:
    """A free one: as long as this process lives, no other takes its id for a port."""
    return f"127.0.0.1:{os.getpid() + 100_000}"


def test_bytes_go_through_and_a_buffer_takes_a_large_frame(endpoint: str) -> None:
    listener = listen_beside(endpoint, 1)
    assert listener is not None
    with listener:
        connection = connect_beside(endpoint)
        assert connection is not None
        accepted, _ = listener.accept()
        with connection, accepted:
            set_stream_options(connection)
            assert connection.send(bytes(100_000)) == 100_000
            accepted.settimeout(TIMEOUT_S)
            assert accepted.recv(100_000, socket.MSG_WAITALL) == bytes(100_000)


def test_nobody_listens_or_somebody_else_has_the_name(endpoint: str) -> None:
    assert connect_beside(endpoint) is None
    listener = listen_beside(endpoint, 1)
    assert listener is not None
    with listener:
        assert listen_beside(endpoint, 1) is None
    assert connect_beside(endpoint) is None


def test_another_users_socket_is_not_trusted(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = listen_beside(endpoint, 1)
    assert listener is not None
    with listener:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert connect_beside(endpoint) is None
