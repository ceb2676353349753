"""Models, tokenizer, health, version, request ids."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest

from router.api.router_client import StaticEndpoints
from router.api.settings import ApiSettings
from router.api.tokenizer import TextTokenizer
from router.v1 import router_pb2
from tests.router_api.api_server import ApiServer
from tests.router_api.conftest import ASSISTANT, BOS, MAX_MODEL_LEN, MODEL, USER
from tests.router_api.scripted_router import ScriptedRouter


def test_models(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_names_of_the_model_may_be_set(settings: ApiSettings, checkpoint: Path) -> None:
    named = ApiSettings(checkpoint=checkpoint, served_model_names=("org/name", "alias"))
    api = ApiServer(named, StaticEndpoints([]))
    try:
        listed = httpx.get(f"{api.url}/v1/models", timeout=5.0).json()["data"]
        assert [model["id"] for model in listed] == ["org/name", "alias"]
        assert httpx.get(f"{api.url}/v1/models/org/name", timeout=5.0).status_code == 200
        assert httpx.get(f"{api.url}/v1/models/{MODEL}", timeout=5.0).status_code == 404
    finally:
        api.stop()


def test_tokenize_and_back(http: httpx.Client, tokenizer: TextTokenizer) -> None:
    answered = http.post("/tokenize", json={"prompt": "hello"}).json()
    expected = tokenizer.encode_raw("hello")
    assert answered == {"count": len(expected), "max_model_len": MAX_MODEL_LEN, "tokens": expected}
    assert http.post("/detokenize", json={"tokens": expected}).json() == {"prompt": f"{BOS}hello"}


def test_tokenize_without_special_tokens(http: httpx.Client, tokenizer: TextTokenizer) -> None:
    body = {"model": MODEL, "prompt": "hello", "add_special_tokens": False, "return_token_strs": True}
    answered = http.post("/tokenize", json=body).json()
    assert answered["tokens"] == tokenizer.encode_raw("hello")[1:]
    assert "".join(answered["token_strs"]) == "hello"


def test_tokenize_a_chat(http: httpx.Client, tokenizer: TextTokenizer) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}]}
    tokens = http.post("/tokenize", json=body).json()["tokens"]
    assert tokens == tokenizer.encode_raw(f"{BOS}{USER}hello{ASSISTANT}", add_special_tokens=False)
    without = http.post("/tokenize", json={**body, "add_generation_prompt": False}).json()["tokens"]
    assert without == tokens[:-1]


@pytest.mark.parametrize("body", [{}, {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}])
def test_tokenize_takes_one_of_both(http: httpx.Client, body: dict[str, object]) -> None:
    assert http.post("/tokenize", json=body).status_code == 400


@pytest.mark.parametrize("tokens", [[400], [-1], ["x"], "x", None])
def test_detokenize_refuses_what_are_no_tokens(http: httpx.Client, tokens: object) -> None:
    answered = http.post("/detokenize", json={"tokens": tokens})
    assert (answered.status_code, answered.json()["error"]["param"]) == (400, "tokens")


def test_tokenizer_info(http: httpx.Client) -> None:
    info = http.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == (BOS, "<|eos|>")
    assert "messages" in info["chat_template"]


def test_live(http: httpx.Client) -> None:
    assert http.get("/health").status_code == 200
    assert http.get("/health/live").status_code == 200
    assert set(http.get("/version").json()) == {"version"}


def test_ready(http: httpx.Client, router: ScriptedRouter) -> None:
    answered = http.get("/health/ready")
    assert answered.status_code == 200
    assert answered.json()["routers"][0]["id"] == "r0"


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (router_pb2.StatusResponse(message="weights are loading", load_progress=0.25), "weights are loading"),
        (router_pb2.StatusResponse(ready=True, current_step_ms=3_600_000), "a step that has been running for 3600 s"),
        (router_pb2.StatusResponse(draining=True), "a router that is draining"),
    ],
)
def test_not_ready(http: httpx.Client, router: ScriptedRouter, status: router_pb2.StatusResponse, reason: str) -> None:
    router.status = status
    answered = http.get("/health/ready")
    assert answered.status_code == 503 and "retry-after" in answered.headers
    assert answered.json()["waiting_for"] == [reason]
    assert reason in answered.json()["error"]["message"]
    assert answered.json()["routers"][0]["load_progress"] == status.load_progress


def test_not_ready_without_an_answering_router(settings: ApiSettings) -> None:
    router = ScriptedRouter()
    router.stop()
    for endpoints in ([], [router.endpoint]):
        api = ApiServer(settings, StaticEndpoints(endpoints))
        try:
            assert httpx.get(f"{api.url}/health/ready", timeout=5.0).status_code == 503
            assert httpx.get(f"{api.url}/health/live", timeout=5.0).status_code == 200
            assert httpx.get(f"{api.url}/v1/models", timeout=5.0).status_code == 200
        finally:
            api.stop()


def test_request_ids_come_back(http: httpx.Client, router: ScriptedRouter) -> None:
    body = {"model": MODEL, "prompt": "x"}
    answered = http.post("/v1/completions", json=body, headers={"X-Request-Id": "abc-1"})
    assert answered.headers["x-request-id"] == "abc-1"
    assert router.requests[0].request_id == "abc-1-0"
    assert http.get("/nowhere", headers={"X-Request-Id": "abc-2"}).headers["x-request-id"] == "abc-2"


@pytest.mark.parametrize("given", ["a b", "x" * 129, "a;b", ""])
def test_malformed_request_ids_are_replaced(http: httpx.Client, given: str) -> None:
    assert http.get("/health", headers={"X-Request-Id": given}).headers["x-request-id"] not in (given, "")


def test_unknown_fields_are_refused_if_asked(settings: ApiSettings, shared_router: ScriptedRouter) -> None:
    server = ApiServer(replace(settings, strict_fields=True), StaticEndpoints([shared_router.endpoint]))
    try:
        for body, param in (({"hunter2": 1}, None), ({"stream_options": {"hunter2": 1}}, "stream_options")):
            answered = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", **body}, timeout=10.0)
            error = answered.json()["error"]
            assert (answered.status_code, error["code"], error["param"]) == (400, "unknown_parameter", param)
            assert "hunter2" not in answered.text
        assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"}, timeout=10.0).status_code == 200
    finally:
        server.stop()


def test_the_document_names_every_route_for_text(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    for path in document["paths"]:
        answered = http.post(path, json={}) if "post" in document["paths"][path] else http.get(path)
        assert answered.status_code in (200, 400), path
    schemas = document["components"]["schemas"]
    assert {"messages", "tools", "response_format"} <= set(schemas["ChatRequest"]["properties"])
