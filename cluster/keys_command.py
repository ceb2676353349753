"""`shoal keys`: makes, shows and ends the keys of teams, in the key file that the HTTP fronts read.

It needs no running cluster; fronts see a change within a second.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster.errors import SettingsError
from cluster.settings import load_settings
from cluster.time_arguments import parse_span
from router.tenancy.errors import KeyFileError
from router.tenancy.key_file import (
    KeyEntry,
    KeyFile,
    Limits,
    NewKey,
    TeamEntry,
    edit_lock,
    find_key,
    load_key_file,
    make_key,
    new_key_file,
    revoke_key,
    rotate_key,
    save_key_file,
    set_team,
)


def run(options: argparse.Namespace) -> int:
    """Raises SettingsError, KeyFileError."""
    path = _find_path(options)
    now = datetime.now(UTC)
    if options.action == "list":
        _print_list(load_key_file(path), options, now)
        return 0
    with edit_lock(path):
        file = _load_or_begin(path, may_begin=options.action in ("create", "team"))
        changed, new_keys = _change(file, options, now)
        save_key_file(path, changed)
    _print_change(changed, new_keys, options, path)
    return 0


def _find_path(options: argparse.Namespace) -> Path:
    if options.keys_file is not None:
        return options.keys_file
    settings = load_settings({}, config_file=options.config)
    if settings.keys_file is None:
        raise SettingsError("which key file? give --keys-file FILE, or set SHOAL_KEYS_FILE as for `shoal serve`")
    return settings.keys_file


def _load_or_begin(path: Path, *, may_begin: bool) -> KeyFile:
    if may_begin and not path.exists():
        return new_key_file()
    return load_key_file(path)


def _change(file: KeyFile, options: argparse.Namespace, now: datetime) -> tuple[KeyFile, list[NewKey]]:
    match options.action:
        case "create":
            file, new = make_key(
                file,
                options.team,
                now,
                note=options.note,
                expires_at=None if options.expires is None else now + parse_span(options.expires),
                models=_split(options.models),
                priorities=_split(options.priorities),
                limits=_read_limits(options, Limits()),
            )
            return file, [new]
        case "rotate":
            valid_until = now + parse_span(options.grace)
            new_keys: list[NewKey] = []
            for entry in _select(file, options):
                if options.key is not None or entry.is_valid(now):
                    file, new = rotate_key(file, entry.id, now, valid_until)
                    new_keys.append(new)
            if not new_keys:
                raise KeyFileError(f"team {options.team} has no valid key to rotate")
            return file, new_keys
        case "revoke":
            for entry in _select(file, options):
                file = revoke_key(file, entry.id, now)
            return file, []
        case "team":
            return set_team(file, options.team, _read_team(options, file.get_team(options.team))), []
        case _:
            raise SettingsError(f"unknown action {options.action}")


def _select(file: KeyFile, options: argparse.Namespace) -> Sequence[KeyEntry]:
    """By id or by team. Raises KeyFileError if there is none."""
    if options.key is not None:
        return [find_key(file, options.key)]
    entries = [entry for entry in file.keys if entry.team == options.team]
    if not entries:
        raise KeyFileError(f"team {options.team!r} has no key: see `shoal keys list`")
    return entries


def _read_limits(options: argparse.Namespace, present: Limits) -> Limits:
    given = {"requests_per_minute": options.rpm, "tokens_per_minute": options.tpm, "parallel": options.parallel}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        return Limits(**{**present.model_dump(), **given})
    except ValidationError:
        raise SettingsError("--rpm, --tpm and --parallel must be at least 1") from None


def _read_team(options: argparse.Namespace, present: TeamEntry) -> TeamEntry:
    weight = present.weight if options.weight is None else options.weight
    try:
        return TeamEntry(weight=weight, limits=_read_limits(options, present.limits))
    except ValidationError:
        raise SettingsError(f"--weight must be more than 0 and at most 1000 (got {weight:g})") from None


def _split(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def _print_change(file: KeyFile, new_keys: Sequence[NewKey], options: argparse.Namespace, path: Path) -> None:
    if options.json:
        keys = [{"key": new.text, **_describe_key(new.entry)} for new in new_keys]
        print(json.dumps({"keys_file": str(path), "new_keys": keys}, indent=2))
        return
    for new in new_keys:
        print(f"{new.text}  (id {new.entry.id}, team {new.entry.team}; shown this once)")
    if options.action == "revoke":
        print(f"revoked: {options.key or f'every key of team {options.team}'}")
    if options.action == "team":
        print(f"team {options.team}: {_describe_team(file.get_team(options.team))}")


def _print_list(file: KeyFile, options: argparse.Namespace, now: datetime) -> None:
    entries = [entry for entry in file.keys if options.team in (None, entry.team)]
    names = sorted({*file.teams, *(entry.team for entry in file.keys)})
    teams = {name: file.get_team(name) for name in names if options.team in (None, name)}
    if options.json:
        keys = [{**_describe_key(entry), "valid": entry.is_valid(now)} for entry in entries]
        described = {name: team.model_dump(mode="json") for name, team in teams.items()}
        print(json.dumps({"teams": described, "keys": keys}, indent=2))
        return
    for name, team in teams.items():
        print(f"team {name}: {_describe_team(team)}")
        for entry in entries:
            if entry.team == name:
                parts = (entry.id, _describe_state(entry, now), _describe_rights(entry), entry.note)
                print("  " + "  ".join(parts).rstrip())


def _describe_key(entry: KeyEntry) -> dict[str, Any]:
    return entry.model_dump(mode="json", exclude={"digest"})


def _describe_team(team: TeamEntry) -> str:
    return f"weight {team.weight:g}, {_describe_limits(team.limits)}"


def _describe_rights(entry: KeyEntry) -> str:
    parts = [_describe_limits(entry.limits)]
    if entry.models is not None:
        parts.append(f"models {', '.join(entry.models) or 'none'}")
    if entry.priorities is not None:
        parts.append(f"priorities {', '.join(entry.priorities)}")
    return "; ".join(parts)


def _describe_limits(limits: Limits) -> str:
    parts = [
        f"{value} {what}"
        for value, what in (
            (limits.requests_per_minute, "requests/min"),
            (limits.tokens_per_minute, "tokens/min"),
            (limits.parallel, "at once"),
        )
        if value is not None
    ]
    return ", ".join(parts) or "no limits"


def _describe_state(entry: KeyEntry, now: datetime) -> str:
    if entry.revoked_at is not None:
        return f"revoked {entry.revoked_at:%Y-%m-%d}"
    if entry.expires_at is None:
        return "valid"
    return f"{'valid until' if entry.is_valid(now) else 'expired'} {entry.expires_at:%Y-%m-%d %H:%M}"
