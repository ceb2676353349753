"""The stream that activations take: between two of ours, against grpcio, and against peers that break the rules."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from experts import http2_stream, wire
from experts.http2_stream import (
    WINDOW_BYTES,
    MessageStream,
    StreamEnded,
    make_client_opening,
    make_frame,
    make_server_opening,
    make_trailers,
    make_window_update,
)
from experts.wire import COMPUTE_METHOD, MAX_MESSAGE_BYTES

TIMEOUT_S = 20.0
SIZES = [0, 1, 4, 5, 16_384 - 5, 16_384, 64 * 1024, 1_000_000, 3]


class Peer:
    """A stream and the messages that it got."""

    def __init__(self, connection: socket.socket, opening: bytes, **options: Any) -> None:
        connection.setblocking(False)
        self.stream = MessageStream(connection, opening, MAX_MESSAGE_BYTES, **options)
        self.received: list[bytes] = []
        self.consumes = True

    def turn(self) -> None:
        """Do what can be done now."""
        readable, writable, _ = select.select([self.stream], [self.stream] if self.stream.wants_write else [], [], 0.01)
        if writable:
            self.stream.flush()
        if readable:
            messages: list[wire.Buffer] = []
            try:
                self.stream.receive(messages)
            finally:
                self.received += map(bytes, messages)
            if self.consumes:
                for message in messages:
                    self.stream.consume(len(message))


def exchange(*peers: Peer, until: Any) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not until():
        assert time.monotonic() < deadline
        for peer in peers:
            peer.turn()


@pytest.fixture
def pair() -> Iterator[tuple[Peer, Peer]]:
    left, right = socket.socketpair()
    client = Peer(left, make_client_opening(COMPUTE_METHOD))
    server = Peer(right, make_server_opening(), knows_settings=True)
    client.stream.flush()
    server.stream.flush()
    # The server's side begins behind the opening.
    opening = make_client_opening(COMPUTE_METHOD)
    while opening:
        opening = opening[len(right.recv(len(opening))) :]
    exchange(client, server, until=lambda: client.stream.is_open)
    yield client, server
    left.close()
    right.close()


@pytest.fixture
def raw() -> Iterator[tuple[Peer, socket.socket]]:
    """A stream and the bare socket of its peer."""
    left, right = socket.socketpair()
    right.settimeout(TIMEOUT_S)
    yield Peer(left, b""), right
    left.close()
    right.close()


def make_messages(seed: int) -> list[bytes]:
    return [random.Random(seed + size).randbytes(size) for size in SIZES]


def send_all(peer: Peer, messages: list[bytes]) -> None:
    for number, message in enumerate(messages):
        middle = len(message) // 3
        peer.stream.send(number, [message[:middle], memoryview(message)[middle:]], len(message))


def test_messages_of_any_size_arrive_whole_and_in_order_both_ways_at_once(pair: tuple[Peer, Peer]) -> None:
    client, server = pair
    out, back = make_messages(1), make_messages(2)
    send_all(client, out)
    send_all(server, back)
    exchange(client, server, until=lambda: len(client.received) == len(back) and len(server.received) == len(out))
    assert server.received == out and client.received == back
    assert client.stream.is_idle and server.stream.is_idle


def test_bytes_may_arrive_one_by_one(raw: tuple[Peer, socket.socket]) -> None:
    peer, other = raw
    message = b"\0" + struct.pack(">I", 6) + b"sixsix"
    padded = make_frame(0, 0x8, 1, b"\x03" + message[:7] + b"\0\0\0")
    for byte in padded + make_frame(0, 0, 1, message[7:]) + make_frame(0, 0, 1, b"") + make_frame(0, 0, 1, message):
        other.send(bytes((byte,)))
        exchange(peer, until=lambda: not select.select([peer.stream], [], [], 0)[0])
    assert peer.received == [b"sixsix", b"sixsix"]


def test_a_peer_gets_no_more_than_its_credit_until_messages_are_consumed(pair: tuple[Peer, Peer]) -> None:
    client, server = pair
    server.consumes = False
    message = bytes(1_000_000)
    num_messages = 2 * WINDOW_BYTES // len(message)
    for number in range(num_messages):
        client.stream.send(number, [message], len(message))
    fitting = WINDOW_BYTES // (len(message) + 5)
    exchange(client, server, until=lambda: len(server.received) == fitting and not client.stream.wants_write)
    for _ in range(5):
        server.turn()
    assert len(server.received) == fitting and not client.stream.is_idle
    for _ in range(fitting):
        server.stream.consume(len(message))
    server.consumes = True
    exchange(client, server, until=lambda: len(server.received) == num_messages)


def test_a_message_larger_than_the_window_gets_the_credit_it_needs(pair: tuple[Peer, Peer]) -> None:
    client, server = pair
    for _ in range(2):
        message = random.Random(3).randbytes(WINDOW_BYTES + 1_000_000)
        client.stream.send(1, [message], len(message))
        server.received.clear()
        exchange(client, server, until=lambda: bool(server.received))
        assert server.received == [message]


def test_credit_that_is_not_given_yet_never_holds_a_message_up(pair: tuple[Peer, Peer]) -> None:
    client, server = pair
    for size in (3_000_000, WINDOW_BYTES - 1_000, 3_500_000, WINDOW_BYTES + 1_000):
        client.stream.send(1, [bytes(size)], size)
        exchange(client, server, until=lambda: bool(server.received))
        assert len(server.received.pop()) == size


def test_a_message_is_taken_back_unless_it_is_half_sent(pair: tuple[Peer, Peer]) -> None:
    client, server = pair
    large = bytes(8_000_000)
    for number in range(2):
        client.stream.send(number, [large], len(large))
    assert client.stream.wants_write
    assert not client.stream.withdraw(0)
    assert client.stream.withdraw(1)
    client.stream.send(2, [b"small"], 5)
    exchange(client, server, until=lambda: len(server.received) == 2)
    assert server.received[1] == b"small"
    assert client.stream.withdraw(2)  # it is gone out whole: nothing is left half


def test_pings_and_settings_are_answered(raw: tuple[Peer, socket.socket]) -> None:
    peer, other = raw
    other.send(make_frame(4, 0, 0) + make_frame(6, 0, 0, b"12345678") + make_frame(0xBB, 0xFF, 7, b"unknown"))
    peer.turn()
    assert other.recv(100) == make_frame(4, 1, 0) + make_frame(6, 1, 0, b"12345678")


def test_settings_are_acknowledged_before_anything_goes_by_them(raw: tuple[Peer, socket.socket]) -> None:
    """Until then the peer holds us to the old ones: a grpcio server ended one stream in six."""
    peer, other = raw
    peer.stream.send(1, [bytes(70_000)], 70_000)
    sent = b""
    while len(sent) < 65_535:  # the window that a stream begins with, and the frames' headers
        peer.turn()
        sent += other.recv(100_000)
    other.send(make_window_update(0, 100_000) + make_frame(4, 0, 0, b"\0\x04" + (200_000).to_bytes(4, "big")))
    peer.turn()
    assert other.recv(9) == make_frame(4, 1, 0)
    assert other.recv(4) == (4470).to_bytes(3, "big") + b"\0"  # the rest of the message, as DATA


MESSAGE = b"\0\0\0\0\x01x"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (make_frame(0, 0, 1, b"\x01\0\0\0\x01x"), "compressed"),
        (make_frame(0, 0, 1, b"\0\xff\xff\xff\xff"), "4294967295 bytes"),
        (make_frame(0, 0x8, 1, b"\x09" + MESSAGE), "padding"),
        (make_frame(0, 0x1, 1, MESSAGE), "ended the stream"),
        (make_frame(1, 0x4, 1, bytes(20_000)), "20000 bytes"),
        (make_frame(1, 0, 1, b"\x88") + make_frame(6, 0, 0, bytes(8)), "headers"),
        (make_frame(3, 0, 1, (8).to_bytes(4, "big")), "code 8"),
        (make_frame(7, 0, 0, bytes(8) + b"too_many_pings"), "too_many_pings"),
        (make_frame(4, 0, 0, b"12345"), "SETTINGS"),
        (make_frame(4, 0, 0, struct.pack(">HI", 5, 1)), "frame size of 1"),
        (make_frame(4, 0, 0, struct.pack(">HI", 4, 1 << 31)), "window of"),
        (make_window_update(1, (1 << 31) - 1), "more credit"),
        (make_frame(8, 0, 0, b"1"), "WINDOW_UPDATE"),
        (make_trailers(8, "64 streams are open: ä"), "64 streams are open: ä"),
    ],
)
def test_what_breaks_the_rules_or_ends_the_stream_says_so(
    raw: tuple[Peer, socket.socket], data: bytes, reason: str
) -> None:
    peer, other = raw
    other.sendall(data)
    with pytest.raises(StreamEnded, match=reason):
        exchange(peer, until=lambda: False)


def test_what_came_together_with_the_end_is_not_lost(raw: tuple[Peer, socket.socket]) -> None:
    peer, other = raw
    message = b"\0" + struct.pack(">I", 4) + b"last"
    other.sendall(make_frame(0, 0, 1, message) + make_trailers(14, "stops"))
    with pytest.raises(StreamEnded, match="stops"):
        exchange(peer, until=lambda: False)
    assert peer.received == [b"last"]


def test_more_than_the_credit_ends_the_stream(raw: tuple[Peer, socket.socket]) -> None:
    peer, other = raw
    peer.consumes = False
    message = b"\0" + struct.pack(">I", 1_000_000) + bytes(1_000_000)

    def send() -> None:
        with contextlib.suppress(OSError):
            for _ in range(17):
                other.sendall(make_frame(0, 0, 1, message))

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(StreamEnded, match="credit"):
        exchange(peer, until=lambda: False)
    peer.stream.close()
    other.close()
    sender.join(TIMEOUT_S)


def test_a_peer_that_only_pings_and_never_reads_is_given_up(
    raw: tuple[Peer, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http2_stream, "_MAX_UNSENT_CONTROL_BYTES", 100)
    peer, other = raw
    other.sendall(make_frame(6, 0, 0, bytes(8)) * 50)
    with pytest.raises(StreamEnded, match="pings"):
        exchange(peer, until=lambda: False)


def test_garbage_never_does_anything_but_end_the_stream() -> None:
    for seed in range(200):
        source = random.Random(seed)
        left, right = socket.socketpair()
        peer = Peer(left, b"")
        frames = b"".join(
            make_frame(source.randrange(10), source.randrange(256), source.randrange(3), source.randbytes(size))
            for size in range(0, 40, 2)
        )
        right.sendall(frames if seed % 2 else source.randbytes(500))
        right.close()
        with pytest.raises((StreamEnded, OSError)):
            exchange(peer, until=lambda: False)
        left.close()


class _Echo(grpc.GenericRpcHandler):
    """A grpcio server that gives every message back."""

    def service(self, handler_call_details: Any) -> Any:
        assert handler_call_details.method == COMPUTE_METHOD
        return grpc.stream_stream_rpc_method_handler(self._echo)

    def _echo(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        context.send_initial_metadata(())
        for request in requests:
            if request == b"end":
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "as asked")
            yield request


@pytest.fixture
def grpcio_echo() -> Iterator[Peer]:
    options = [(f"grpc.max_{direction}_message_length", MAX_MESSAGE_BYTES) for direction in ("receive", "send")]
    server = grpc.server(ThreadPoolExecutor(2), options=options)
    server.add_generic_rpc_handlers((_Echo(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    peer = Peer(socket.create_connection(("127.0.0.1", port)), make_client_opening(COMPUTE_METHOD))
    peer.stream.flush()
    yield peer
    peer.stream.close()
    server.stop(0).wait(TIMEOUT_S)


def test_a_server_of_grpcio_understands_it(grpcio_echo: Peer) -> None:
    messages = [*make_messages(4), random.Random(5).randbytes(WINDOW_BYTES + 5_000_000), b"last"]
    send_all(grpcio_echo, messages)
    exchange(grpcio_echo, until=lambda: len(grpcio_echo.received) == len(messages))
    assert grpcio_echo.received == messages
    grpcio_echo.stream.send(1, [b"end"], 3)
    with pytest.raises(StreamEnded, match="as asked"):
        exchange(grpcio_echo, until=lambda: False)
