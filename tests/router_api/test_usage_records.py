"""What the front writes down of each kind of request: the same numbers that the client is told."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from router.api.router_client import StaticEndpoints
from router.api.settings import ApiSettings
from router.tenancy.journal_reader import JournalReader
from router.tenancy.usage import UsageRecord
from tests.local_stack import wait_until
from tests.router_api.api_server import ApiServer
from tests.router_api.conftest import MODEL
from tests.router_api.scripted_router import WAIT_S, ScriptedRouter, answer, answer_forever, fail, in_turn


class Recorded:
    """The app with a journal. take: the records since the last call, at least one."""

    def __init__(self, settings: ApiSettings, router: ScriptedRouter, folder: Path) -> None:
        self.server = ApiServer(replace(settings, usage_journal=folder), StaticEndpoints([router.endpoint]))
        self.http = httpx.Client(base_url=self.server.url, timeout=10.0)
        self._records: list[UsageRecord] = []
        self._reader = JournalReader(folder, self._store)

    def _store(self, records: Sequence[UsageRecord]) -> None:
        self._records.extend(records)

    def take(self) -> list[UsageRecord]:
        wait_until(lambda: self._reader.collect() > 0, time.monotonic() + WAIT_S, lambda: "nothing was recorded")
        records, self._records = self._records, []
        return records

    def post(self, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        return self.http.post(path, json={"model": MODEL, **body}, headers={"x-request-id": "mine"})


@pytest.fixture(scope="module")
def recorded(
    settings: ApiSettings, shared_router: ScriptedRouter, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Recorded]:
    recorded = Recorded(settings, shared_router, tmp_path_factory.mktemp("journal"))
    yield recorded
    recorded.http.close()
    recorded.server.stop()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [3, 4, 5], "max_tokens": 4},
        {"prompt": [3, 4, 5], "max_tokens": 4, "n": 3},
        {"prompt": [[3, 4, 5], [6, 7]], "max_tokens": 4, "n": 2},
        {"prompt": "hello world", "max_tokens": 9, "stop": "w"},
        {"prompt": [3], "max_tokens": 4, "echo": True, "logprobs": 1},
    ],
    ids=["plain", "choices", "prompts", "stop string", "echo"],
)
def test_a_record_says_what_the_answer_says(
    recorded: Recorded, router: ScriptedRouter, body: dict[str, Any], stream: bool
) -> None:
    router.script = answer(list(range(100, 120)), per_response=3, cached_tokens=2)
    response = recorded.post(**body, stream=stream, stream_options={"include_usage": True})
    if stream:
        events = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
        usage = json.loads(events[-1])["usage"]
    else:
        usage = response.json()["usage"]
    (record,) = recorded.take()
    assert (record.outcome, record.request_id, record.model, record.team) == ("finished", "mine", MODEL, "anonymous")
    assert (record.tokens_in, record.tokens_out, record.tokens_cached) == (
        usage["prompt_tokens"], usage["completion_tokens"], usage["prompt_tokens_details"]["cached_tokens"]
    )  # fmt: skip
    assert record.started_at <= record.ended_at


def test_a_chat_is_recorded_as_well(recorded: Recorded, router: ScriptedRouter) -> None:
    router.script = answer([100, 101])
    usage = recorded.post("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}]).json()["usage"]
    (record,) = recorded.take()
    assert (record.tokens_in, record.tokens_out) == (usage["prompt_tokens"], usage["completion_tokens"])


def test_a_client_that_leaves_pays_for_what_it_was_sent(recorded: Recorded, router: ScriptedRouter) -> None:
    router.script = answer_forever([100, 101, 102])
    body = {"model": MODEL, "prompt": [3, 4], "max_tokens": 50, "stream": True, "logprobs": 0}
    with recorded.http.stream("POST", "/v1/completions", json=body) as response:
        received = 0
        for line in response.iter_lines():
            if line.startswith("data: {"):
                received += len(json.loads(line.removeprefix("data: "))["choices"][0]["logprobs"]["tokens"])
            if received == 3:
                break
    (record,) = recorded.take()
    assert (record.outcome, record.tokens_in, record.tokens_out) == ("cut_off", 2, 3)


def test_an_error_costs_what_came_before_it(recorded: Recorded, router: ScriptedRouter) -> None:
    router.script = fail(grpc.StatusCode.INTERNAL)
    assert recorded.post(prompt=[3, 4], max_tokens=5).status_code == 500
    router.script = fail(grpc.StatusCode.INTERNAL, after=[100, 101])
    recorded.post(prompt=[3, 4], max_tokens=5, stream=True)
    first, second = recorded.take()
    assert (first.outcome, first.tokens_in, first.tokens_out) == ("failed", 0, 0)
    assert (second.outcome, second.tokens_in, second.tokens_out) == ("failed", 2, 2)


def test_what_several_routers_did_for_one_answer_is_one_record(recorded: Recorded, router: ScriptedRouter) -> None:
    router.script = in_turn(fail(grpc.StatusCode.UNAVAILABLE, after=[100, 101]), answer([102, 103]))
    usage = recorded.post(prompt=[3, 4], max_tokens=4).json()["usage"]
    (record,) = recorded.take()
    assert (record.tokens_in, record.tokens_out) == (2, 4) == (usage["prompt_tokens"], usage["completion_tokens"])


def test_a_request_that_is_refused_at_once_is_not_recorded(recorded: Recorded, router: ScriptedRouter) -> None:
    assert recorded.post(prompt=[3, 4], max_tokens=10_000).status_code == 400
    assert recorded.post(prompt=[], max_tokens=1).status_code == 400
    recorded.post(prompt=[3], max_tokens=1)
    assert len(recorded.take()) == 1
