"""From the key that a request shows to the account it belongs to, by the key file as it is now.

The file is looked at once a second at most, by whichever request comes; a change that cannot be read leaves the last
good set in force and is logged once.
"""

from __future__ import annotations

import hmac
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from router.tenancy.errors import KeyFileError
from router.tenancy.key_file import KeyEntry, KeyFile, Limits, compute_digest, load_key_file
from router.tenancy.priority import PriorityClass

logger = logging.getLogger(__name__)

# Longer ones are none of ours; what is hashed of them is bounded.
MAX_KEY_BYTES = 256
LOOK_INTERVAL_S = 1.0
ANONYMOUS_TEAM = "anonymous"


@dataclass(frozen=True)
class Account:
    """Whose request it is and what it may do. models, priorities: None: everything. cache_salt: of the team; "" where
    there are no keys. key_limits, team_limits: both hold."""

    team: str
    key_id: str = ""
    weight: float = 1.0
    cache_salt: str = ""
    models: tuple[str, ...] | None = None
    priorities: tuple[PriorityClass, ...] | None = None
    key_limits: Limits = field(default_factory=Limits)
    team_limits: Limits = field(default_factory=Limits)

    @property
    def scope_ids(self) -> tuple[str, ...]:
        """Under which names its use is counted; the team's is the last."""
        team = f"team:{self.team}"
        return (team,) if self.key_id == "" else (f"key:{self.key_id}", team)

    @property
    def scope_limits(self) -> tuple[Limits, ...]:
        """Of scope_ids, in their order."""
        return (self.team_limits,) if self.key_id == "" else (self.key_limits, self.team_limits)


ANONYMOUS = Account(ANONYMOUS_TEAM)


class KeyRing:
    """One state of the key file, for looking up. Immutable."""

    def __init__(self, file: KeyFile) -> None:
        self._secret = file.secret
        self._keys = {bytes.fromhex(entry.digest): (entry, _make_account(file, entry)) for entry in file.keys}
        self._limits = {
            scope_id: limits
            for _, account in self._keys.values()
            for scope_id, limits in zip(account.scope_ids, account.scope_limits, strict=True)
        }

    def __len__(self) -> int:
        return len(self._keys)

    def find_limits(self, scope_id: str) -> Limits | None:
        """Of a key or a team; None: there is none of that name."""
        return self._limits.get(scope_id)

    def find(self, key_text: bytes, now: datetime) -> Account | None:
        """None: unknown, revoked or expired.

        Takes the same time for all of these: what is looked up is a keyed digest, which tells whoever measures nothing
        about the keys there are, and a digest is compared whether or not there is one.
        """
        digest = compute_digest(self._secret, key_text[:MAX_KEY_BYTES])
        found = self._keys.get(digest)
        stored = bytes(len(digest)) if found is None else bytes.fromhex(found[0].digest)
        is_equal = hmac.compare_digest(digest, stored)
        if found is None or not is_equal or not found[0].is_valid(now):
            return None
        return found[1]


class KeySource:
    """The key ring in force, of a file that may change any time. Used by one thread."""

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        """clock: seconds, monotonic. Raises KeyFileError if the file cannot be read now."""
        self._path = path
        self._clock = clock
        self._seen = _read_identity(path)
        self._ring = KeyRing(load_key_file(path))
        self._looked_at_s = clock()

    def get(self) -> KeyRing:
        now_s = self._clock()
        if now_s - self._looked_at_s >= LOOK_INTERVAL_S:
            self._looked_at_s = now_s
            self._look()
        return self._ring

    def _look(self) -> None:
        identity = _read_identity(self._path)
        if identity == self._seen:
            return
        self._seen = identity
        try:
            self._ring = KeyRing(load_key_file(self._path))
        except KeyFileError as error:
            logger.error("keeping the keys read before: %s", error)
            return
        logger.info("key file read path=%s keys=%d", self._path, len(self._ring))


def _make_account(file: KeyFile, entry: KeyEntry) -> Account:
    team = file.get_team(entry.team)
    salt = hmac.digest(bytes.fromhex(file.secret), b"cache salt of " + entry.team.encode(), "sha256")
    return Account(
        team=entry.team,
        key_id=entry.id,
        weight=team.weight,
        cache_salt=salt.hex()[:32],
        models=entry.models,
        priorities=entry.priorities,
        key_limits=entry.limits,
        team_limits=team.limits,
    )


def _read_identity(path: Path) -> tuple[int, int, int] | None:
    """Changes with every change of the file; a mounted Secret changes by its link. None: it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def now_utc() -> datetime:
    return datetime.now(UTC)
