"""What clients see when Ray Serve's proxy answers for itself, played by an app that sends what Serve sends."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from cluster.proxy_guard import ProxyGuard

TEXT = [(b"content-type", b"text/plain")]
STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]


class Serve:
    """Sends messages, and remembers what it was asked."""

    def __init__(self, *messages: Message) -> None:
        self.messages = messages
        self.scopes: list[Scope] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        scope["headers"].append((b"x-request-id", b"of-serve"))
        for message in self.messages:
            await send(message)


def start(status: int, headers: list[tuple[bytes, bytes]]) -> Message:
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(data: bytes, *, more_body: bool = False) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more_body}


async def ask(serve: Serve, path: str = "/v1/x", headers: dict[bytes, bytes] | None = None) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope: dict[str, Any] = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": list((headers or {}).items()),
    }  # fmt: skip
    await ProxyGuard(serve)(scope, receive, send)
    return sent


@pytest.mark.parametrize(
    "messages",
    [
        [start(404, TEXT), body(b"Path '/x' not found. Ping http://.../-/routes for available routes.")],
        [start(503, TEXT), body(b"no replica of '", more_body=True), body(b"api'")],
        [start(408, TEXT), body(b"Request of-serve timed out")],
        [],
    ],
    ids=["no front yet", "no replica", "a deadline of its own", "the replica died"],
)
async def test_what_serve_says_itself_is_an_answer_of_the_api(messages: list[Message]) -> None:
    head, sent_body = await ask(Serve(*messages))
    fields = dict(head["headers"])
    assert (head["status"], fields[b"retry-after"], fields[b"content-type"]) == (503, b"2", b"application/json")
    assert fields[b"x-request-id"] == b"of-serve"
    assert json.loads(sent_body["body"])["error"]["code"] == "unavailable"


@pytest.mark.parametrize(("path", "end"), [("/v1/completions", b"data: [DONE]\n\n"), ("/v1/messages", b"}}\n\n")])
async def test_a_stream_whose_front_dies_ends_in_an_error_event(path: str, end: bytes) -> None:
    *whole, last = await ask(Serve(start(200, STREAM), body(b"data: {}\n\n", more_body=True)), path)
    assert [message["type"] for message in whole] == ["http.response.start", "http.response.body"]
    assert b'"code":"unavailable"' in last["body"] and last["body"].endswith(end) and not last["more_body"]


async def test_what_the_front_says_passes_through() -> None:
    for messages in (
        [start(500, [(b"content-type", b"application/json")]), body(b"{}")],
        [start(200, [(b"content-type", b"text/plain; version=1.0.0")]), body(b"a 1\n")],
        [start(200, STREAM), body(b"data: {}\n\n", more_body=True), body(b"data: [DONE]\n\n")],
    ):
        assert await ask(Serve(*messages)) == messages


async def test_serve_s_own_routes_and_header_fields_do_not_reach_it() -> None:
    serve = Serve(start(200, []), body(b""))
    given = {b"x-request-timeout-seconds": b"0.1", b"x-request-disconnect-disabled": b"?1", b"accept": b"*/*"}
    await ask(serve, "/-/routes", given | {b"x-request-id": b"two words"})
    await ask(serve, "/v1/models", {b"x-request-id": b"mine"})
    (first, second) = serve.scopes
    assert (first["path"], first["raw_path"]) == ("/_/routes", b"/_/routes")
    assert first["headers"][:-1] == [(b"accept", b"*/*")]
    assert (second["path"], second["headers"][:-1]) == ("/v1/models", [(b"x-request-id", b"mine")])
