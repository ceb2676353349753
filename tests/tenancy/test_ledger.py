"""The ledger's database, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import sqlalchemy as sa

from router.tenancy import ledger as ledger_module
from router.tenancy.errors import LedgerError
from router.tenancy.ledger import MIGRATIONS, GroupKey, Ledger, UsageSum, get_costs
from router.tenancy.usage import SECONDS_PER_DAY, Outcome, UsageRecord

_IDS = itertools.count()
DAY = 20_000  # of 2024
RECORD = UsageRecord("", "r", "red", "k1", "m", Outcome.FINISHED, DAY * SECONDS_PER_DAY, DAY * SECONDS_PER_DAY + 1.0,
                     tokens_in=10, tokens_cached=4, tokens_out=5, router_us=1_000_000, expert_us=3_000_000)  # fmt: skip


def record(**changes: object) -> UsageRecord:
    return replace(RECORD, id=str(next(_IDS)), **changes)  # type: ignore[arg-type]


def test_a_record_counts_once_however_often_it_is_added(ledger_url: str) -> None:
    ledger = Ledger(ledger_url)
    one, other = record(), record(tokens_out=7)
    for records in ([one], [one, other], [other], []):
        ledger.add(records)
    (total,) = ledger.summarise([])
    assert (total.num_requests, total.tokens_in, total.tokens_cached, total.tokens_out) == (2, 20, 8, 12)
    ledger.close()
    assert Ledger(ledger_url).summarise([]) == [total]


def test_sums_by_team_key_model_and_day(ledger_url: str) -> None:
    ledger = Ledger(ledger_url)
    later = RECORD.ended_at + SECONDS_PER_DAY
    ledger.add([record(), record(key_id="k2"), record(team="blue", model="n"), record(ended_at=later)])
    by_team = {total.team: total.num_requests for total in ledger.summarise(["team"])}
    assert by_team == {"red": 3, "blue": 1}
    assert [total.key_id for total in ledger.summarise(["key_id"], team="red")] == ["k1", "k2"]
    assert [(total.day, total.num_requests) for total in ledger.summarise(["day"])] == [(DAY, 3), (DAY + 1, 1)]
    assert ledger.summarise(["team", "model"])[0] == UsageSum(
        "blue", None, "n", None, 1, 10, 4, 5, 1_000_000, 3_000_000
    )
    assert [total.num_requests for total in ledger.summarise([], since=later)] == [1]
    assert [total.num_requests for total in ledger.summarise([], until=later)] == [3]
    assert ledger.summarise(["team"], team="nobody") == [] == ledger.summarise([], team="nobody")


def test_what_is_old_is_added_up_by_day_and_no_number_changes(ledger_url: str) -> None:
    ledger = Ledger(ledger_url)
    days = [record(ended_at=(DAY + number // 3) * SECONDS_PER_DAY + number, tokens_out=number) for number in range(12)]
    ledger.add(days)
    groups: list[list[GroupKey]] = [["team", "day"], ["key_id"], ["model", "day"]]
    before = [ledger.summarise(by) for by in groups]
    assert ledger.compact((DAY + 2) * SECONDS_PER_DAY + 100.0) == 6
    assert ledger.compact((DAY + 2) * SECONDS_PER_DAY + 100.0) == 0
    assert ledger.compact((DAY + 3) * SECONDS_PER_DAY) == 3
    assert [ledger.summarise(by) for by in groups] == before
    late = record(ended_at=DAY * SECONDS_PER_DAY + 5, tokens_out=100)
    ledger.add([late])
    ledger.compact((DAY + 3) * SECONDS_PER_DAY)
    (total,) = ledger.summarise([], until=(DAY + 1) * SECONDS_PER_DAY)
    assert total.num_requests == 4 and total.tokens_out == 0 + 1 + 2 + 100


def test_an_older_schema_is_brought_up_to_date_and_keeps_its_records(
    ledger_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as old:
        old.setattr(ledger_module, "MIGRATIONS", MIGRATIONS[:1])
        ledger = Ledger(ledger_url)
        ledger.add([record()])
        ledger.close()
    ledger = Ledger(ledger_url)
    assert ledger.summarise([])[0].num_requests == 1
    assert ledger.compact(RECORD.ended_at + SECONDS_PER_DAY) == 1


def test_a_newer_schema_is_left_alone(ledger_url: str) -> None:
    Ledger(ledger_url).close()
    engine = ledger_module._create_engine(ledger_url)  # pyright: ignore[reportPrivateUsage]
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE ledger_version SET version = 99"))
    engine.dispose()
    with pytest.raises(LedgerError, match="schema 99, this version of Shoal knows 2"):
        Ledger(ledger_url)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("mysql://host/db", "sqlite:/// or postgresql://"),
        ("no url", "cannot be opened"),
        ("sqlite:////proc/nowhere/ledger.db", "cannot be opened"),
        ("postgresql://shoal:secret@127.0.0.1:1/shoal", "database failed"),
    ],
)
def test_a_ledger_that_cannot_be_opened_is_one_line_without_its_password(url: str, expected: str) -> None:
    with pytest.raises(LedgerError, match=expected) as caught:
        Ledger(url)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_cost_is_device_time_at_its_price() -> None:
    total = UsageSum(None, None, None, None, 1, 600_000, 0, 400_000, 900_000_000, 2_700_000_000)
    assert get_costs(total, price_per_hour=0.4) == {"cost": 0.4, "cost_per_million_tokens": 0.4}
    empty = UsageSum(None, None, None, None, 0, 0, 0, 0, 0, 0)
    assert get_costs(empty, price_per_hour=0.4)["cost_per_million_tokens"] == 0.0
