"""Requests beside each other over HTTP: batch mates change nothing, and one that leaves takes its work with it."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import pytest

from router.v1 import router_pb2_grpc
from tests.integration.router_client import build_request, generate
from tests.local_stack import LocalStack, wait_until

# Over 8192 tokens of context these take far longer than any deadline here.
ENDLESS_TOKENS = 8000
LEAVE_TIMEOUT_S = 5.0
NUM_TOKENS = 40
PROMPT_LENGTHS = (3, 60, 1, 17, 33, 8, 50, 25)
PROMPTS = [list(range(5 + 30 * index, 5 + 30 * index + length)) for index, length in enumerate(PROMPT_LENGTHS)]


@pytest.fixture
def client(stack: LocalStack) -> Iterator[httpx.Client]:
    with stack.client() as http:
        yield http


def completion_body(client: httpx.Client, prompt: list[int], **fields: Any) -> dict[str, Any]:
    model = client.get("/v1/models").json()["data"][0]["id"]
    return {"model": model, "prompt": prompt, "temperature": 0, "ignore_eos": True, **fields}


def test_eight_requests_in_flight_give_the_tokens_of_one_at_a_time(stack: LocalStack, client: httpx.Client) -> None:
    """float32: sums over other batch shapes may differ in the last bits, the tokens may not."""

    def complete(prompt: list[int]) -> str:
        body = completion_body(client, prompt, max_tokens=NUM_TOKENS)
        response = client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["text"]

    with stack.router_channel() as channel:
        ids_alone = [generate(channel, prompt, NUM_TOKENS).token_ids for prompt in PROMPTS]
        text_alone = [complete(prompt) for prompt in PROMPTS]
        steps_before = stack.status().num_steps
        with ThreadPoolExecutor(len(PROMPTS)) as threads:
            text_together = list(threads.map(complete, PROMPTS))
            num_steps = stack.status().num_steps - steps_before
            ids_together = list(threads.map(lambda prompt: generate(channel, prompt, NUM_TOKENS).token_ids, PROMPTS))

    assert text_together == text_alone
    assert ids_together == ids_alone
    # They did share steps: alone, each of them takes NUM_TOKENS.
    assert num_steps < len(PROMPTS) * NUM_TOKENS / 2


def test_a_client_that_disconnects_cancels_its_work(stack: LocalStack, client: httpx.Client) -> None:
    body = completion_body(client, [1, 2, 3], max_tokens=ENDLESS_TOKENS, stream=True)
    with client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        first = next(line for line in lines if line.startswith("data: "))
        assert json.loads(first.removeprefix("data: "))["choices"][0]["finish_reason"] is None
        assert stack.status().num_running == 1

    assert_nothing_runs(stack)


def test_a_client_that_disconnects_while_it_waits_for_a_whole_answer(stack: LocalStack, client: httpx.Client) -> None:
    body = completion_body(client, [1, 2, 3], max_tokens=ENDLESS_TOKENS)
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json=body, timeout=0.5)

    assert_nothing_runs(stack)


def test_a_cancelled_grpc_call_cancels_its_work(stack: LocalStack) -> None:
    with stack.router_channel() as channel:
        call = router_pb2_grpc.RouterServiceStub(channel).Generate(build_request([1, 2, 3], ENDLESS_TOKENS), timeout=60)
        next(call)
        assert stack.status().num_running == 1
        call.cancel()

        assert_nothing_runs(stack)


def assert_nothing_runs(stack: LocalStack) -> None:
    def is_idle() -> bool:
        status = stack.status()
        return status.num_running == 0 and status.num_waiting == 0

    wait_until(is_idle, time.monotonic() + LEAVE_TIMEOUT_S, lambda: f"still running: {stack.status()}")


def test_a_router_does_not_go_on_with_an_answer_of_other_weights(stack: LocalStack) -> None:
    request = build_request([1, 2, 3], 4)
    request.weights_version = 7
    with stack.router_channel() as channel, pytest.raises(grpc.RpcError) as raised:
        list(router_pb2_grpc.RouterServiceStub(channel).Generate(request, timeout=10.0))
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
