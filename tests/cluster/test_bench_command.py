"""`shoal bench` against an OpenAI endpoint that does what a test tells it, over real HTTP."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cluster import cli
from cluster.bench_client import Answer, EventReader
from cluster.bench_router import render_router, summarize_router
from cluster.router_figures import flatten, read_figures
from router.v1 import router_pb2

NUM_TOKENS = 4


class Endpoint:
    """Streams NUM_TOKENS pieces, or a whole answer. refuse: gives an error body for requests it does not take."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.most_running = 0
        self.refuse: Callable[[dict[str, Any]], tuple[int, str] | None] = lambda body: None
        self.ends_properly = True
        self._num_running = 0
        self._lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(200, {"data": [{"id": "scripted"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint._lock:
                    endpoint.bodies.append(body)
                    endpoint._num_running += 1
                    endpoint.most_running = max(endpoint.most_running, endpoint._num_running)
                try:
                    refusal = endpoint.refuse(body)
                    if refusal is not None:
                        self._answer(refusal[0], {"error": {"code": refusal[1], "message": "no"}})
                    elif body.get("stream"):
                        self._stream(body)
                    else:
                        self._answer(200, {"choices": [{"text": "abcd"}], "usage": USAGE})
                finally:
                    with endpoint._lock:
                        endpoint._num_running -= 1

            def _answer(self, status: int, document: dict[str, Any]) -> None:
                data = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def _stream(self, body: dict[str, Any]) -> None:
                self.send_response(200)
                self.send_header("Connection", "close")
                self.end_headers()
                is_chat = "messages" in body
                for _ in range(NUM_TOKENS):
                    choice = {"delta": {"content": "a"}} if is_chat else {"text": "a"}
                    self._event(json.dumps({"choices": [choice]}))
                if endpoint.ends_properly:
                    self._event(json.dumps({"choices": [], "usage": USAGE}))
                    self._event("[DONE]")
                self.close_connection = True

            def _event(self, data: str) -> None:
                self.wfile.write(f"data: {data}\n\n".encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()


USAGE = {"prompt_tokens": 20, "completion_tokens": NUM_TOKENS, "total_tokens": 20 + NUM_TOKENS}


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    running = Endpoint()
    yield running
    running.stop()


def bench(endpoint: Endpoint, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = cli.main(["bench", "--url", endpoint.url, "--json", "--input-length", "20", *arguments])
    out = capsys.readouterr().out
    return code, json.loads(out) if out else {}


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_every_request_is_counted_with_the_tokens_that_the_server_tells(
    api: str, endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = bench(endpoint, capsys, "--requests", "12", "--concurrency", "3", "--api", api, "--slo", "e2e=60s")

    assert code == 0
    assert report["model"] == "scripted"
    assert (report["num_requests"], report["num_answered"], report["errors"]) == (12, 12, {})
    assert report["num_output_tokens"] == 12 * NUM_TOKENS
    assert report["num_prompt_tokens"] == 12 * 20
    assert report["goodput_fraction"] == 1.0
    assert all(report[f"{name}_ms"]["p99"] > 0 for name in ("ttft", "e2e"))
    assert endpoint.most_running <= 3
    measured = endpoint.bodies[-12:]
    prompts = {json.dumps(body.get("prompt") or body["messages"]) for body in measured}
    assert len(prompts) == 12
    assert all(body["stream_options"] == {"include_usage": True} for body in measured)


def test_an_endpoint_without_token_ids_and_ignore_eos_gets_plain_text(
    endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(body: dict[str, Any]) -> tuple[int, str] | None:
        return (400, "invalid") if isinstance(body["prompt"], list) or "ignore_eos" in body else None

    endpoint.refuse = refuse
    code, report = bench(endpoint, capsys, "--requests", "3")
    assert (code, report["prompt_kind"], report["num_answered"]) == (0, "text", 3)


def test_failures_are_counted_by_kind_and_end_in_exit_code_1(
    endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    # The first two are the first request and the one to warm up.
    endpoint.refuse = lambda body: (429, "overloaded") if len(endpoint.bodies) in (4, 6) else None
    code, report = bench(endpoint, capsys, "--requests", "6", "--concurrency", "1")
    assert code == 1
    assert report["errors"] == {"HTTP 429: overloaded": 2}
    assert report["num_answered"] == 4


def test_a_stream_that_breaks_off_is_no_answer(endpoint: Endpoint, capsys: pytest.CaptureFixture[str]) -> None:
    def break_later(body: dict[str, Any]) -> None:
        endpoint.ends_properly = len(endpoint.bodies) <= 2

    endpoint.refuse = break_later
    code, report = bench(endpoint, capsys, "--requests", "2")
    assert code == 1
    assert report["errors"] == {"stream ended without [DONE]": 2}


def test_a_rate_and_a_duration_bound_the_load(endpoint: Endpoint, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = bench(endpoint, capsys, "--rate", "200", "--duration", "0.3", "--no-stream", "--concurrency", "64")
    assert code == 0
    assert 10 <= report["num_requests"] <= 200
    assert report["ttft_ms"] is None
    assert report["num_output_tokens"] == NUM_TOKENS * report["num_answered"]


def test_the_table_names_what_was_measured(endpoint: Endpoint, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--url", endpoint.url, "--requests", "2", "--slo", "ttft=1"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("2 of 2 requests", "TTFT", "TPOT", "ITL", "E2E", "p99", "goodput"))


@pytest.mark.parametrize("arguments", [["--rate", "0"], ["--input-length", "x"], ["--slo", "x=1"], ["--prompts", "/x"]])
def test_wrong_options_are_one_line_and_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--url", "http://127.0.0.1:1", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_endpoint_that_does_not_answer_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--url", "http://127.0.0.1:1"]) == 1
    assert "does not answer" in capsys.readouterr().err


def test_events_cut_anywhere_are_read_whole() -> None:
    stream = b': comment\r\n\r\ndata: {"a":1}\r\n\r\ndata: [DONE]\n\n'
    for cut in range(len(stream)):
        reader = EventReader()
        assert [*reader.push(stream[:cut]), *reader.push(stream[cut:])] == [b'{"a":1}', b"[DONE]"]


def test_only_events_with_text_are_arrivals() -> None:
    answer = Answer()
    events = [
        b'{"choices":[{"delta":{"role":"assistant","content":""}}]}',
        b'{"choices":[{"delta":{"content":"a"}}]}',
        b'{"choices":[{"delta":{"content":"\\""}}]}',
        b'{"choices":[{"delta":{},"finish_reason":"stop"}]}',
    ]
    for at_s, data in enumerate(events):
        answer.push(data, float(at_s))
    assert answer.arrivals_s == [1.0, 2.0]


def test_figures_of_a_router_pass_through_by_name() -> None:
    status = router_pb2.StatusResponse(router_id="r0", num_steps=7, load_progress=0.5, connected_replica_ids=["g0-0"])
    figures = flatten({**read_figures(status), "nested": {"deep": [1, 2], "name": "x", "flag": True}})
    assert figures["num_steps"] == 7
    assert figures["num_running"] == 0
    assert figures["load_progress"] == 0.5
    assert (figures["nested.deep.0"], figures["nested.deep.1"]) == (1, 2)
    assert not any("name" in name or "flag" in name or "router_id" in name for name in figures)


def test_a_router_s_steps_are_told_by_their_parts() -> None:
    """Of the run alone; the first router was busy before, the second was restarted meanwhile."""
    before = {
        "num_steps": 10, "num_generated_tokens": 30, "num_prompt_tokens": 100, "num_cached_tokens": 0,
        "num_preemptions": 1, "step_times.attention_ns": 4e6, "step_times.wait_ns": 6e6, "step_times.step_ns": 1e7,
        "num_drafted.0": 10, "num_drafted.1": 0, "num_accepted.0": 10, "num_accepted.1": 0, "dispatch.num_retries": 0,
    }  # fmt: skip
    after = before | {
        "num_steps": 30, "num_generated_tokens": 80, "num_prompt_tokens": 300, "num_cached_tokens": 50,
        "step_times.attention_ns": 14e6, "step_times.wait_ns": 36e6, "step_times.step_ns": 5e7,
        "num_drafted.0": 30, "num_accepted.0": 25, "dispatch.num_retries": 2,
    }  # fmt: skip
    summary = summarize_router(before, after)
    assert (summary["num_steps"], summary["step_ms"], summary["tokens_per_step"]) == (20, 2.0, 2.5)
    assert summary["parts_ms"] == {"attention": 0.5, "wait": 1.5}
    assert summary["parts_share"] == {"attention": 0.25, "wait": 0.75}
    assert summary["accepted"] == [0.75, None]
    assert (summary["cached_share"], summary["num_preemptions"], summary["num_retries"]) == (0.25, 0, 2)
    text = "\n".join(render_router("r0", summary))
    assert all(words in text for words in ("20 steps of 2.00 ms, 2.50 tokens each", "75.0%", "75% at 1", "25%"))
    assert summarize_router(after, before)["num_steps"] == 10
    assert render_router("r0", summarize_router(after, after)) == ["router r0: no step"]
