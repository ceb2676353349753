"""A TLS socket in place of a plain one: the same bytes, in order, whatever the buffers hold back."""

from __future__ import annotations

import selectors
import socket
from collections.abc import Iterator

import numpy as np
import pytest

from experts.http2_stream import MessageStream, StreamEnded, make_client_opening, make_server_opening
from experts.tls import PEER_NAME, ClusterTls
from experts.tls_socket import TlsSocket
from experts.wire import Buffer
from tests.certificate_folders import make_folders

TIMEOUT_S = 20.0
MAX_BYTES = 64 * 2**20
Pair = tuple[TlsSocket, TlsSocket]


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> ClusterTls:
    return ClusterTls(make_folders(tmp_path_factory.mktemp("tls")).good)


@pytest.fixture
def pair(tls: ClusterTls) -> Iterator[Pair]:
    """Client and server, shaken hands, with kernel buffers much smaller than what tests send."""
    ends = socket.socketpair()
    for end in ends:
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * 1024)
    client = TlsSocket(ends[0], tls.client_context, server_name=PEER_NAME)
    server = TlsSocket(ends[1], tls.server_context)
    for _ in range(10):
        if [client.handshake(), server.handshake()] == [None, None]:
            break
    else:
        pytest.fail("the handshake did not end")
    yield client, server
    client.close()
    server.close()


def receive_all(end: TlsSocket, limit: int = 2**20) -> bytes:
    """What can be read now."""
    data = b""
    while True:
        try:
            piece = end.recv(limit)
        except BlockingIOError:
            return data
        if not piece:
            return data
        data += piece


def test_parts_of_any_size_arrive_in_order_though_the_buffers_are_full(pair: Pair) -> None:
    client, server = pair
    random = np.random.default_rng(3)
    parts: list[Buffer] = [random.bytes(size) for size in (9, 0, 5, 16_384, 1, 300_000, 40_000, 3, 16_383, 70_000)]
    wanted = b"".join(parts)
    rest, received, num_blocked = [memoryview(part) for part in parts], b"", 0
    while rest:
        try:
            sent = client.sendmsg(rest[:4])
        except BlockingIOError:
            num_blocked += 1
            received += receive_all(server)
            continue
        while rest and sent >= len(rest[0]):
            sent -= len(rest.pop(0))
        if rest and sent:
            rest[0] = rest[0][sent:]
    assert num_blocked > 3
    assert received + receive_all(server) == wanted


def test_nothing_is_left_that_a_selector_does_not_tell_of(pair: Pair) -> None:
    client, server = pair
    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        client.sendmsg([b"a" * 5000, b"b" * 5000])
        assert selector.select(TIMEOUT_S)
        data = server.recv(2**20)
        assert len(data) == 10_000
        with pytest.raises(BlockingIOError):
            server.recv(2**20)
        assert not selector.select(0)


def test_what_came_before_the_end_is_read_before_the_end(pair: Pair) -> None:
    client, server = pair
    client.send(b"the last words")
    client.shutdown(socket.SHUT_WR)
    assert server.recv(2**20) == b"the last words"
    assert server.recv(2**20) == b""


def test_messages_of_a_stream_come_through_as_they_were(pair: Pair) -> None:
    client_socket, server_socket = pair
    opening = make_client_opening("/experts.v1.ExpertService/Compute")
    client = MessageStream(client_socket, opening, MAX_BYTES)
    client.flush()
    assert server_socket.recv(len(opening)) == opening
    server = MessageStream(server_socket, make_server_opening(), MAX_BYTES, knows_settings=True)
    random = np.random.default_rng(7)
    messages = [random.bytes(size) for size in (1, 15_000, 3_000_000, 0, 200_000)]
    for key, message in enumerate(messages):
        client.send(key, [message[:7], message[7:]], len(message))
    received: list[Buffer] = []
    for _ in range(100_000):
        server.flush()
        server.receive(received)
        client.flush()
        client.receive([])
        if len(received) == len(messages):
            break
    assert [bytes(message) for message in received] == messages
    assert client.is_idle


def test_a_stream_over_tls_is_not_lent_to_who_reads_its_socket(pair: Pair) -> None:
    assert MessageStream(pair[0], b"", MAX_BYTES).lend() is None


def test_a_peer_that_is_gone_ends_the_stream(pair: Pair) -> None:
    client_socket, server_socket = pair
    server_socket.close()
    with pytest.raises((StreamEnded, OSError)):
        MessageStream(client_socket, b"", MAX_BYTES).receive([])
