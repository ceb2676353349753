"""Tallies arrive late, twice, out of order and from strangers; what they tell counts once."""

from __future__ import annotations

import pytest

from router.tenancy.tallies import FORGET_AFTER_S, SILENT_AFTER_S, YOUNG_NUMBER, TallyBook
from router.v1 import router_pb2

ROUTER, FRONT = router_pb2.TALLY_KIND_ROUTER, router_pb2.TALLY_KIND_FRONT


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def book(clock: Clock) -> TallyBook:
    return TallyBook(ROUTER, clock)


def tally(number: int, service: float, source: str = "other", *, backlogged: bool = False, kind: int = ROUTER):
    account = router_pb2.AccountTally(account="red", service=service, is_backlogged=backlogged, num_running=2)
    return router_pb2.Tally(source=source, number=number, kind=router_pb2.TallyKind.Name(kind), accounts=[account])


def take(book: TallyBook) -> dict[str, tuple[float, bool]]:
    return {change.account: (change.service, change.is_backlogged) for change in book.take_changes()}


def test_growth_counts_once_whoever_brings_it_and_how_often(book: TallyBook) -> None:
    book.merge([tally(1, 100.0)])
    assert take(book) == {"red": (100.0, False)}
    for number, service in ((3, 130.0), (2, 110.0), (3, 130.0), (4, 150.0), (3, 130.0)):
        book.merge([tally(number, service)])
    assert take(book) == {"red": (50.0, False)}
    assert take(book) == {"red": (0.0, False)}


def test_what_an_old_source_gave_before_it_was_heard_of_does_not_count(book: TallyBook) -> None:
    book.merge([tally(YOUNG_NUMBER + 1, 1e6)])
    assert take(book) == {"red": (0.0, False)}
    book.merge([tally(YOUNG_NUMBER + 2, 1e6 + 3)])
    assert take(book) == {"red": (3.0, False)}


def test_sources_add_up_and_the_own_tally_coming_back_does_not_count(book: TallyBook) -> None:
    own = book.write_own([router_pb2.AccountTally(account="red", service=1000.0)])
    book.merge([own, tally(1, 0.0, "a"), tally(1, 0.0, "b")])
    own = book.write_own([router_pb2.AccountTally(account="red", service=9000.0)])
    book.merge([own, tally(2, 5.0, "a"), tally(2, 7.0, "b", backlogged=True)])
    assert take(book) == {"red": (12.0, True)}
    assert {each.source for each in book.list_known()} == {"a", "b"}


def test_who_falls_silent_waits_nowhere_any_more_and_is_forgotten_later(book: TallyBook, clock: Clock) -> None:
    book.merge([tally(1, 0.0, backlogged=True)])
    assert take(book) == {"red": (0.0, True)}
    clock.now_s += SILENT_AFTER_S
    assert take(book) == {"red": (0.0, False)}
    assert take(book) == {} and book.list_known() == []
    clock.now_s += FORGET_AFTER_S
    book.merge([tally(YOUNG_NUMBER + 9, 500.0)])
    assert take(book) == {"red": (0.0, False)}


def test_fronts_and_routers_pass_each_others_tallies_on_and_count_their_own_kind(book: TallyBook) -> None:
    book.merge([tally(1, 0.0, "front", kind=FRONT)])
    book.merge([tally(2, 9.0, "front", kind=FRONT)])
    assert take(book) == {}
    assert [each.source for each in book.list_known()] == ["front"]


@pytest.mark.parametrize("service", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_is_not_counted(book: TallyBook, service: float) -> None:
    book.merge([tally(1, 0.0)])
    book.merge([tally(2, service)])
    book.merge([tally(3, 4.0)])
    assert take(book) == {"red": (4.0, False)}


def test_strangers_cannot_fill_the_book(book: TallyBook) -> None:
    book.merge([tally(1, 0.0, str(number)) for number in range(1000)])
    assert len(book.list_known()) == 256
