"""Who a key belongs to, and what a changing file does to that."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from router.tenancy.errors import KeyFileError
from router.tenancy.key_file import TeamEntry, make_key, new_key_file, revoke_key, save_key_file, set_team
from router.tenancy.key_ring import LOOK_INTERVAL_S, MAX_KEY_BYTES, KeyRing, KeySource

NOW = datetime(2026, 11, 1, tzinfo=UTC)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_key_leads_to_its_team_and_its_share() -> None:
    file = set_team(new_key_file(), "red", TeamEntry(weight=3.0))
    file, red = make_key(file, "red", NOW)
    file, blue = make_key(file, "blue", NOW, models=("m",))
    ring = KeyRing(file)
    found = ring.find(red.text.encode(), NOW)
    other = ring.find(blue.text.encode(), NOW)
    assert found is not None and (found.team, found.key_id, found.weight) == ("red", red.entry.id, 3.0)
    assert other is not None and (other.team, other.weight, other.models) == ("blue", 1.0, ("m",))
    assert found.cache_salt != other.cache_salt != ""
    assert ring.find_limits("team:red") == found.team_limits and ring.find_limits("team:nobody") is None


@pytest.mark.parametrize("text", [b"", b"sk-shoal-", b"sk-shoal-" + b"A" * 43, b"\xff\x00", b"x" * 10_000_000], ids=len)
def test_what_is_no_key_leads_nowhere(text: bytes) -> None:
    file, _ = make_key(new_key_file(), "red", NOW)
    assert KeyRing(file).find(text, NOW) is None


def test_a_key_with_something_behind_it_is_another() -> None:
    file, new = make_key(new_key_file(), "red", NOW)
    padded = new.text.encode() + b" " * MAX_KEY_BYTES
    assert KeyRing(file).find(padded, NOW) is None


def test_expired_and_revoked_keys_lead_nowhere() -> None:
    file, short = make_key(new_key_file(), "red", NOW, expires_at=NOW + timedelta(hours=1))
    file, revoked = make_key(file, "red", NOW)
    ring = KeyRing(revoke_key(file, revoked.entry.id, NOW))
    assert ring.find(short.text.encode(), NOW) is not None
    assert ring.find(short.text.encode(), NOW + timedelta(hours=1)) is None
    assert ring.find(revoked.text.encode(), NOW) is None


def test_a_changed_file_is_seen_within_a_second(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys.json", Clock()
    file, first = make_key(new_key_file(), "red", NOW)
    save_key_file(path, file)
    source = KeySource(path, clock)
    changed, second = make_key(revoke_key(file, first.entry.id, NOW), "red", NOW)
    save_key_file(path, changed)
    assert source.get().find(first.text.encode(), NOW) is not None  # not looked at again yet
    clock.now_s += LOOK_INTERVAL_S
    assert source.get().find(first.text.encode(), NOW) is None
    assert source.get().find(second.text.encode(), NOW) is not None


def test_a_half_written_or_missing_file_leaves_the_last_good_keys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, clock = tmp_path / "keys.json", Clock()
    file, key = make_key(new_key_file(), "red", NOW)
    save_key_file(path, file)
    source = KeySource(path, clock)
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], b"", None):
        path.unlink() if data is None else path.write_bytes(data)
        for _ in range(3):
            clock.now_s += LOOK_INTERVAL_S
            assert source.get().find(key.text.encode(), NOW) is not None
    assert caplog.text.count("keeping the keys read before") == 3  # once for each state of the file
    save_key_file(path, revoke_key(file, key.entry.id, NOW))
    clock.now_s += LOOK_INTERVAL_S
    assert source.get().find(key.text.encode(), NOW) is None


def test_a_front_does_not_start_with_a_half_written_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text('{"secret": ')
    with pytest.raises(KeyFileError):
        KeySource(path, Clock())
