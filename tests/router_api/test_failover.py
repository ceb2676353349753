"""Several routers: who gets a request, and how it goes on when one is lost."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import grpc
import httpx
import pytest

from router.api.api_metrics import ApiMetrics
from router.api.router_client import RouterClient, RouterEndpoint, StaticEndpoints
from router.api.settings import ApiSettings
from router.api.tokenizer import TextTokenizer
from router.v1 import router_pb2
from tests.router_api.api_server import ApiServer
from tests.router_api.conftest import MODEL
from tests.router_api.scripted_router import (
    ScriptedRouter,
    answer,
    answer_forever,
    fail,
    in_turn,
    prompt_response,
    think,
    token,
)

WAIT_S = 10.0


class ChangingEndpoints:
    """An address list that tests change."""

    def __init__(self, endpoints: Sequence[str]) -> None:
        self.endpoints = list(endpoints)
        # Of routers whose weights are told apart; and which of these only finish what they have begun.
        self.versions: dict[str, int] = {}
        self.finishing: set[str] = set()
        self.is_broken = False
        self.is_hanging = False

    async def get(self) -> Sequence[RouterEndpoint]:
        if self.is_hanging:
            await asyncio.sleep(2 * WAIT_S)
        if self.is_broken:
            raise RuntimeError("the directory is gone")
        return [
            RouterEndpoint(address, self.versions.get(address, 0), address not in self.finishing)
            for address in self.endpoints
        ]


class Cluster:
    """Two routers and the app in front of them."""

    def __init__(self, settings: ApiSettings) -> None:
        self.routers = [ScriptedRouter(), ScriptedRouter()]
        self.endpoints = ChangingEndpoints([router.endpoint for router in self.routers])
        self.api = ApiServer(settings, self.endpoints)

    def post(self, **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "prompt": "x", **fields}
        return httpx.post(f"{self.api.url}/v1/completions", json=body, timeout=WAIT_S)

    @property
    def num_requests(self) -> list[int]:
        return [len(router.requests) for router in self.routers]

    def stop(self) -> None:
        self.api.stop()
        for router in self.routers:
            router.stop()


@pytest.fixture
def cluster(settings: ApiSettings) -> Iterator[Cluster]:
    cluster = Cluster(settings)
    yield cluster
    cluster.stop()


def test_the_router_with_fewest_requests_is_chosen(cluster: Cluster) -> None:
    for router in cluster.routers:
        router.script = answer_forever([])
    threads = [threading.Thread(target=cluster.post, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    pause = threading.Event()
    for _ in range(1000):
        if sum(cluster.num_requests) == 4:
            break
        pause.wait(0.01)
    assert cluster.num_requests == [2, 2]


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED]
)
def test_a_router_that_refuses_is_passed_over(cluster: Cluster, code: grpc.StatusCode) -> None:
    script = in_turn(fail(code), answer([50]))
    for router in cluster.routers:
        router.script = script
    assert cluster.post().status_code == 200
    assert cluster.num_requests == [1, 1]


def test_bad_requests_are_not_repeated(cluster: Cluster) -> None:
    for router in cluster.routers:
        router.script = fail(grpc.StatusCode.INVALID_ARGUMENT)
    assert cluster.post().status_code == 400
    assert sum(cluster.num_requests) == 1


def test_full_routers_are_not_asked_again(cluster: Cluster) -> None:
    for router in cluster.routers:
        router.script = fail(grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert cluster.post().status_code == 429
    assert cluster.num_requests == [1, 1]


def test_a_router_on_a_new_address_is_found(cluster: Cluster) -> None:
    """Both are gone, one comes back elsewhere: the request waits for it within its bound."""
    for router in cluster.routers:
        router.stop()
    replacement = ScriptedRouter()
    try:
        results: list[httpx.Response] = []
        worker = threading.Thread(target=lambda: results.append(cluster.post()))
        worker.start()
        cluster.endpoints.endpoints = [replacement.endpoint]
        worker.join(WAIT_S)
        assert results[0].status_code == 200
    finally:
        replacement.stop()


def test_lost_routers_end_in_one_clear_error(cluster: Cluster) -> None:
    for router in cluster.routers:
        router.stop()
    answered = cluster.post()
    assert answered.status_code == 503 and int(answered.headers["retry-after"]) > 0


def test_no_routers_at_all(cluster: Cluster) -> None:
    cluster.endpoints.endpoints = []
    assert cluster.post().status_code == 503


def test_known_routers_serve_while_the_directory_is_gone(cluster: Cluster) -> None:
    assert cluster.post().status_code == 200
    cluster.endpoints.is_broken = True
    for router in cluster.routers:
        router.script = in_turn(fail(grpc.StatusCode.UNAVAILABLE), answer([50]))
    assert cluster.post().status_code == 200


def test_a_directory_that_does_not_answer_delays_nobody(settings: ApiSettings) -> None:
    cluster = Cluster(replace(settings, status_timeout_s=2 * WAIT_S))
    try:
        assert cluster.post().status_code == 200
        cluster.endpoints.is_hanging = True
        script = in_turn(fail(grpc.StatusCode.UNAVAILABLE, after=[50]), answer([51]))
        for router in cluster.routers:
            router.script = script
        assert cluster.post().status_code == 200  # within the time that the client allows
    finally:
        cluster.stop()


def test_a_lost_stream_goes_on_elsewhere(cluster: Cluster, tokenizer: TextTokenizer) -> None:
    ids = [tokenizer.encode_raw(letter, add_special_tokens=False)[0] for letter in "hello world"]
    first, rest = ids[:3], ids[3:]
    script = in_turn(fail(grpc.StatusCode.UNAVAILABLE, after=first), answer(rest, stop_id=1))
    for router in cluster.routers:
        router.script = script
    answered = cluster.post(prompt=[5, 6], max_tokens=40, min_tokens=5, seed=3, echo=True, logprobs=0)
    choice = answered.json()["choices"][0]
    assert choice["text"].endswith("hello world") and choice["finish_reason"] == "stop"
    assert answered.json()["usage"]["completion_tokens"] == len(ids) + 1
    (second,) = [
        request for router in cluster.routers for request in router.requests if len(request.prompt_token_ids) > 2
    ]
    assert list(second.prompt_token_ids) == [5, 6, *first]
    assert (second.max_tokens, second.min_tokens, second.sampling.seed) == (37, 2, 3)
    assert not second.HasField("prompt_logprobs")
    assert second.num_answer_tokens == 3  # to the penalties, no part of the prompt


def test_prompt_logprobs_are_not_repeated_when_a_router_is_lost_among_them(cluster: Cluster) -> None:
    def lose_after_two(request: router_pb2.GenerateRequest, context: grpc.ServicerContext) -> Iterator[Any]:
        response = prompt_response(request)
        del response.prompt_tokens[2:]
        yield response
        context.abort(grpc.StatusCode.UNAVAILABLE, "scripted")

    script = in_turn(lose_after_two, answer([60]))
    for router in cluster.routers:
        router.script = script
    logprobs = cluster.post(prompt=[5, 6, 7, 8], echo=True, logprobs=0, max_tokens=1).json()["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == 5
    assert logprobs["token_logprobs"].count(None) == 1


NUM_TOKENS = 6
ASKED: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": NUM_TOKENS, "seed": 3, "echo": True, "logprobs": 1, "n": 2}


def complete(cluster: Cluster, *, stream: bool, **fields: Any) -> tuple[list[Any], Any]:
    """(per choice: text, log probabilities, finish reason; usage), however it came."""
    if not stream:
        answered = cluster.post(**fields).json()
        return [(one["text"], one["logprobs"], one["finish_reason"]) for one in answered["choices"]], answered["usage"]
    answered = cluster.post(**fields, stream=True, stream_options={"include_usage": True})
    lines = [line.removeprefix("data: ") for line in answered.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    choices: list[Any] = []
    for index in range(fields["n"]):
        parts = [one for chunk in chunks for one in chunk["choices"] if one["index"] == index]
        logprobs: dict[str, list[Any]] = {}
        for part in parts:
            for name, values in (part["logprobs"] or {}).items():
                logprobs.setdefault(name, []).extend(values)
        (finish_reason,) = [one["finish_reason"] for one in parts if one["finish_reason"] is not None]
        choices.append(("".join(one["text"] for one in parts), logprobs, finish_reason))
    return choices, chunks[-1]["usage"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("lost_after", range(NUM_TOKENS + 1))
def test_wherever_a_stream_is_cut_the_answer_is_the_same(
    cluster: Cluster, tokenizer: TextTokenizer, lost_after: int, stream: bool
) -> None:
    """Also before the first token, and after the last one; both choices lose their router."""
    first = tokenizer.encode_raw("a", add_special_tokens=False)[0]
    whole = think(vocabulary=range(first, first + 26))
    for router in cluster.routers:
        router.script = whole
    undisturbed = complete(cluster, stream=stream, **ASKED)
    assert undisturbed[1]["completion_tokens"] == 2 * NUM_TOKENS
    cut = think(vocabulary=range(first, first + 26), lost_after=lost_after)
    for router in cluster.routers:
        router.requests.clear()
        router.script = in_turn(cut, whole)
    assert complete(cluster, stream=stream, **ASKED) == undisturbed
    # How many more there are depends on which choice meets which script.
    assert (sum(cluster.num_requests) > 2) is (lost_after < NUM_TOKENS)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_across_the_loss_of_a_router(cluster: Cluster, tokenizer: TextTokenizer, stream: bool) -> None:
    ids = [tokenizer.encode_raw(letter, add_special_tokens=False)[0] for letter in "one STOP two"]
    script = in_turn(fail(grpc.StatusCode.UNAVAILABLE, after=ids[:6]), answer(ids[6:]))
    for router in cluster.routers:
        router.script = script
    choices, _ = complete(cluster, stream=stream, max_tokens=40, stop="STOP", n=1)
    assert [(text, finish_reason) for text, _, finish_reason in choices] == [("one ", "stop")]


@pytest.mark.parametrize(("last", "finish_reason"), [(1, "stop"), (50, "length")])
def test_a_router_lost_between_the_last_token_and_saying_so(cluster: Cluster, last: int, finish_reason: str) -> None:
    for router in cluster.routers:
        router.script = fail(grpc.StatusCode.UNAVAILABLE, after=[50, 50, last])
    choice = cluster.post(max_tokens=3 if finish_reason == "length" else 9).json()["choices"][0]
    assert choice["finish_reason"] == finish_reason
    assert sum(cluster.num_requests) == 1


def test_a_killed_router_is_replaced_midway(cluster: Cluster, tokenizer: TextTokenizer) -> None:
    """Its connection breaks, as opposed to a status that it sends."""
    ids = tokenizer.encode_raw("hello world", add_special_tokens=False)
    sent = threading.Event()

    def hang(request: router_pb2.GenerateRequest, context: grpc.ServicerContext) -> Iterator[Any]:
        yield router_pb2.GenerateResponse(tokens=[token(ids[0], request)])
        sent.set()
        ended = threading.Event()
        if context.add_callback(ended.set):
            ended.wait(WAIT_S)

    for router in cluster.routers:
        router.script = in_turn(hang)
    results: list[httpx.Response] = []
    worker = threading.Thread(target=lambda: results.append(cluster.post(prompt=[5], max_tokens=30)))
    worker.start()
    assert sent.wait(WAIT_S)
    busy, other = sorted(cluster.routers, key=lambda router: -len(router.requests))
    other.script = answer(ids[1:], stop_id=1)
    busy.stop()
    worker.join(WAIT_S)
    assert results[0].json()["choices"][0]["text"] == "hello world"


def test_a_request_that_kills_routers_does_not_get_all_of_them(settings: ApiSettings) -> None:
    routers = [ScriptedRouter() for _ in range(5)]

    def die_of_it(request: router_pb2.GenerateRequest, context: grpc.ServicerContext) -> Iterator[Any]:
        for router in routers:
            if request in router.requests:
                threading.Thread(target=router.stop).start()
        ended = threading.Event()
        if context.add_callback(ended.set):
            ended.wait(WAIT_S)
        yield from ()

    for router in routers:
        router.script = die_of_it
    api = ApiServer(settings, StaticEndpoints([router.endpoint for router in routers]))
    try:
        assert httpx.get(f"{api.url}/health/ready", timeout=WAIT_S).status_code == 200
        answered = httpx.post(f"{api.url}/v1/completions", json={"model": MODEL, "prompt": "x"}, timeout=WAIT_S)
        assert answered.status_code == 503
        assert sum(len(router.requests) for router in routers) == 3
    finally:
        api.stop()
        for router in routers:
            router.stop()


def events_of(answered: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in answered.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_stream_waits_for_the_only_router_to_come_back(cluster: Cluster, tokenizer: TextTokenizer) -> None:
    """On another address; meanwhile another router is there that has no room."""
    ids = tokenizer.encode_raw("hello world", add_special_tokens=False)
    lost, full = cluster.routers
    cluster.endpoints.endpoints = [lost.endpoint]
    sent = threading.Event()

    def hang(request: router_pb2.GenerateRequest, context: grpc.ServicerContext) -> Iterator[Any]:
        yield router_pb2.GenerateResponse(tokens=[token(ids[0], request)])
        sent.set()
        ended = threading.Event()
        if context.add_callback(ended.set):
            ended.wait(WAIT_S)

    lost.script, full.script = hang, fail(grpc.StatusCode.RESOURCE_EXHAUSTED)
    results: list[httpx.Response] = []
    worker = threading.Thread(target=lambda: results.append(cluster.post(prompt=[5], max_tokens=30, stream=True)))
    worker.start()
    assert sent.wait(WAIT_S)
    lost.stop()
    cluster.endpoints.endpoints = [full.endpoint]
    wait_until(lambda: bool(full.requests))
    replacement = ScriptedRouter()
    replacement.script = answer(ids[1:], stop_id=1)
    try:
        cluster.endpoints.endpoints = [full.endpoint, replacement.endpoint]
        worker.join(WAIT_S)
        assert "".join(event["choices"][0]["text"] for event in events_of(results[0])) == "hello world"
    finally:
        replacement.stop()


def test_a_stream_whose_router_stays_away_ends_in_one_error_event(cluster: Cluster) -> None:
    script = in_turn(fail(grpc.StatusCode.UNAVAILABLE, after=[50]), fail(grpc.StatusCode.UNAVAILABLE))
    for router in cluster.routers:
        router.script = script
    events = events_of(cluster.post(stream=True))
    assert [("error" in event, "choices" in event) for event in events] == [(False, True), (True, False)]
    assert events[-1]["error"]["type"] == "service_unavailable"


def test_without_experts_requests_are_shed_at_once_by_every_router(cluster: Cluster) -> None:
    for router in cluster.routers:
        router.script = fail(grpc.StatusCode.FAILED_PRECONDITION)
    started_s = time.monotonic()
    answered = cluster.post()
    assert (answered.status_code, answered.json()["error"]["code"]) == (503, "unavailable")
    assert int(answered.headers["retry-after"]) > 0
    assert cluster.num_requests == [1, 1]
    assert time.monotonic() - started_s < 1.0  # router_wait_s


def test_a_router_that_has_experts_serves_what_another_sheds(cluster: Cluster) -> None:
    script = in_turn(fail(grpc.StatusCode.FAILED_PRECONDITION), answer([50]))
    for router in cluster.routers:
        router.script = script
    assert cluster.post().status_code == 200


@pytest.fixture
def watchful(settings: ApiSettings) -> Iterator[Cluster]:
    """A front that loses patience soon."""
    cluster = Cluster(replace(settings, router_silence_s=0.05, router_dead_s=0.3))
    yield cluster
    for router in cluster.routers:
        router.answers.set()
    cluster.stop()


def test_a_silent_router_loses_its_streams_and_gets_no_others(watchful: Cluster, tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode_raw("hello world", add_special_tokens=False)
    silent, other = watchful.routers
    watchful.endpoints.endpoints = [silent.endpoint]
    silent.script = answer_forever(ids[:1])
    other.script = answer(ids[1:], stop_id=1)
    results: list[httpx.Response] = []
    worker = threading.Thread(target=lambda: results.append(watchful.post(prompt=[5], max_tokens=30)))
    worker.start()
    wait_until(lambda: bool(silent.requests))
    silent.answers.clear()
    watchful.endpoints.endpoints.append(other.endpoint)
    worker.join(WAIT_S)
    assert results[0].json()["choices"][0]["text"] == "hello world"
    assert silent.cancelled.wait(WAIT_S)
    for _ in range(4):
        assert watchful.post(prompt=[5]).status_code == 200
    assert watchful.num_requests == [1, 5]
    silent.script = answer([50])
    silent.answers.set()
    wait_until(lambda: watchful.post(prompt=[5]).status_code == 200 and len(silent.requests) > 1)


@pytest.mark.parametrize(
    "status",
    [{"current_step_ms": 59_000}, {"current_step_ms": 10**6, "unserved_ms": 10}],
    ids=["long prompt", "waits for experts"],
)
def test_a_router_that_takes_its_time_keeps_its_stream(watchful: Cluster, status: dict[str, int]) -> None:
    for router in watchful.routers:
        router.status = router_pb2.StatusResponse(router_id="r0", ready=True, **status)  # pyright: ignore[reportArgumentType]
    release = threading.Event()

    def ponder(request: router_pb2.GenerateRequest, context: grpc.ServicerContext) -> Iterator[Any]:
        release.wait(WAIT_S)
        yield from answer([50])(request, context)

    for router in watchful.routers:
        router.script = ponder
    results: list[httpx.Response] = []
    worker = threading.Thread(target=lambda: results.append(watchful.post()))
    worker.start()
    wait_until(lambda: max(router.num_status_calls for router in watchful.routers) >= 5)
    release.set()
    worker.join(WAIT_S)
    assert results[0].status_code == 200
    assert sum(watchful.num_requests) == 1


def test_a_router_whose_step_does_not_end_counts_as_silent(watchful: Cluster) -> None:
    stuck, other = watchful.routers
    watchful.endpoints.endpoints = [stuck.endpoint]
    stuck.script = answer_forever([])
    stuck.status.current_step_ms = 10**6
    other.script = answer([50])
    results: list[httpx.Response] = []
    worker = threading.Thread(target=lambda: results.append(watchful.post()))
    worker.start()
    wait_until(lambda: stuck.num_status_calls > 0)
    watchful.endpoints.endpoints.append(other.endpoint)
    worker.join(WAIT_S)
    assert results[0].status_code == 200


def test_the_only_router_is_waited_for_while_it_is_silent_but_not_for_ever(watchful: Cluster) -> None:
    silent, _ = watchful.routers
    watchful.endpoints.endpoints = [silent.endpoint]
    silent.script = answer_forever([])
    silent.answers.clear()
    started_s = time.monotonic()
    answered = watchful.post()
    assert answered.status_code == 503 and "retry-after" in answered.headers
    assert time.monotonic() - started_s > 1.0  # router_wait_s
    assert len(silent.requests) == 1


def wait_until(reached: Callable[[], bool]) -> None:
    pause = threading.Event()
    deadline_s = time.monotonic() + WAIT_S
    while not reached():
        assert time.monotonic() < deadline_s
        pause.wait(0.01)


async def test_a_router_that_leaves_while_it_is_asked_for_its_status_counts_as_silent(settings: ApiSettings) -> None:
    """Its channel is closed under the question; that must not look as if the one who asks was cancelled."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.setblocking(False)
        endpoints = ChangingEndpoints([f"127.0.0.1:{silent.getsockname()[1]}"])
        client = RouterClient(endpoints, replace(settings, status_timeout_s=WAIT_S), (), ApiMetrics("tiny"))
        asking = asyncio.create_task(client.fetch_statuses())
        connection, _ = await asyncio.wait_for(asyncio.get_running_loop().sock_accept(silent), WAIT_S)
        endpoints.endpoints = []
        assert await client.fetch_statuses() == []
        assert [status.status for status in await asyncio.wait_for(asking, WAIT_S)] == [None]
        connection.close()
        await client.close()


def test_new_requests_go_to_routers_that_take_new_ones(cluster: Cluster) -> None:
    old, new = (router.endpoint for router in cluster.routers)
    cluster.endpoints.versions = {old: 1, new: 2}
    cluster.endpoints.finishing = {new}
    assert cluster.post().status_code == 200
    assert cluster.num_requests == [1, 0]
    cluster.endpoints.finishing = {old}
    for _ in range(1000):
        cluster.post()
        if cluster.num_requests[1] > 0:
            break
    num_old = cluster.num_requests[0]
    assert cluster.post().status_code == 200
    assert cluster.num_requests[0] == num_old


@pytest.mark.parametrize("has_tokens", [True, False])
def test_only_a_router_of_the_same_weights_goes_on_with_an_answer(cluster: Cluster, has_tokens: bool) -> None:
    """The first router is lost and only one of other weights is there: it may begin, and not go on."""
    lost, other = cluster.routers
    cluster.endpoints.versions = {lost.endpoint: 1, other.endpoint: 2}
    cluster.endpoints.finishing = {other.endpoint}
    lost.weights_version, other.weights_version = 1, 2
    refuse = fail(grpc.StatusCode.UNAVAILABLE)
    lost.script = in_turn(fail(grpc.StatusCode.UNAVAILABLE, after=[50]), refuse) if has_tokens else refuse
    other.script = answer([51, 52])
    results: list[httpx.Response] = []
    worker = threading.Thread(target=lambda: results.append(cluster.post(max_tokens=3)))
    worker.start()
    for _ in range(1000):
        if lost.requests:
            break
        time.sleep(0.01)
    cluster.endpoints.finishing = {lost.endpoint}
    worker.join(WAIT_S)
    if has_tokens:
        assert results[0].status_code == 503
        assert other.requests == []
        assert {request.weights_version for request in lost.requests[1:]} == {1}
    else:
        assert results[0].status_code == 200
        assert [request.weights_version for request in other.requests] == [0]
