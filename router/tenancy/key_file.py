"""The key file: teams, their limits, and their keys as digests. What `shoal keys` writes and every HTTP front reads.

JSON and not YAML, because a half-written JSON object never parses, while a YAML file cut in the middle may be a valid
one with fewer keys. It may be a Kubernetes Secret mounted as a file. A key's text is nowhere: the file has its
HMAC-SHA256 under a secret of the file, so that equal keys of two installations have nothing in common.
Changes are pure (file -> file); only load_key_file and save_key_file touch the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from router.tenancy.errors import KeyFileError
from router.tenancy.priority import PriorityClass

KEY_PREFIX = "sk-shoal-"
# 256 bits: nobody guesses one, so a plain digest without stretching is enough.
_KEY_BYTES = 32
_TEAM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
# A file of 10,000 keys takes about 4 MB.
_MAX_FILE_BYTES = 64 * 2**20


def check_team_name(name: str) -> str:
    """Return name. Raises ValueError: names go into metrics, logs and reports."""
    if _TEAM_NAME.fullmatch(name) is None:
        raise ValueError("a team's name has 1 to 63 letters, digits, dots, underscores or hyphens")
    return name


TeamName = Annotated[str, AfterValidator(check_team_name)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Limits(BaseModel):
    """What may be used at most; None: no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None
    parallel: Annotated[int, Field(ge=1)] | None = None
    """Requests being worked on at once."""


class TeamEntry(BaseModel):
    """weight: share of the cluster relative to other teams that have work waiting. limits: of all its keys together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 1.0
    limits: Limits = Limits()


class KeyEntry(BaseModel):
    """One key. models, priorities: what it may ask for; None: everything. expires_at: None: never. revoked_at: None:
    it is valid."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,64}$")]
    team: TeamName
    digest: Digest
    created_at: AwareDatetime
    note: Annotated[str, Field(max_length=200)] = ""
    expires_at: AwareDatetime | None = None
    revoked_at: AwareDatetime | None = None
    models: tuple[str, ...] | None = None
    priorities: Annotated[tuple[PriorityClass, ...], Field(min_length=1)] | None = None
    limits: Limits = Limits()

    def is_valid(self, now: datetime) -> bool:
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


class KeyFile(BaseModel):
    """The whole file. Teams that are not listed have the defaults of TeamEntry."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    secret: Digest
    """Key of the HMAC, 32 bytes as hex."""
    teams: Mapping[TeamName, TeamEntry] = {}
    keys: tuple[KeyEntry, ...] = ()

    def get_team(self, name: str) -> TeamEntry:
        return self.teams.get(name, TeamEntry())


class NewKey(NamedTuple):
    """text: the key itself, to be shown once and never again."""

    text: str
    entry: KeyEntry


def new_key_file() -> KeyFile:
    return KeyFile(secret=secrets.token_hex(32))


def compute_digest(secret: str, key_text: bytes) -> bytes:
    """secret: of the key file, as hex."""
    return hmac.digest(bytes.fromhex(secret), key_text, "sha256")


def make_key(file: KeyFile, team: str, now: datetime, **fields: object) -> tuple[KeyFile, NewKey]:
    """Add a key. fields: of KeyEntry. Raises KeyFileError if one of them makes no sense."""
    text = KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    entry = _validate_key(
        {
            **fields,
            "id": f"k{secrets.token_hex(4)}",
            "team": team,
            "digest": compute_digest(file.secret, text.encode()).hex(),
            "created_at": now,
        }
    )
    return file.model_copy(update={"keys": (*file.keys, entry)}), NewKey(text, entry)


def rotate_key(file: KeyFile, key_id: str, now: datetime, valid_until: datetime) -> tuple[KeyFile, NewKey]:
    """Add a key that may do what another may, which ends at valid_until. Raises KeyFileError."""
    old = find_key(file, key_id)
    if not old.is_valid(now):
        raise KeyFileError(f"key {key_id} is revoked or has expired: create another")
    inherited = old.model_dump(exclude={"id", "team", "digest", "created_at"})
    file, new = make_key(file, old.team, now, **inherited)
    ends_at = valid_until if old.expires_at is None else min(valid_until, old.expires_at)
    return _replace_key(file, old.model_copy(update={"expires_at": ends_at})), new


def revoke_key(file: KeyFile, key_id: str, now: datetime) -> KeyFile:
    """Raises KeyFileError if there is no such key. Revoking twice changes nothing."""
    entry = find_key(file, key_id)
    return file if entry.revoked_at is not None else _replace_key(file, entry.model_copy(update={"revoked_at": now}))


def set_team(file: KeyFile, name: str, entry: TeamEntry) -> KeyFile:
    """Raises KeyFileError if it is no name for a team."""
    try:
        check_team_name(name)
    except ValueError as error:
        raise KeyFileError(str(error)) from None
    return file.model_copy(update={"teams": {**file.teams, name: entry}})


def find_key(file: KeyFile, key_id: str) -> KeyEntry:
    """Raises KeyFileError if there is none."""
    for entry in file.keys:
        if entry.id == key_id:
            return entry
    raise KeyFileError(f"no key has the id {key_id!r}: see `shoal keys list`")


def load_key_file(path: Path) -> KeyFile:
    """Raises KeyFileError if it is missing, half-written, or anything else than a key file."""
    try:
        with path.open("rb") as source:
            data = source.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeyFileError(f"cannot read the key file {path}: {error.strerror}") from None
    if len(data) > _MAX_FILE_BYTES:
        raise KeyFileError(f"the key file {path} has more than {_MAX_FILE_BYTES} bytes")
    try:
        file = KeyFile.model_validate_json(data)
    except ValidationError as error:
        # Without input: it holds the secret.
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise KeyFileError(f"the key file {path} cannot be used: {place}: {first['msg']}") from None
    if len({entry.id for entry in file.keys}) != len(file.keys):
        raise KeyFileError(f"the key file {path} has two keys of the same id")
    return file


def save_key_file(path: Path, file: KeyFile) -> None:
    """Replace the file in one step, readable by its owner only. Raises KeyFileError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as target:
                target.write(file.model_dump_json(indent=1, exclude_none=True) + "\n")
                target.flush()
                os.fsync(target.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise KeyFileError(f"cannot write the key file {path}: {error.strerror}") from None


@contextlib.contextmanager
def edit_lock(path: Path) -> Iterator[None]:
    """Held by one editor of the key file at a time, so that no change is lost. Raises KeyFileError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock").open("w")
    except OSError as error:
        raise KeyFileError(f"cannot write beside the key file {path}: {error.strerror}") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _replace_key(file: KeyFile, entry: KeyEntry) -> KeyFile:
    return file.model_copy(update={"keys": tuple(entry if old.id == entry.id else old for old in file.keys)})


def _validate_key(fields: Mapping[str, object]) -> KeyEntry:
    try:
        return KeyEntry.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        raise KeyFileError(f"{'.'.join(str(part) for part in first['loc'])}: {message}") from None
