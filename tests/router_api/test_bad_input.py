"""Bad input at the HTTP edge: 4xx that names the field, valid JSON, nothing echoed, and the server goes on."""

from __future__ import annotations

import json
import socket
from typing import Any
from unittest.mock import ANY

import httpx
import pytest

from tests.router_api.api_server import ApiServer
from tests.router_api.conftest import MODEL
from tests.router_api.scripted_router import ScriptedRouter

# Put into bad requests to see whether any of it comes back.
SECRET = "hunter2"

ROUTES = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")


def check_refused(answered: httpx.Response, status: int = 400, param: str | None = None) -> dict[str, Any]:
    error = json.loads(answered.content, parse_constant=pytest.fail)["error"]
    assert answered.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"] and error["code"]
    assert SECRET not in answered.text
    assert error["param"] == param
    return error


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"hunter2",
        b"{",
        b"[]",
        b"null",
        b'"hunter2"',
        b'{"model": "tiny", "prompt": "hunter2", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "hunter2", "temperature": Infinity}',
        b'{"model": "tiny", "prompt": "hunter2", "temperature": -Infinity}',
        b'{"model": "tiny", "prompt": "hunter2", "temperature": 1e400}',
        b'{"model": "tiny", "prompt": "hunter2", "unknown": [1, NaN]}',
        b'{"model": "tiny", "prompt": "hunter2", "prompt": "x"}',
        b'{"model": "tiny", "prompt": "hunter2", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny", "prompt": ' + b"[" * 20000 + b"]" * 20000 + b"}",
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'{"model": "tiny", "prompt": "hunter2 \xff"}',
        b'{"model": "tiny", "prompt": "hunter2 \x00"}',
        b'\xef\xbb\xbf{"model": "tiny", "prompt": "hunter2"}',
        b'{"model": "tiny", "prompt": "hunter2"} {}',
    ],
)  # fmt: skip
def test_bodies_that_are_no_proper_json(http: httpx.Client, route: str, body: bytes) -> None:
    check_refused(http.post(route, content=body, headers={"content-type": "application/json"}), param=ANY)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": {"hunter2": 1}}, "prompt"),
        ({"prompt": ["hunter2", 3]}, "prompt"),
        ({"prompt": [1, "hunter2"]}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": [1, 2.0]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2**32]}, "prompt"),
        ({"prompt": [2**63]}, "prompt"),
        ({"prompt": [400]}, "prompt"),
        ({"prompt": ["x"] * 2000}, "prompt"),
        ({"prompt": ["x"] * 17}, "prompt"),
        ({"model": 3}, "model"),
        ({"model": "x" * 5000}, "model"),
        ({"n": "3"}, "n"),
        ({"n": True}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": 0}, "n"),
        ({"n": -1}, "n"),
        ({"n": 17}, "n"),
        ({"n": 10**18}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**18}, "max_tokens"),
        ({"max_tokens": "hunter2"}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hunter2"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"stop": "" }, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 1000}, "stop"),
        ({"stop": [3]}, "stop"),
        ({"stop": {"hunter2": "hunter2"}}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [400]}, "stop_token_ids"),
        ({"stop_token_ids": "hunter2"}, "stop_token_ids"),
        ({"stop_token_ids": list(range(65))}, "stop_token_ids"),
        ({"stream": "yes"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": "hunter2"}}, "stream_options.include_usage"),
        ({"stream_options": "hunter2"}, "stream_options"),
        ({"echo": "true"}, "echo"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "hunter2"}, "suffix"),
        ({"logit_bias": {"hunter2": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"400": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"1": True}}, "logit_bias"),
        ({"logit_bias": {"1": "hunter2"}}, "logit_bias"),
        ({"logit_bias": {str(token_id): 0 for token_id in range(1025)}}, "logit_bias"),
        ({"logit_bias": ["hunter2"]}, "logit_bias"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": "hunter2"}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1000}, "repetition_penalty"),
        ({"user": 3}, "user"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"cache_salt": 3}, "cache_salt"),
    ],
)  # fmt: skip
def test_bad_fields_are_named(
    http: httpx.Client, router: ScriptedRouter, change: dict[str, Any], param: str | None
) -> None:
    check_refused(http.post("/v1/completions", json={"model": MODEL, "prompt": SECRET, **change}), param=param)
    assert router.requests == []


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ('"temperature": NaN', "temperature"),
        ('"temperature": -Infinity', "temperature"),
        ('"temperature": 1e400', "temperature"),
        ('"seed": 999999999999999999999', "seed"),
        ('"stop": ["hunter2", [[1e999]]]', "stop"),
        ('"logit_bias": {"hunter2": {"hunter2": NaN}}', "logit_bias"),
        ('"n": 1, "n": 2', "n"),
        # The words of the client itself are not repeated.
        ('"hunter2": NaN', None),
        ('"hunter2": {"temperature": NaN}', None),
        # Nobody can say what this would be a field of.
        ('"temperature": NaN, "n": [', None),
    ],
)
def test_what_json_does_not_know_is_named_by_its_field(http: httpx.Client, field: str, param: str | None) -> None:
    body = f'{{"model": "{MODEL}", "prompt": "{SECRET}", {field}}}'
    answered = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert check_refused(answered, param=param)["code"] == "invalid_json"


@pytest.mark.parametrize("text", ["hunter2 \\ud800", "\\udc00 hunter2", "hunter2 \\u0000"])
@pytest.mark.parametrize(
    ("route", "field"),
    [
        ("/v1/completions", '"prompt": "{}"'),
        ("/v1/completions", '"prompt": ["x", "{}"]'),
        ("/v1/completions", '"prompt": "x", "stop": "{}"'),
        ("/v1/completions", '"prompt": "x", "user": "{}"'),
        ("/v1/chat/completions", '"messages": [{{"role": "user", "content": "{}"}}]'),
        ("/v1/chat/completions", '"messages": [{{"role": "user", "content": [{{"type": "text", "text": "{}"}}]}}]'),
        ("/tokenize", '"prompt": "{}"'),
    ],
)
def test_text_that_no_tokenizer_takes(http: httpx.Client, route: str, field: str, text: str) -> None:
    body = '{"model": "tiny", ' + field.format(text) + "}"
    answered = http.post(route, content=body, headers={"content-type": "application/json"})
    param = next(name for name in ("messages.0.content", "stop", "user", "prompt") if name.split(".")[0] in field)
    check_refused(answered, param=param)


def test_a_body_over_the_limit(http: httpx.Client) -> None:
    body = json.dumps({"model": MODEL, "prompt": "x" * 70_000})
    check_refused(http.post("/v1/completions", content=body, headers={"content-type": "application/json"}), 413)


def test_a_body_over_the_limit_that_does_not_say_so(http: httpx.Client) -> None:
    def chunks() -> Any:
        yield b'{"model": "tiny", "prompt": "'
        for _ in range(100):
            yield b"x" * 1000

    headers = {"content-type": "application/json"}
    check_refused(http.post("/v1/completions", content=chunks(), headers=headers), 413)


@pytest.mark.parametrize("says_so", [True, False])
def test_a_client_that_sends_on_after_it_was_refused(api: ApiServer, says_so: bool) -> None:
    """It sees its answer and not a reset connection, however much it still has to send."""
    num_chunks = 400
    length = f"Content-Length: {num_chunks * 65536}" if says_so else "Transfer-Encoding: chunked"
    chunk = b"x" * 65536 if says_so else b"10000\r\n" + b"x" * 65536 + b"\r\n"
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{length}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", api.port), timeout=10.0) as connection:
        connection.sendall(head.encode())
        for _ in range(num_chunks):
            connection.sendall(chunk)
        if not says_so:
            connection.sendall(b"0\r\n\r\n")
        with connection.makefile("rb") as answered:
            text = answered.read()
    assert text.startswith(b"HTTP/1.1 413") and b"request_too_large" in text


@pytest.mark.parametrize(
    "headers", [{"content-type": "text/plain"}, {"content-type": "application/json", "content-encoding": "gzip"}]
)
def test_other_content_types(http: httpx.Client, headers: dict[str, str]) -> None:
    check_refused(http.post("/v1/completions", content=b"{}", headers=headers), 415)


def test_a_body_that_never_ends(api: ApiServer) -> None:
    with socket.create_connection(("127.0.0.1", api.port), timeout=10.0) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
        )
        assert connection.recv(64).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("content_length", ["-1", "99999999999999999999", "x", "1, 2"])
def test_lying_content_lengths(api: ApiServer, content_length: str) -> None:
    request = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {content_length}\r\n\r\n{{}}"
    with socket.create_connection(("127.0.0.1", api.port), timeout=10.0) as connection:
        connection.sendall(request.encode())
        assert connection.recv(64).startswith(b"HTTP/1.1 4")


def test_unknown_models(http: httpx.Client, router: ScriptedRouter) -> None:
    for route, rest in (("/v1/completions", {"prompt": "x"}),
                        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
                        ("/tokenize", {"prompt": "x"})):  # fmt: skip
        error = check_refused(http.post(route, json={"model": SECRET, **rest}), 404, "model")
        assert error["code"] == "model_not_found"
    check_refused(http.get(f"/v1/models/{SECRET}"), 404, "model")


def test_unknown_routes_and_methods(http: httpx.Client) -> None:
    check_refused(http.get(f"/v1/{SECRET}"), 404)
    check_refused(http.post("/v1/nothing", json={"input": SECRET}), 404)
    check_refused(http.get("/v1/completions"), 405)
    check_refused(http.get("/docs"), 404)
    check_refused(http.get("/v1/completions/"), 404)


def test_it_still_serves_afterwards(http: httpx.Client, router: ScriptedRouter) -> None:
    assert http.post("/v1/completions", json={"model": MODEL, "prompt": "x"}).status_code == 200
