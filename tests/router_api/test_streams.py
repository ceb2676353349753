"""Clients that leave or stop reading, errors midway, silence: what happens to a stream and to the work behind it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest

from router.api.router_client import StaticEndpoints
from router.api.settings import ApiSettings
from router.api.tokenizer import TextTokenizer
from router.v1 import router_pb2
from tests.router_api.api_server import ApiServer
from tests.router_api.conftest import MODEL, write_checkpoint
from tests.router_api.scripted_router import ScriptedRouter, answer, answer_forever, fail, token

WAIT_S = 10.0


def send_request(port: int, route: str, body: dict[str, Any]) -> socket.socket:
    """A request on a connection of its own, to be dropped at will."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)
    content = json.dumps({"model": MODEL, **body}).encode()
    head = f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    connection.sendall(head.encode() + b"\r\n" + content)
    return connection


def read_until(connection: socket.socket, wanted: bytes) -> bytes:
    received = b""
    while wanted not in received:
        chunk = connection.recv(65536)
        assert chunk, received
        received += chunk
    return received


def wait_for_requests(router: ScriptedRouter, count: int = 1) -> None:
    waited = threading.Event()
    for _ in range(int(WAIT_S / 0.01)):
        if len(router.requests) >= count:
            return
        waited.wait(0.01)
    raise AssertionError("the router was not asked")


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_before_the_first_token(
    api: ApiServer, router: ScriptedRouter, route: str, stream: bool, n: int
) -> None:
    router.script = answer_forever([])
    prompt = {"prompt": "x"} if route == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}
    connection = send_request(api.port, route, {**prompt, "stream": stream, "n": n})
    wait_for_requests(router, n)
    connection.close()
    assert router.cancelled.wait(WAIT_S)


def test_a_client_that_leaves_midway(api: ApiServer, router: ScriptedRouter, tokenizer: TextTokenizer) -> None:
    router.script = answer_forever(tokenizer.encode_raw("hello world", add_special_tokens=False))
    connection = send_request(api.port, "/v1/completions", {"prompt": "x", "stream": True, "max_tokens": 99})
    read_until(connection, b"hello")
    assert not router.cancelled.is_set()
    connection.close()
    assert router.cancelled.wait(WAIT_S)


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_a_client_that_leaves_between_the_last_token_and_the_end(
    api: ApiServer, router: ScriptedRouter, tokenizer: TextTokenizer, route: str
) -> None:
    router.script = answer_forever(tokenizer.encode_raw("hello world", add_special_tokens=False))
    field = {"input": "x"} if route == "/v1/responses" else {"messages": [{"role": "user", "content": "x"}]}
    connection = send_request(api.port, route, {**field, "stream": True, "max_tokens": 99})
    read_until(connection, b"world")
    connection.close()
    assert router.cancelled.wait(WAIT_S)
    assert httpx.get(f"{api.url}/health/live", timeout=WAIT_S).status_code == 200


def test_a_client_of_several_choices_that_leaves_midway(
    api: ApiServer, router: ScriptedRouter, tokenizer: TextTokenizer
) -> None:
    begun, ended = threading.Semaphore(0), threading.Semaphore(0)

    def play(request: router_pb2.GenerateRequest, context: grpc.ServicerContext) -> Iterator[Any]:
        context.add_callback(ended.release)
        begun.release()
        yield from answer_forever([token_id])(request, context)

    token_id = tokenizer.encode_raw("x", add_special_tokens=False)[0]
    router.script = play
    connection = send_request(api.port, "/v1/completions", {"prompt": ["a", "b"], "n": 2, "stream": True})
    for _ in range(4):  # what is cancelled before it begins is never told that it ended
        assert begun.acquire(timeout=WAIT_S)
    read_until(connection, b'"index":3')
    connection.close()
    for _ in range(4):
        assert ended.acquire(timeout=WAIT_S)


def test_a_client_that_stops_reading(settings: ApiSettings, tokenizer: TextTokenizer) -> None:
    """Its buffers fill up, and after send_timeout_s the work is cancelled."""
    token_id = tokenizer.encode_raw("x", add_special_tokens=False)[0]

    def play(request: router_pb2.GenerateRequest, context: grpc.ServicerContext) -> Iterator[Any]:
        while context.is_active():
            yield router_pb2.GenerateResponse(tokens=[token(token_id, request) for _ in range(64)])

    router = ScriptedRouter()
    router.script = play
    api = ApiServer(replace(settings, send_timeout_s=0.5), StaticEndpoints([router.endpoint]))
    try:
        connection = send_request(api.port, "/v1/completions", {"prompt": "x", "stream": True, "logprobs": 20})
        assert router.cancelled.wait(WAIT_S)
        connection.close()
    finally:
        api.stop()
        router.stop()


@pytest.fixture(scope="module")
def talkative_api(settings: ApiSettings, shared_router: ScriptedRouter) -> Iterator[ApiServer]:
    """Fills silence at once."""
    server = ApiServer(
        replace(settings, ping_interval_s=0.1, status_line_wait_s=0.1), StaticEndpoints([shared_router.endpoint])
    )
    yield server
    server.stop()


def test_silence_is_filled_with_comments(talkative_api: ApiServer, router: ScriptedRouter) -> None:
    router.script = answer_forever([])
    connection = send_request(talkative_api.port, "/v1/completions", {"prompt": "x", "stream": True})
    received = read_until(connection, b": ping\n\n")
    assert received.startswith(b"HTTP/1.1 200")
    connection.close()
    assert router.cancelled.wait(WAIT_S)


def test_a_failure_midway_is_one_error_event(
    http: httpx.Client, router: ScriptedRouter, tokenizer: TextTokenizer
) -> None:
    ids = tokenizer.encode_raw("hello", add_special_tokens=False)
    router.script = fail(grpc.StatusCode.INTERNAL, "a secret", after=ids)
    body = {"model": MODEL, "prompt": "x", "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as answered:
        assert answered.status_code == 200
        events = [line.removeprefix("data: ") for line in answered.iter_lines() if line.startswith("data: ")]
    assert "secret" not in "".join(events)
    assert events[-1] == "[DONE]"
    error = json.loads(events[-2])["error"]
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert all("choices" in json.loads(event) for event in events[:-2])


def test_the_official_client_raises_on_a_failure_midway(
    client: openai.OpenAI, router: ScriptedRouter, tokenizer: TextTokenizer
) -> None:
    ids = tokenizer.encode_raw("hello", add_special_tokens=False)
    router.script = fail(grpc.StatusCode.INTERNAL, after=ids)
    with pytest.raises(openai.APIError):
        list(client.completions.create(model=MODEL, prompt="x", stream=True))


def test_a_failure_during_silence_is_an_error_event(talkative_api: ApiServer, router: ScriptedRouter) -> None:
    """The status was sent with the first comment, so the error has to come as an event."""
    release = threading.Event()

    def play(request: router_pb2.GenerateRequest, context: grpc.ServicerContext) -> Iterator[Any]:
        release.wait(WAIT_S)
        yield from fail(grpc.StatusCode.INVALID_ARGUMENT, "too odd")(request, context)

    router.script = play
    url = f"{talkative_api.url}/v1/completions"
    body = {"model": MODEL, "prompt": "x", "stream": True}
    with httpx.stream("POST", url, json=body, timeout=WAIT_S) as answered:
        lines = answered.iter_lines()
        assert next(lines) == ": ping"
        release.set()
        events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert json.loads(events[0])["error"]["message"] == "too odd"
    assert events[1:] == ["[DONE]"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("code", "status", "kind", "has_retry_after"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, 400, "invalid_request_error", False),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 429, "rate_limit_exceeded", True),
        (grpc.StatusCode.UNAVAILABLE, 503, "service_unavailable", True),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 408, "timeout_error", False),
        (grpc.StatusCode.INTERNAL, 500, "server_error", False),
        (grpc.StatusCode.UNKNOWN, 500, "server_error", False),
    ],
)
def test_failures_before_the_first_token_have_a_status(
    http: httpx.Client,
    router: ScriptedRouter,
    stream: bool,
    code: grpc.StatusCode,
    status: int,
    kind: str,
    has_retry_after: bool,
) -> None:
    router.script = fail(code)
    answered = http.post("/v1/completions", json={"model": MODEL, "prompt": "x", "stream": stream, "n": 2})
    assert (answered.status_code, answered.json()["error"]["type"]) == (status, kind)
    assert ("retry-after" in answered.headers) is has_retry_after


def test_a_request_has_a_deadline(settings: ApiSettings) -> None:
    router = ScriptedRouter()
    router.script = answer_forever([])
    api = ApiServer(replace(settings, request_timeout_s=0.3), StaticEndpoints([router.endpoint]))
    try:
        answered = httpx.post(f"{api.url}/v1/completions", json={"model": MODEL, "prompt": "x"}, timeout=WAIT_S)
        assert (answered.status_code, answered.json()["error"]["code"]) == (408, "request_timeout")
        assert router.cancelled.wait(WAIT_S)
    finally:
        api.stop()
        router.stop()


def test_too_many_requests_at_once(settings: ApiSettings) -> None:
    router = ScriptedRouter()
    router.script = answer_forever([])
    api = ApiServer(replace(settings, max_concurrent_requests=1), StaticEndpoints([router.endpoint]))
    try:
        connection = send_request(api.port, "/v1/completions", {"prompt": "x"})
        wait_for_requests(router)
        answered = httpx.post(f"{api.url}/v1/completions", json={"model": MODEL, "prompt": "x"}, timeout=WAIT_S)
        assert answered.status_code == 429 and "retry-after" in answered.headers
        assert httpx.get(f"{api.url}/v1/models", timeout=WAIT_S).status_code == 200
        connection.close()
        assert router.cancelled.wait(WAIT_S)
        router.script = answer([])
        deadline_s = time.monotonic() + WAIT_S
        while answered.status_code != 200:  # The place is free as soon as the server has noticed.
            assert time.monotonic() < deadline_s, answered.text
            answered = httpx.post(f"{api.url}/v1/completions", json={"model": MODEL, "prompt": "x"}, timeout=WAIT_S)
    finally:
        api.stop()
        router.stop()


def test_health_answers_while_a_large_text_is_tokenised(settings: ApiSettings, tmp_path: Path) -> None:
    router = ScriptedRouter()
    # So long a context that the text is not refused before it is tokenised.
    checkpoint = write_checkpoint(tmp_path / MODEL)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 400_000}))
    large = replace(settings, checkpoint=checkpoint, max_body_bytes=8 * 1024 * 1024)
    api = ApiServer(large, StaticEndpoints([router.endpoint]))
    try:
        results: list[httpx.Response] = []
        body = {"model": MODEL, "prompt": "the quick brown fox " * 150_000}

        def post() -> None:
            results.append(httpx.post(f"{api.url}/v1/completions", json=body, timeout=60.0))

        worker = threading.Thread(target=post)
        worker.start()
        longest_s = 0.0
        with httpx.Client(base_url=api.url, timeout=WAIT_S) as client:
            while worker.is_alive():
                longest_s = max(longest_s, client.get("/health").elapsed.total_seconds())
        worker.join(WAIT_S)
        assert results[0].json()["error"]["code"] == "context_length_exceeded"
        # A loop that tokenises answers nobody for most of the time that the request takes.
        assert longest_s < results[0].elapsed.total_seconds() / 2
    finally:
        api.stop()
        router.stop()
