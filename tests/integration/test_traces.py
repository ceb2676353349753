"""A traced request through real processes: its spans, from the client's traceparent to each expert group's answer."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from router.sequence_trace import MAX_TOLD_STEPS
from router.tracing import Tracer, is_sampled
from tests.local_stack import LocalStack, StackOptions, extra_api, extra_router, wait_until

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CLIENT_SPAN_ID = "b7ad6b7169203331"
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def traced(stack: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """URL of a front that traces what clients say, with a router of its own; and where the spans go."""
    path = tmp_path_factory.mktemp("traces") / "spans.jsonl"
    options = StackOptions(extra_router_arguments=("--trace-to", str(path)))
    with extra_router(stack, options) as router:
        with extra_api(stack, [router.port], ["--trace-to", str(path), "--trace-share", "0"]) as url:
            yield url, path


def ask(url: str, sampled: bool) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0}
    headers = {"traceparent": f"00-{TRACE_ID}-{CLIENT_SPAN_ID}-0{int(sampled)}", "X-Request-Id": "the-request"}
    response = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)
    assert response.status_code == 200


def read_spans(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_spans_lead_from_the_client_to_each_answer_of_an_expert_group(traced: tuple[str, Path], checkpoint: Path):
    url, path = traced
    ask(url, sampled=False)
    ask(url, sampled=True)
    names = {"request", "generate", "router", "queue", "prefill", "decode", "step", "experts"}

    def is_complete() -> bool:
        return names <= {span["name"] for span in read_spans(path)}

    wait_until(is_complete, time.monotonic() + 30, lambda: f"spans: {read_spans(path)}")
    spans = read_spans(path)
    # The request that was not sampled left none.
    assert {span["context"]["trace_id"] for span in spans} == {f"0x{TRACE_ID}"}
    by_name: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for span in spans:
        by_name[span["name"]].append(span)
    assert {name: len(by_name[name]) for name in names - {"experts"}} == dict.fromkeys(names - {"experts"}, 1) | {
        "step": MAX_TOLD_STEPS
    }
    parents = {"generate": "request", "router": "generate", "queue": "router", "prefill": "router", "decode": "router"}
    for name, parent in parents.items():
        assert by_name[name][0]["parent_id"] == by_name[parent][0]["context"]["span_id"]
    assert by_name["request"][0]["parent_id"] == f"0x{CLIENT_SPAN_ID}"
    assert by_name["request"][0]["attributes"]["shoal.request_id"] == "the-request"
    assert by_name["router"][0]["attributes"]["shoal.num_tokens"] == NUM_TOKENS
    steps = {step["context"]["span_id"]: step for step in by_name["step"]}
    config = json.loads((checkpoint / "config.json").read_text())
    moe_layers = set(range(config["first_k_dense_replace"], config["num_hidden_layers"]))
    for step_id, step in steps.items():
        hops = [hop for hop in by_name["experts"] if hop["parent_id"] == step_id]
        assert moe_layers <= {hop["attributes"]["shoal.layer_id"] for hop in hops}
        assert {hop["attributes"]["shoal.expert_group"] for hop in hops} <= {"g0", "g1"}
        for hop in hops:
            assert step["start_time"] <= hop["start_time"] <= hop["end_time"]
            assert hop["attributes"]["shoal.num_pairs"] > 0


class Collector(BaseHTTPRequestHandler):
    """An OTLP/HTTP collector that keeps what it gets."""

    received: list[ExportTraceServiceRequest]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.received.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None: ...


def test_a_collector_gets_spans_over_otlp():
    Collector.received = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        tracer = Tracer("shoal-test", f"http://127.0.0.1:{server.server_port}/v1/traces", share=0.0)
        assert tracer.start("request", "") is None
        span = tracer.start("request", f"00-{TRACE_ID}-{CLIENT_SPAN_ID}-01")
        assert span is not None
        span.add_child("router", 1_000_000_000).end(2_000_000_000)
        span.end(error="overloaded")
        tracer.close()
    finally:
        server.shutdown()
        server.server_close()
    spans = [
        span
        for request in Collector.received
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    found = {span.name: span for span in spans}
    assert found["request"].trace_id.hex() == TRACE_ID
    assert found["request"].parent_span_id.hex() == CLIENT_SPAN_ID
    assert found["request"].status.message == "overloaded"
    assert found["router"].parent_span_id == found["request"].span_id


@pytest.mark.parametrize(
    ("traceparent", "expected"),
    [
        (f"00-{TRACE_ID}-{CLIENT_SPAN_ID}-01", True),
        (f"00-{TRACE_ID}-{CLIENT_SPAN_ID}-00", False),
        ("", False),
        ("00-x-y-zz", False),
        (f"00-{TRACE_ID}-{CLIENT_SPAN_ID}", False),
    ],
)
def test_the_flag_of_a_traceparent_decides(traceparent: str, expected: bool):
    assert is_sampled(traceparent) is expected
