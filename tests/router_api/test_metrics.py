"""/metrics over real HTTP, with figures that a scripted router gives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import grpc
import httpx
import pytest

from router.api.recent_activity import WINDOW_S, RecentActivity
from router.api.router_client import StaticEndpoints
from router.api.settings import ApiSettings
from router.tenancy.key_ring import ANONYMOUS_TEAM
from router.v1 import router_pb2
from tests.metrics_text import Scrape
from tests.router_api.api_server import ApiServer
from tests.router_api.conftest import MODEL
from tests.router_api.scripted_router import ScriptedRouter, answer, answer_forever, fail

PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def scripted() -> Iterator[ScriptedRouter]:
    router = ScriptedRouter()
    yield router
    router.stop()


@pytest.fixture
def http(settings: ApiSettings, scripted: ScriptedRouter) -> Iterator[httpx.Client]:
    """A front that has counted nothing yet, under both names."""
    scripted.reset()
    server = ApiServer(replace(settings, metrics_compat="vllm"), StaticEndpoints([scripted.endpoint]))
    with httpx.Client(base_url=server.url, timeout=10.0) as client:
        yield client
    server.stop()


def scrape(http: httpx.Client) -> Scrape:
    response = http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return Scrape.parse(response.text)


def complete(http: httpx.Client, max_tokens: int = 4, **fields: object) -> httpx.Response:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": max_tokens, "ignore_eos": True} | fields
    return http.post("/v1/completions", json=body)


def test_a_sequence_is_counted_with_its_tokens_latencies_and_reason(http: httpx.Client, scripted: ScriptedRouter):
    def script(request: router_pb2.GenerateRequest, context: grpc.ServicerContext):
        for response in answer([10, 11, 12, 13], cached_tokens=2)(request, context):
            if response.finish_reason:
                response.times.CopyFrom(router_pb2.SequenceTimes(queue_us=1000, prefill_us=20_000, decode_us=300_000))
            yield response

    scripted.script = script
    assert complete(http).status_code == 200
    found = scrape(http)
    labels = {"model": MODEL, "team": ANONYMOUS_TEAM}
    assert found.get("shoal_prompt_tokens_total", **labels) == 4
    assert found.get("shoal_cached_prompt_tokens_total", **labels) == 2
    assert found.get("shoal_generation_tokens_total", **labels) == 4
    assert found.get("shoal_request_success_total", **labels, finished_reason="length") == 1
    for name in ("time_to_first_token_seconds", "request_time_per_output_token_seconds", "e2e_request_latency_seconds"):
        assert found.get(f"shoal_{name}_count", **labels) == 1
        assert 0 < found.get(f"shoal_{name}_sum", **labels) < 10
    assert found.get("shoal_inter_token_latency_seconds_count", **labels) == 3
    assert found.get("shoal_request_queue_time_seconds_sum", **labels) == pytest.approx(0.001)
    assert found.get("shoal_request_prefill_time_seconds_sum", **labels) == pytest.approx(0.02)
    assert found.get("shoal_request_inference_time_seconds_sum", **labels) == pytest.approx(0.32)
    assert found.get("shoal_request_generation_tokens_bucket", **labels, le="5.0") == 1
    assert found.get("shoal_request_generation_tokens_bucket", **labels, le="2.0") == 0
    assert found.get("shoal_http_requests_total", route="/v1/completions", status="200") == 1


def test_vllm_names_say_the_same_without_our_labels(http: httpx.Client, scripted: ScriptedRouter):
    scripted.script = answer([10, 11])
    scripted.status = router_pb2.StatusResponse(
        router_id="r0", ready=True, num_running=3, num_waiting=2, num_blocks=100, num_blocks_held=25,
        num_prompt_tokens=50, num_cached_tokens=20, num_preemptions=1,
    )  # fmt: skip
    complete(http, max_tokens=2)
    found = scrape(http)
    labels = {"model_name": MODEL}
    assert found.get("vllm:num_requests_running", **labels) == 3
    assert found.get("vllm:num_requests_waiting", **labels) == 2
    assert found.get("vllm:kv_cache_usage_perc", **labels) == 0.25
    assert found.get("vllm:prefix_cache_queries_total", **labels) == 50
    assert found.get("vllm:prefix_cache_hits_total", **labels) == 20
    assert found.get("vllm:num_preemptions_total", **labels) == 1
    assert found.get("vllm:generation_tokens_total", **labels) == 2
    assert found.get("vllm:request_success_total", **labels, finished_reason="length") == 1
    assert found.get("vllm:time_to_first_token_seconds_count", **labels) == 1
    assert found.types["vllm:e2e_request_latency_seconds"] == "histogram"
    ours = [sample for sample in found.samples if sample.name.startswith("vllm:")]
    assert all({"team", "router", "model"}.isdisjoint(sample.labels) for sample in ours)


def test_vllm_names_are_left_out_by_default(settings: ApiSettings, scripted: ScriptedRouter):
    server = ApiServer(settings, StaticEndpoints([scripted.endpoint]))
    try:
        assert "vllm:" not in httpx.get(f"{server.url}/metrics").text
    finally:
        server.stop()


def test_groups_steps_drafts_and_teams_are_what_the_router_says(http: httpx.Client, scripted: ScriptedRouter):
    scripted.status = router_pb2.StatusResponse(
        router_id="r0",
        ready=True,
        step_times=router_pb2.StepTimes(attention_ns=2_000_000_000, step_ns=3_000_000_000),
        num_drafted=[10, 5],
        num_accepted=[8, 2],
        dispatch=router_pb2.DispatchCounters(num_hedges_won=1, errors={"CallTimeout": 3}),
        groups=[
            router_pb2.GroupTraffic(
                name="g0", num_frames=6, num_rows=12, num_pairs=30, sent_bytes=1000, received_bytes=500, num_retries=2,
                num_hedges=1, latency_counts=[1, 0, 3, *[0] * 15, 1], latency_us=9_000_500,
            )
        ],
        replicas=[router_pb2.ReplicaTimes(replica_id="g0-0", connected=True, num_outstanding=4, frame_ms=2.5)],
        teams=[router_pb2.TeamQueue(fairness_key="red", num_running=1, num_waiting=7)],
    )  # fmt: skip
    found = scrape(http)
    group = {"router": "r0", "group": "g0"}
    assert found.get("shoal_step_seconds_total", router="r0", part="attention") == 2
    assert found.get("shoal_whole_step_seconds_total", router="r0") == 3
    assert found.get("shoal_draft_tokens_total", router="r0", position="2") == 5
    assert found.get("shoal_accepted_draft_tokens_total", router="r0", position="1") == 8
    assert found.get("shoal_expert_errors_total", router="r0", kind="CallTimeout") == 3
    assert found.get("shoal_hedges_won_total", router="r0") == 1
    assert found.get("shoal_group_frames_total", **group) == 6
    assert found.get("shoal_group_pairs_total", **group) == 30
    assert found.get("shoal_group_sent_bytes_total", **group) == 1000
    assert found.get("shoal_group_retries_total", **group) == 2
    assert found.get("shoal_group_rpc_seconds_bucket", **group, le="0.000256") == 4
    assert found.get("shoal_group_rpc_seconds_bucket", **group, le="+Inf") == 5
    assert found.get("shoal_group_rpc_seconds_sum", **group) == pytest.approx(9.0005)
    assert found.get("shoal_replica_outstanding_frames", router="r0", replica="g0-0") == 4
    assert found.get("shoal_team_requests_waiting", router="r0", team="red") == 7


def test_what_is_turned_away_or_fails_is_counted_by_its_code(http: httpx.Client, scripted: ScriptedRouter):
    scripted.script = fail(grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert complete(http).status_code == 429
    assert http.post("/v1/completions", json={"model": "nobody's", "prompt": "x"}).status_code == 404
    assert http.get("/nowhere").status_code == 404
    found = scrape(http)
    assert found.get("shoal_rejected_requests_total", reason="overloaded") == 1
    assert found.get("shoal_rejected_requests_total", reason="model_not_found") == 1
    assert found.get("shoal_request_failed_total", team=ANONYMOUS_TEAM, reason="overloaded") == 1
    assert found.get("shoal_http_requests_total", route="unknown", status="404") == 1


def test_a_stop_string_is_a_good_end_and_a_client_that_leaves_is_none(http: httpx.Client, scripted: ScriptedRouter):
    tokens = http.post("/tokenize", json={"prompt": "one stop two", "add_special_tokens": False}).json()["tokens"]
    scripted.script = answer_forever(tokens)
    assert complete(http, max_tokens=50, stop=["stop"]).status_code == 200
    with http.stream("POST", "/v1/completions", json={"prompt": PROMPT, "max_tokens": 50, "stream": True}) as response:
        next(response.iter_lines())
    assert scripted.cancelled.wait(10)
    found = scrape(http)
    assert found.get("shoal_request_success_total", finished_reason="stop") == 1
    assert found.get("shoal_request_failed_total", reason="abort") == 1


def test_a_router_that_does_not_answer_is_down_and_the_page_still_comes(http: httpx.Client, scripted: ScriptedRouter):
    scripted.answers.clear()
    try:
        found = scrape(http)
    finally:
        scripted.answers.set()
    assert found.get("shoal_router_up", endpoint=scripted.endpoint) == 0
    assert "shoal_router_ready" not in found.names


def test_many_who_scrape_at_once_ask_the_router_once(http: httpx.Client, scripted: ScriptedRouter):
    before = scripted.num_status_calls
    for _ in range(5):
        scrape(http)
    assert scripted.num_status_calls == before + 1


def test_recent_activity_has_whole_seconds_and_quantiles_of_the_window():
    recent = RecentActivity()
    recent.add_ttft(10.0, 9.0)  # too long ago
    for number in range(1, 101):
        recent.add_ttft(1000.0, number / 1000)
    recent.add_tokens(1000.2, 3)
    recent.add_tokens(1000.9, 4)
    recent.add_request(1001.0, 20)
    recent.add_tokens(1002.1, 5)  # the second that is running
    found = recent.snapshot(1002.5)
    assert len(found["tokens_per_s"]) == WINDOW_S
    assert found["tokens_per_s"][-2:] == [7, 0]
    assert found["prompt_tokens_per_s"][-1] == 20
    assert found["ttft_ms"] == {"num": 100, "p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert found["tpot_ms"]["p50"] is None
    assert not any(math.isnan(value) for value in found["tokens_per_s"])
