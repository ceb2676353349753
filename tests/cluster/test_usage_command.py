"""`shoal usage` as people run it."""

import csv
import io
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.state_file import ClusterState, write_state
from router.tenancy.ledger import Ledger
from router.tenancy.usage import Outcome, UsageRecord

NOW_S = time.time()
RECORD = UsageRecord("", "r", "red", "k1", "m", Outcome.FINISHED, NOW_S - 20, NOW_S - 10,
                     tokens_in=300_000, tokens_cached=4, tokens_out=200_000, router_us=1_800_000_000,
                     expert_us=5_400_000_000)  # fmt: skip


@pytest.fixture
def url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    ledger = Ledger(url)
    ledger.add(
        [
            replace(RECORD, id="a"),
            replace(RECORD, id="b", key_id="k2", ended_at=NOW_S - 10 * 86_400),
            replace(RECORD, id="c", team="blue", model="n"),
        ]
    )
    ledger.close()
    return url


def test_sums_and_costs_as_json(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["usage", "--ledger", url, "--team", "red", "--since", "7d", "--gpu-hour-price", "0.5", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["usage"]
    assert (row["team"], row["key"], row["model"], row["num_requests"]) == ("red", "k1", "m", 1)
    assert (row["router_s"], row["expert_s"]) == (1800.0, 5400.0)
    assert row["cost"] == pytest.approx(1.0) and row["cost_per_million_tokens"] == pytest.approx(2.0)


def test_csv_has_a_header_and_the_columns_asked_for(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["usage", "--ledger", url, "--by", "team", "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["team"], row["tokens_out"]) for row in rows] == [("blue", "200000"), ("red", "400000")]
    assert "key" not in rows[0] and "cost" not in rows[0]


def test_a_table_for_people(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["usage", "--ledger", url, "--by", "team,day"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["TEAM", "DAY", "NUM_REQUESTS"] and len(lines) == 3
    assert main(["usage", "--ledger", url, "--team", "nobody"]) == 0
    assert capsys.readouterr().out == "nothing was used\n"


def test_ledger_and_price_are_those_of_the_cluster_that_runs_here(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHOAL_STATE_DIR", str(tmp_path))
    state = ClusterState("http://127.0.0.1:9", "http://127.0.0.1:10", "t", os.getpid(), "", None)
    write_state(tmp_path, replace(state, ledger_url=url, gpu_hour_price=0.5))
    assert main(["usage", "--team", "red", "--since", "7d", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["usage"]
    assert row["cost_per_million_tokens"] == pytest.approx(2.0)
    assert main(["usage", "--team", "red", "--since", "7d", "--json", "--gpu-hour-price", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["usage"][0]["cost"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--by", "user"], "there are team, key, model, day"),
        (["--since", "yesterday"], "is no time"),
        (["--ledger", "off"], "the ledger is off"),
        (["--ledger", "sqlite:////nonexistent/ledger.db"], "there is no ledger in /nonexistent/ledger.db yet"),
    ],
)
def test_what_makes_no_sense_is_one_line(
    url: str, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert main(["usage", "--ledger", url, *arguments]) != 0
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


def test_a_password_is_not_shown_with_the_settings() -> None:
    from cluster.settings import load_settings

    settings = load_settings({"ledger": "postgresql://shoal:secret@db/usage"}, environ={})
    assert "secret" not in settings.describe() and "postgresql://shoal:***@db/usage" in settings.describe()
