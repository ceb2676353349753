"""What one sequence has got so far, whichever routers it came from."""

from __future__ import annotations

from typing import Any

import pytest

from router.api.continuation import Continuation, WeightsPin
from router.api.thinking_budget import ThinkingBudget
from router.v1 import router_pb2

EOS = 1
THINK, ANSWER = 2, 3


def response(*token_ids: int, **fields: Any) -> router_pb2.GenerateResponse:
    tokens = [router_pb2.TokenOutput(token_id=token_id) for token_id in token_ids]
    return router_pb2.GenerateResponse(tokens=tokens, **fields)


def begin(pin: WeightsPin | None = None, **fields: Any) -> Continuation:
    request = router_pb2.GenerateRequest(**{"prompt_token_ids": [5, 6], "max_tokens": 8, **fields})
    return Continuation(request, frozenset({EOS}), pin or WeightsPin())


def test_what_is_left_to_ask() -> None:
    sampling = router_pb2.SamplingParams(seed=3, frequency_penalty=1.0)
    continuation = begin(min_tokens=4, prompt_logprobs=1, logprobs=2, stop_token_ids=[9], sampling=sampling)
    assert continuation.begin_attempt().prompt_token_ids == [5, 6]
    continuation.note_(response(50, 51))
    continuation.note_(response(52))
    again = continuation.begin_attempt()
    assert again == router_pb2.GenerateRequest(
        prompt_token_ids=[5, 6, 50, 51, 52],
        num_answer_tokens=3,
        max_tokens=5,
        min_tokens=1,
        logprobs=2,
        stop_token_ids=[9],
        sampling=sampling,
    )
    continuation.note_(response(53, 54))
    assert continuation.begin_attempt().prompt_token_ids == [5, 6, 50, 51, 52, 53, 54]
    assert (continuation.begin_attempt().min_tokens, continuation.begin_attempt().num_answer_tokens) == (0, 5)


@pytest.mark.parametrize(
    ("fields", "token_ids", "reason"),
    [
        ({}, [50, EOS], router_pb2.FINISH_REASON_STOP),
        ({"stop_token_ids": [60]}, [50, 60], router_pb2.FINISH_REASON_STOP),
        ({"max_tokens": 2}, [50, 51], router_pb2.FINISH_REASON_LENGTH),
        ({"ignore_eos": True}, [50, EOS], router_pb2.FINISH_REASON_UNSPECIFIED),
        ({"min_tokens": 2}, [50, EOS], router_pb2.FINISH_REASON_UNSPECIFIED),
        ({"min_tokens": 1}, [50, EOS], router_pb2.FINISH_REASON_STOP),
        ({}, [50, 51], router_pb2.FINISH_REASON_UNSPECIFIED),
    ],
    ids=["eos", "stop id", "length", "eos ignored", "too early", "early enough", "not yet"],
)
def test_the_last_token_ends_the_sequence_whether_or_not_the_router_says_so(
    fields: dict[str, Any], token_ids: list[int], reason: int
) -> None:
    continuation = begin(**fields)
    for token_id in token_ids[:-1]:
        continuation.note_(response(token_id))
    last = response(token_ids[-1])
    continuation.note_(last)
    assert last.finish_reason == reason
    assert last.HasField("stop_token_id") is (reason == router_pb2.FINISH_REASON_STOP)


def test_prompt_tokens_come_once() -> None:
    continuation = begin(prompt_token_ids=[5, 6, 7], prompt_logprobs=0)
    prompt = [router_pb2.TokenOutput(token_id=token_id) for token_id in (5, 6, 7)]
    continuation.begin_attempt()
    assert continuation.note_(response(prompt_tokens=prompt[:2]))
    assert continuation.begin_attempt().HasField("prompt_logprobs")
    repeated = response(prompt_tokens=prompt[:1])
    assert not continuation.note_(repeated)
    following = response(prompt_tokens=prompt[1:])
    assert continuation.note_(following)
    assert [token.token_id for token in following.prompt_tokens] == [7]
    continuation.note_(response(50))
    assert not continuation.begin_attempt().HasField("prompt_logprobs")


def test_experts_left_out_add_up_over_routers() -> None:
    continuation = begin()
    continuation.begin_attempt()
    for left_out in (2, 5):
        continuation.note_(response(50, num_left_out=left_out))
    continuation.begin_attempt()
    later = response(51, num_left_out=3)
    continuation.note_(later)
    assert later.num_left_out == 8


def test_the_choices_of_a_request_are_of_the_same_weights() -> None:
    pin = WeightsPin()
    first, second = begin(pin), begin(pin)
    assert (first.begin_attempt().weights_version, second.begin_attempt().weights_version) == (0, 0)
    assert not first.is_foreign(response(50, weights_version=1))
    first.note_(response(50, weights_version=1))
    assert second.is_foreign(response(60, weights_version=2))
    assert second.begin_attempt().weights_version == 1
    assert first.begin_attempt().weights_version == 1


def think(num_tokens: int, *, is_open: bool = True, **fields: Any) -> Continuation:
    request = router_pb2.GenerateRequest(**{"prompt_token_ids": [5, 6], "max_tokens": 8, **fields})
    budget = ThinkingBudget(num_tokens, THINK, ANSWER, is_open)
    return Continuation(request, frozenset({EOS}), WeightsPin(), budget)


def get_ids(response: router_pb2.GenerateResponse) -> list[int]:
    return [token.token_id for token in response.tokens]


@pytest.mark.parametrize("is_open", [True, False])
def test_reasoning_ends_where_its_budget_does_and_the_answer_begins(is_open: bool) -> None:
    continuation = think(3, is_open=is_open)
    continuation.begin_attempt()
    before = [] if is_open else [THINK]
    first, last = response(*before, 50), response(51, 52, 53, 54)
    last.tokens[1].logprob = -1.5
    continuation.note_(first)
    assert not continuation.is_cut
    continuation.note_(last)
    assert continuation.is_cut and get_ids(last) == [51, 52, ANSWER]
    assert last.tokens[2].logprob == 0.0 and last.finish_reason == router_pb2.FINISH_REASON_UNSPECIFIED
    request = continuation.begin_attempt()
    assert list(request.prompt_token_ids) == [5, 6, *before, 50, 51, 52, ANSWER]
    assert (request.num_answer_tokens, request.max_tokens) == (len(before) + 4, 4 - len(before))
    # What follows is as long as it likes.
    assert not continuation.is_cut
    continuation.note_(rest := response(60, 61, 62))
    assert not continuation.is_cut and get_ids(rest) == [60, 61, 62]


@pytest.mark.parametrize(
    ("received", "reason"),
    [
        (response(50, 51, ANSWER, 60, 61, 62), router_pb2.FINISH_REASON_UNSPECIFIED),
        (response(50, 51, EOS, finish_reason=router_pb2.FINISH_REASON_STOP), router_pb2.FINISH_REASON_STOP),
        (response(50, 51, 52, finish_reason=router_pb2.FINISH_REASON_LENGTH), router_pb2.FINISH_REASON_LENGTH),
    ],
    ids=["it ends in time", "the model ends there", "the answer ends there"],
)
def test_reasoning_within_its_budget_is_left_alone(received: router_pb2.GenerateResponse, reason: int) -> None:
    continuation = think(3)
    continuation.begin_attempt()
    ids = get_ids(received)
    continuation.note_(received)
    assert (continuation.is_cut, get_ids(received), received.finish_reason) == (False, ids, reason)


def test_an_answer_without_room_behind_its_reasoning_ends_with_the_marker() -> None:
    continuation = think(3, max_tokens=4)
    continuation.begin_attempt()
    continuation.note_(last := response(50, 51, 52, 53, finish_reason=router_pb2.FINISH_REASON_LENGTH))
    assert (get_ids(last), last.finish_reason) == ([50, 51, 52, ANSWER], router_pb2.FINISH_REASON_LENGTH)


def test_a_budget_counts_over_all_routers() -> None:
    continuation = think(3)
    continuation.begin_attempt()
    continuation.note_(response(50, 51))
    assert continuation.begin_attempt().max_tokens == 6  # the first was lost
    continuation.note_(again := response(52, 53))
    assert continuation.is_cut and get_ids(again) == [52, ANSWER]
