"""The short form of `make fuzz`: the same requests, and what schemathesis makes of our OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import schemathesis

from router.api.openapi import build_document
from router.api.router_client import StaticEndpoints
from router.api.settings import ApiSettings
from tests.fuzz.fuzzer import measure_victim, run_fuzz
from tests.router_api.api_server import ApiServer
from tests.router_api.conftest import write_checkpoint
from tests.router_api.scripted_router import ScriptedRouter, answer

NUM_REQUESTS = 500
FIRST_SEED = 1_000_000


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    checkpoint: Path = write_checkpoint(tmp_path_factory.mktemp("fuzz") / "tiny")
    router = ScriptedRouter()
    router.script = answer([70, 71])
    server = ApiServer(ApiSettings(checkpoint=checkpoint, body_timeout_s=5.0), StaticEndpoints([router.endpoint]))
    yield server
    server.stop()
    router.stop()


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
