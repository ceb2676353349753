"""`shoal keys` as people run it."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from router.tenancy.key_file import load_key_file
from router.tenancy.key_ring import KeyRing, now_utc


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "keys.json"


def run(capsys: pytest.CaptureFixture[str], path: Path, *arguments: str) -> Any:
    assert main(["keys", *arguments, "--keys-file", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def is_valid(path: Path, key: str) -> bool:
    return KeyRing(load_key_file(path)).find(key.encode(), now_utc()) is not None


def test_the_life_of_a_key(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (new,) = run(capsys, path, "create", "--team", "red", "--expires", "90d", "--rpm", "60", "--models", "a,b")[
        "new_keys"
    ]
    assert is_valid(path, new["key"]) and new["models"] == ["a", "b"] and new["limits"]["requests_per_minute"] == 60
    (rotated,) = run(capsys, path, "rotate", "--key", new["id"], "--grace", "0s")["new_keys"]
    assert is_valid(path, rotated["key"]) and not is_valid(path, new["key"])
    run(capsys, path, "revoke", "--key", rotated["id"])
    assert not is_valid(path, rotated["key"])
    listed = run(capsys, path, "list")
    assert [key["valid"] for key in listed["keys"]] == [False, False]
    assert new["key"] not in json.dumps(listed) and load_key_file(path).secret not in json.dumps(listed)


def test_the_list_says_what_a_key_may_do(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rights = ["--rpm", "5", "--models", "a,b", "--priorities", "batch", "--note", "of the nightly run"]
    run(capsys, path, "create", "--team", "red", *rights)
    assert main(["keys", "list", "--keys-file", str(path)]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.endswith("valid  5 requests/min; models a, b; priorities batch  of the nightly run")


def test_all_keys_of_a_team_at_once(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [run(capsys, path, "create", "--team", team)["new_keys"][0]["key"] for team in ("red", "red", "blue")]
    assert len(run(capsys, path, "rotate", "--team", "red")["new_keys"]) == 2
    assert [is_valid(path, key) for key in keys] == [True, True, True]  # the old ones for 24 hours
    run(capsys, path, "revoke", "--team", "red")
    assert [is_valid(path, key) for key in keys] == [False, False, True]


def test_the_share_and_limits_of_a_team(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, path, "team", "--team", "red", "--weight", "2")
    run(capsys, path, "team", "--team", "red", "--tpm", "1000")
    team = run(capsys, path, "list", "--team", "red")["teams"]["red"]
    assert team["weight"] == 2 and team["limits"]["tokens_per_minute"] == 1000


def test_the_file_of_shoal_serve_is_found_by_its_variable(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHOAL_KEYS_FILE", str(path))
    assert main(["keys", "create", "--team", "red"]) == 0
    line = capsys.readouterr().out
    assert is_valid(path, line.split()[0]) and "shown this once" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["list"], "No such file"),
        (["revoke", "--key", "k1"], "No such file"),
        (["create", "--team", "two words"], "a team's name has"),
        (["create", "--team", "red", "--priorities", "now"], "'interactive', 'standard' or 'batch'"),
        (["create", "--team", "red", "--expires", "soon"], "such as 90d"),
        (["create", "--team", "red", "--rpm", "0"], "at least 1"),
        (["team", "--team", "red", "--weight", "0"], "--weight must be more than 0"),
    ],
)
def test_what_makes_no_sense_is_one_line(
    path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert main(["keys", *arguments, "--keys-file", str(path)]) != 0
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--host", "0.0.0.0"], "there are no API keys"),
        (["--host", "0.0.0.0", "--keys-file", "/nonexistent/keys.json"], "cannot read the key file"),
    ],
)
def test_serve_refuses_the_network_without_good_keys(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *arguments]) == 1
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
