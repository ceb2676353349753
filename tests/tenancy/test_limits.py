"""Limits per minute and at once, on a clock that the test turns."""

import pytest

from router.tenancy.key_file import Limits
from router.tenancy.key_ring import ANONYMOUS, Account
from router.tenancy.limits import FORGET_AFTER_S, LimitBook


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def book(clock: Clock) -> LimitBook:
    return LimitBook(max_parallel=100, clock=clock)


def account(
    key: str = "k1", team: str = "red", key_limits: Limits | None = None, team_limits: Limits | None = None
) -> Account:
    return Account(team, key, key_limits=key_limits or Limits(), team_limits=team_limits or Limits())


def test_requests_per_minute_refill_evenly(book: LimitBook, clock: Clock) -> None:
    limited = account(key_limits=Limits(requests_per_minute=3))
    for _ in range(3):
        assert book.admit(limited) is None
        book.release(limited)
    refusal = book.admit(limited)
    assert refusal is not None and refusal.retry_after_s == pytest.approx(20.0)
    assert "3 requests per minute" in refusal.reason
    clock.now_s += 19.9
    assert book.admit(limited) is not None
    clock.now_s += 0.2
    assert book.admit(limited) is None


def test_a_refused_request_takes_nothing(book: LimitBook, clock: Clock) -> None:
    limited = account(key_limits=Limits(requests_per_minute=1), team_limits=Limits(requests_per_minute=10))
    assert book.admit(limited) is None
    for _ in range(50):
        assert book.admit(limited) is not None
    state, _ = book.describe(account(key="k2", team_limits=Limits(requests_per_minute=10)))
    assert state is not None and state.remaining == 9


def test_the_keys_of_a_team_share_its_limit(book: LimitBook) -> None:
    limits = Limits(parallel=2)
    assert book.admit(account("k1", team_limits=limits)) is None
    assert book.admit(account("k2", team_limits=limits)) is None
    refusal = book.admit(account("k3", team_limits=limits))
    assert refusal is not None and "this team: 2 requests at once" in refusal.reason
    assert book.admit(account("k3", team="blue", team_limits=limits)) is None
    book.release(account("k1", team_limits=limits))
    assert book.admit(account("k3", team_limits=limits)) is None


def test_answers_may_overdraw_and_the_next_request_waits_for_it(book: LimitBook, clock: Clock) -> None:
    limited = account(key_limits=Limits(tokens_per_minute=600))
    assert book.admit(limited) is None
    assert book.admit_tokens(limited, 500) is None
    book.bind_take(limited)(300)
    book.release(limited)
    refusal = book.admit(limited)
    assert refusal is not None and refusal.retry_after_s == pytest.approx(20.1)
    clock.now_s += 21.0
    assert book.admit(limited) is None


def test_a_prompt_above_the_limit_gets_in_once_all_of_it_is_there(book: LimitBook, clock: Clock) -> None:
    limited = account(key_limits=Limits(tokens_per_minute=100))
    assert book.admit(limited) is None
    book.bind_take(limited)(1)
    refusal = book.admit_tokens(limited, 250)
    assert refusal is not None and refusal.retry_after_s == pytest.approx(0.6)
    clock.now_s += 1.0
    assert book.admit_tokens(limited, 250) is None
    _, tokens = book.describe(limited)
    assert tokens is not None and tokens.remaining == 0 and tokens.reset_s == pytest.approx(150.0)


def test_headers_tell_of_what_is_nearer_its_end(book: LimitBook) -> None:
    limited = account(key_limits=Limits(requests_per_minute=100), team_limits=Limits(requests_per_minute=2))
    book.admit(limited)
    requests, tokens = book.describe(limited)
    assert requests is not None and (requests.limit, requests.remaining) == (2, 1)
    assert tokens is None


def test_one_team_never_takes_all_places_of_a_front(book: LimitBook) -> None:
    red, blue, green = (Account(team) for team in ("red", "blue", "green"))

    def fill(one: Account) -> int:
        count = 0
        while book.admit(one) is None:
            count += 1
        return count

    assert [fill(red), fill(blue), fill(green)] == [50, 25, 13]
    assert book.admit(Account("white")) is None


def test_what_other_fronts_take_counts(book: LimitBook) -> None:
    limits = Limits(parallel=3, requests_per_minute=10, tokens_per_minute=1000)
    limited = account(key_limits=limits)
    # Heard of before this front has seen the key itself.
    book.note_elsewhere("key:k1", limits, num_requests=5, num_tokens=400, num_running=2)
    book.admit(limited)
    requests, tokens = book.describe(limited)
    assert requests is not None and requests.remaining == 4
    assert tokens is not None and tokens.remaining == 600
    assert book.admit(limited) is not None
    book.note_elsewhere("key:k1", limits, num_requests=0, num_tokens=0, num_running=1)
    assert book.admit(limited) is None


def test_another_limit_in_the_key_file_holds_at_once(book: LimitBook) -> None:
    for _ in range(3):
        book.admit(account(key_limits=Limits(requests_per_minute=3)))
    assert book.admit(account(key_limits=Limits(requests_per_minute=3))) is not None
    for _ in range(2):
        assert book.admit(account(key_limits=Limits(requests_per_minute=5))) is None
    assert book.admit(account(key_limits=Limits(requests_per_minute=5))) is not None
    assert book.admit(account()) is None


def test_idle_keys_are_forgotten_and_running_or_overdrawn_ones_are_not(book: LimitBook, clock: Clock) -> None:
    overdrawn = account("k2", key_limits=Limits(tokens_per_minute=10))
    book.admit(overdrawn)
    book.bind_take(overdrawn)(1000)
    book.release(overdrawn)
    book.admit(account("k3"))
    for number in range(1000):
        one = account(f"idle{number}", "blue")
        book.admit(one)
        book.release(one)
    clock.now_s += FORGET_AFTER_S + 1
    book.admit(ANONYMOUS)
    assert set(book._scopes) == {"key:k2", "key:k3", "team:red", "team:anonymous"}  # pyright: ignore[reportPrivateUsage]
