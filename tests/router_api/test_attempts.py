"""How long, and how often, a sequence is offered."""

from __future__ import annotations

import pytest

from router.api.attempts import Attempts, Failure, FailureKind
from router.api.errors import ApiError, Overloaded, Unavailable


def fail(attempts: Attempts, *kinds: FailureKind, num_tokens: int = 0, since_s: float = 100.0) -> None:
    for number, kind in enumerate(kinds):
        attempts.failed(f"router {number}", Failure(kind, "scripted", since_s), num_tokens)


async def test_the_wait_ends_in_time_and_starts_anew_with_every_token() -> None:
    attempts = Attempts(router_wait_s=30.0)
    fail(attempts, FailureKind.REFUSED, since_s=100.0)
    assert await attempts.pause(129.0)
    fail(attempts, FailureKind.REFUSED, since_s=129.0)
    assert not await attempts.pause(130.0)
    attempts.progressed()
    fail(attempts, FailureKind.REFUSED, since_s=130.0)
    assert await attempts.pause(159.0)
    assert not attempts.tried


async def test_nobody_waits_where_no_router_is_known_for_ever() -> None:
    attempts = Attempts(router_wait_s=30.0)
    assert await attempts.pause(100.0)
    assert not await attempts.pause(130.0)
    assert isinstance(attempts.error(2), Unavailable)


@pytest.mark.parametrize(
    ("kinds", "error"),
    [
        ((FailureKind.NO_EXPERTS, FailureKind.NO_EXPERTS), Unavailable),
        ((FailureKind.NO_EXPERTS, FailureKind.OVERLOADED), Unavailable),
        ((FailureKind.NO_EXPERTS, FailureKind.UNREACHED), Unavailable),
        ((FailureKind.OVERLOADED, FailureKind.OVERLOADED), Overloaded),
        ((FailureKind.REFUSED, FailureKind.OVERLOADED), Overloaded),
    ],
)
async def test_waiting_ends_at_once_where_it_does_not_help(
    kinds: tuple[FailureKind, ...], error: type[ApiError]
) -> None:
    attempts = Attempts(router_wait_s=30.0)
    fail(attempts, *kinds)
    assert not await attempts.pause(100.0)
    assert isinstance(attempts.error(2), error)
    assert attempts.error(2).headers == {"Retry-After": "2"}


@pytest.mark.parametrize(
    "kinds",
    [
        (FailureKind.LOST, FailureKind.NO_EXPERTS),
        (FailureKind.LOST, FailureKind.OVERLOADED),
        (FailureKind.REFUSED, FailureKind.UNREACHED),
    ],
)
async def test_a_router_that_may_come_back_is_waited_for(kinds: tuple[FailureKind, ...]) -> None:
    attempts = Attempts(router_wait_s=30.0)
    fail(attempts, *kinds)
    assert await attempts.pause(100.0)


async def test_what_a_router_had_taken_waits_for_room_elsewhere() -> None:
    with_tokens, lost = Attempts(router_wait_s=30.0), Attempts(router_wait_s=30.0)
    with_tokens.progressed()
    fail(lost, FailureKind.LOST)
    for attempts in (with_tokens, lost):
        assert await attempts.pause(100.0)
        fail(attempts, FailureKind.OVERLOADED)
        assert await attempts.pause(110.0)


def test_a_sequence_that_keeps_losing_routers_is_given_up_unless_it_gets_on() -> None:
    poison, unlucky = Attempts(router_wait_s=30.0), Attempts(router_wait_s=30.0)
    for number in range(3):
        assert not poison.is_dangerous
        poison.progressed()
        fail(poison, FailureKind.LOST, num_tokens=number)
    assert poison.is_dangerous
    for number in range(10):
        fail(unlucky, FailureKind.LOST, num_tokens=number * 16)
        assert not unlucky.is_dangerous


def test_routers_that_could_not_be_reached_were_not_lost() -> None:
    attempts = Attempts(router_wait_s=30.0)
    fail(attempts, *[FailureKind.UNREACHED] * 10)
    assert not attempts.is_dangerous
