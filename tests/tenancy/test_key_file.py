"""The key file: what changes do to it, and what is not taken for one."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from router.tenancy.errors import KeyFileError
from router.tenancy.key_file import (
    KeyFile,
    Limits,
    TeamEntry,
    find_key,
    load_key_file,
    make_key,
    new_key_file,
    revoke_key,
    rotate_key,
    save_key_file,
    set_team,
)

NOW = datetime(2026, 11, 1, tzinfo=UTC)
DAY = timedelta(days=1)


def test_what_was_saved_is_loaded_again_and_has_no_key_in_it(tmp_path: Path) -> None:
    file = set_team(new_key_file(), "red", TeamEntry(weight=2.0, limits=Limits(parallel=3)))
    file, new = make_key(file, "red", NOW, models=("a",), priorities=("batch",), expires_at=NOW + DAY)
    path = tmp_path / "keys.json"
    save_key_file(path, file)
    assert load_key_file(path) == file
    assert new.text.removeprefix("sk-shoal-") not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
def test_a_file_cut_anywhere_is_no_key_file(tmp_path: Path, share: float) -> None:
    file = new_key_file()
    for _ in range(5):
        file, _ = make_key(file, "red", NOW)
    path = tmp_path / "keys.json"
    save_key_file(path, file)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(KeyFileError, match=r"keys\.json cannot be used") as caught:
        load_key_file(path)
    assert file.secret not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[]", "the whole"),
        ('{"secret": "short"}', "secret"),
        ('{"version": 2, "secret": "%s"}' % ("0" * 64), "version"),
        ('{"secret": "%s", "owner": "me"}' % ("0" * 64), "owner"),
        ('{"secret": "%s", "teams": {"red": {"weight": 0}}}' % ("0" * 64), "teams.red.weight"),
        ('{"secret": "%s", "teams": {"red": {"weight": NaN}}}' % ("0" * 64), "weight"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(KeyFileError, match=expected):
        load_key_file(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="No such file"):
        load_key_file(tmp_path / "none.json")


def test_a_rotated_key_ends_after_its_grace_and_the_new_one_may_do_the_same() -> None:
    file, old = make_key(new_key_file(), "red", NOW, models=("a",), limits=Limits(requests_per_minute=5))
    file, new = rotate_key(file, old.entry.id, NOW, NOW + DAY)
    ending = find_key(file, old.entry.id)
    assert ending.is_valid(NOW + DAY / 2) and not ending.is_valid(NOW + DAY)
    assert new.entry.models == ("a",) and new.entry.limits.requests_per_minute == 5
    assert new.entry.is_valid(NOW + 1000 * DAY) and new.text != old.text


def test_a_grace_does_not_prolong_a_key() -> None:
    file, old = make_key(new_key_file(), "red", NOW, expires_at=NOW + DAY)
    file, _ = rotate_key(file, old.entry.id, NOW, NOW + 10 * DAY)
    assert find_key(file, old.entry.id).expires_at == NOW + DAY


def test_what_is_revoked_cannot_be_rotated() -> None:
    file, old = make_key(new_key_file(), "red", NOW)
    file = revoke_key(file, old.entry.id, NOW)
    assert revoke_key(file, old.entry.id, NOW + DAY) == file
    with pytest.raises(KeyFileError, match="revoked or has expired"):
        rotate_key(file, old.entry.id, NOW, NOW + DAY)


@pytest.mark.parametrize("team", ["", "two words", "a" * 64, "-x", "naïve"])
def test_a_team_has_a_plain_name(team: str) -> None:
    with pytest.raises(KeyFileError, match="team"):
        make_key(new_key_file(), team, NOW)
    with pytest.raises(KeyFileError, match="team"):
        set_team(new_key_file(), team, TeamEntry())


def test_keys_of_two_files_have_nothing_in_common() -> None:
    assert new_key_file().secret != new_key_file().secret
    assert KeyFile(secret="0" * 64).get_team("red") == TeamEntry()
