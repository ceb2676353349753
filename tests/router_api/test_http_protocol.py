"""Heads that are too large, too slow or no HTTP, and clients that stop reading, on the connection itself."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from router.api.http_protocol import MAX_HEAD_BYTES, BoundedProtocol
from router.api.router_client import StaticEndpoints
from router.api.settings import ApiSettings
from router.api.tokenizer import TextTokenizer
from router.v1 import router_pb2
from tests.router_api.api_server import ApiServer
from tests.router_api.scripted_router import ScriptedRouter, token

WAIT_S = 20.0
GET = b"GET /version HTTP/1.1\r\nHost: x\r\n"


class HastyProtocol(BoundedProtocol):
    head_timeout_s = 0.3
    reader_timeout_s = 0.3


@pytest.fixture(scope="module")
def hasty_api(settings: ApiSettings, shared_router: ScriptedRouter) -> Iterator[ApiServer]:
    server = ApiServer(settings, StaticEndpoints([shared_router.endpoint]), protocol=HastyProtocol)
    yield server
    server.stop()


def connect(api: ApiServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", api.port), timeout=WAIT_S)


def read_answer(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and body of one answer; more than it raises."""
    received = b""
    while b"\r\n\r\n" not in received:
        part = connection.recv(4096)
        assert part, received
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    while len(body) < int(fields[b"content-length"]):
        body += connection.recv(4096)
    return int(head.split(b" ")[1]), json.loads(body)


def check_error(connection: socket.socket, status: int, code: str) -> None:
    answered, body = read_answer(connection)
    assert (answered, body["error"]["code"]) == (status, code)
    assert set(body["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "head",
    [
        GET + b"X-Long: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n",
        GET + b"X: y\r\n" * (MAX_HEAD_BYTES // 6) + b"\r\n",
        b"GET /" + b"x" * MAX_HEAD_BYTES + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        # No end, so that nothing of it counts as a field.
        GET + b"X-Long: " + b"x" * (1024 * 1024),
        b"GET /" + b"x" * (1024 * 1024),
    ],
    ids=["a long field", "many fields", "a long path", "a field without end", "a path without end"],
)
def test_a_head_over_the_limit_is_refused_whole(api: ApiServer, head: bytes) -> None:
    """The answer arrives although the client was still sending."""
    with connect(api) as connection:
        connection.sendall(head)
        check_error(connection, 431, "header_too_large")
        assert connection.recv(64) == b""


def test_heads_below_the_limit_are_served_one_after_the_other(api: ApiServer) -> None:
    """However much they come to together."""
    field = b"X-Long: " + b"x" * (MAX_HEAD_BYTES // 2) + b"\r\n\r\n"
    with connect(api) as connection:
        for _ in range(4):
            connection.sendall(GET + field)
            assert read_answer(connection)[0] == 200


@pytest.mark.parametrize(
    "sent", [b"\x16\x03\x01\x02\x00\x01", b"GET /version HTTP/x\r\n\r\n", GET + b"Content-Length: x\r\n\r\n"]
)
def test_what_is_no_http_is_refused_in_the_same_form(api: ApiServer, sent: bytes) -> None:
    with connect(api) as connection:
        connection.sendall(sent)
        check_error(connection, 400, "invalid_http")


def test_a_head_that_drips_in_is_given_up(hasty_api: ApiServer) -> None:
    """Also on a connection that has served a request before."""
    with connect(hasty_api) as connection:
        connection.sendall(GET + b"\r\n")
        assert read_answer(connection)[0] == 200
        connection.sendall(GET)
        check_error(connection, 408, "request_timeout")
        assert connection.recv(64) == b""


def test_a_connection_that_says_nothing_is_closed(hasty_api: ApiServer) -> None:
    with connect(hasty_api) as connection:
        assert connection.recv(64) == b""


def test_a_head_in_time_has_no_say_in_how_long_an_answer_takes(
    hasty_api: ApiServer, router: ScriptedRouter, tokenizer: TextTokenizer
) -> None:
    token_id = tokenizer.encode_raw("x", add_special_tokens=False)[0]

    def play(request: router_pb2.GenerateRequest, context: grpc.ServicerContext) -> Iterator[Any]:
        # Three times as long as a head may take; nothing else happens meanwhile.
        router.cancelled.wait(3 * HastyProtocol.head_timeout_s)
        yield router_pb2.GenerateResponse(tokens=[token(token_id, request)])
        yield router_pb2.GenerateResponse(finish_reason=router_pb2.FINISH_REASON_LENGTH)

    router.script = play
    body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    with connect(hasty_api) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert read_answer(connection)[0] == 200


def test_a_reader_that_stands_still_is_cut_off(
    hasty_api: ApiServer, router: ScriptedRouter, tokenizer: TextTokenizer
) -> None:
    """By the connection: behind Ray Serve's proxy the app never waits for the client. Its own patience is 60 s here."""
    token_id = tokenizer.encode_raw("x", add_special_tokens=False)[0]

    def play(request: router_pb2.GenerateRequest, context: grpc.ServicerContext) -> Iterator[Any]:
        while context.is_active():
            yield router_pb2.GenerateResponse(tokens=[token(token_id, request) for _ in range(64)])

    router.script = play
    body = json.dumps({"prompt": "x", "stream": True, "logprobs": 20}).encode()
    with connect(hasty_api) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert router.cancelled.wait(WAIT_S)
