"""The short form of `make fuzz`: the same requests, what schemathesis makes of our OpenAPI document, and the requests
that would cost most for their size."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import hypothesis
import pydantic
import pytest
import schemathesis

from router.api.chat_types import MAX_MESSAGES, ChatRequest
from router.api.form_types import MAX_GRAMMAR_BYTES
from router.api.json_body import MAX_PARTS, decode_json
from router.api.messages_types import MessagesRequest
from router.api.openapi import build_document
from router.api.prompt_backlog import MAX_BACKLOG_TOKENS
from router.api.router_client import StaticEndpoints
from router.api.settings import ApiSettings
from router.api.tokenize import TokenizeRequest
from router.v1 import router_pb2
from tests.fuzz.fuzzer import measure_victim, run_fuzz
from tests.router_api.api_server import ApiServer
from tests.router_api.conftest import write_checkpoint
from tests.router_api.scripted_router import ScriptedRouter, answer

NUM_REQUESTS = 500
FIRST_SEED = 1_000_000


@pytest.fixture(scope="module")
def router() -> Iterator[ScriptedRouter]:
    router = ScriptedRouter()
    router.script = answer([70, 71])
    yield router
    router.stop()


@pytest.fixture(scope="module")
def api(router: ScriptedRouter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    checkpoint: Path = write_checkpoint(tmp_path_factory.mktemp("fuzz") / "tiny")
    server = ApiServer(ApiSettings(checkpoint=checkpoint, body_timeout_s=5.0), StaticEndpoints([router.endpoint]))
    yield server
    server.stop()


def test_broken_requests_are_refused_and_nobody_else_notices(api: ApiServer) -> None:
    report = run_fuzz(api.url, range(FIRST_SEED, FIRST_SEED + NUM_REQUESTS), parallel=16)
    assert report.failures == []
    assert report.num_requests == NUM_REQUESTS
    assert report.statuses[200] > NUM_REQUESTS / 10 and report.statuses[400] > NUM_REQUESTS / 10
    assert len(report.victim_s) > 10
    assert measure_victim(api.url, 5).failures == []


schema = schemathesis.openapi.from_dict(build_document("test"))


@schema.parametrize()
@hypothesis.settings(
    max_examples=5,
    derandomize=True,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.filter_too_much],
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
def test_what_the_document_allows_and_does_not_allow(api: ApiServer, case: schemathesis.Case) -> None:
    answered = case.call(base_url=api.url, timeout=30)
    assert answered.status_code < 500, answered.text
    if answered.status_code >= 400:
        assert set(answered.json()["error"]) == {"message", "type", "param", "code"}


def refuse(api: ApiServer, path: str, body: dict[str, Any] | bytes) -> tuple[int, str, str | None]:
    """Status, code and param of the error."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answered = httpx.post(api.url + path, content=content, headers={"content-type": "application/json"}, timeout=30)
    error = answered.json()["error"]
    return answered.status_code, error["code"], error["param"]


@pytest.mark.parametrize(
    "part", ["[]", "{}", '"ab"', '{"a":[]}', '"\\"[{"', "[[[]]]"], ids=["list", "object", "text", "pair", "sly", "deep"]
)
def test_a_body_of_too_many_parts_is_refused_before_they_are_made(api: ApiServer, part: str) -> None:
    body = b'{"messages":[' + b",".join([part.encode()] * (MAX_PARTS + 1)) + b"]}"
    assert refuse(api, "/v1/chat/completions", body) == (400, "request_too_large", None)


def test_what_stands_in_a_text_is_no_part() -> None:
    text = '[{"' * MAX_PARTS
    assert decode_json(json.dumps({"prompt": text}).encode()) == {"prompt": text}
    assert decode_json(json.dumps([1] * 2 * MAX_PARTS).encode()) == [1] * 2 * MAX_PARTS


@pytest.mark.parametrize("request_type", [ChatRequest, MessagesRequest, TokenizeRequest])
def test_of_many_bad_messages_the_first_is_told(request_type: type[pydantic.BaseModel]) -> None:
    for number in (MAX_MESSAGES, 10 * MAX_MESSAGES):
        with pytest.raises(pydantic.ValidationError) as raised:
            request_type.model_validate({"messages": [{}] * number, "max_tokens": 1})
        assert {error["loc"][1:2] for error in raised.value.errors()} in ({(0,)}, {()})  # or of the list itself


def test_a_schema_is_refused_for_its_size_before_it_is_written_as_text(api: ApiServer) -> None:
    schema = {"enum": ["ab"] * (MAX_GRAMMAR_BYTES // 3 + 1)}
    chat = {
        "messages": [{"role": "user", "content": "x"}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
    }
    found = refuse(api, "/v1/chat/completions", chat)
    assert found == (400, "invalid_value", "response_format.json_schema.schema")


def test_a_text_far_beyond_the_context_is_refused_by_its_beginning(api: ApiServer) -> None:
    text = "def add(self, value): " * 300_000
    expected = (400, "context_length_exceeded")
    assert refuse(api, "/tokenize", {"prompt": text}) == (*expected, "prompt")
    assert refuse(api, "/v1/completions", {"prompt": text}) == (*expected, "prompt")
    chat = {"messages": [{"role": "user", "content": text}]}
    assert refuse(api, "/v1/chat/completions", chat) == (*expected, "messages")


def test_log_probabilities_of_prompts_are_bounded(api: ApiServer, router: ScriptedRouter) -> None:
    before = len(router.requests)
    body = {"prompt": [[5] * 500] * 100, "max_tokens": 1, "echo": True, "logprobs": 20}
    assert refuse(api, "/v1/completions", body) == (400, "invalid_value", "logprobs")
    assert len(router.requests) == before


def test_many_prompts_of_one_request_do_not_fill_the_routers_queues(api: ApiServer, router: ScriptedRouter) -> None:
    num_tokens, num_prompts = 500, 100
    lock = threading.Lock()
    num_running = most_running = 0

    def script(
        request: router_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[router_pb2.GenerateResponse]:
        nonlocal num_running, most_running
        with lock:
            num_running += 1
            most_running = max(most_running, num_running)
        # As long as a step: whoever may come meanwhile does.
        threading.Event().wait(0.02)
        with lock:
            num_running -= 1
        yield from answer([70])(request, context)

    router.script = script
    body = {"prompt": [[5] * num_tokens] * num_prompts, "max_tokens": 1, "ignore_eos": True}
    answered = httpx.post(f"{api.url}/v1/completions", json=body, timeout=30)
    assert answered.status_code == 200 and len(answered.json()["choices"]) == num_prompts
    assert 1 < most_running <= MAX_BACKLOG_TOKENS // num_tokens
