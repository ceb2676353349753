"""Spans and points of time as people write them on a command line."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from cluster.errors import SettingsError

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_SPAN = re.compile(r"(\d{1,6})([smhdw])")


def parse_span(text: str) -> timedelta:
    """Such as 90d or 12h. Raises SettingsError."""
    match = _SPAN.fullmatch(text.strip())
    if match is None:
        raise SettingsError(f"{text!r} is no span of time: write a number and s, m, h, d or w, such as 90d")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def parse_moment(text: str, now: datetime) -> datetime:
    """A date, a time in ISO 8601 (without a zone: UTC), or a span before now. Raises SettingsError."""
    if _SPAN.fullmatch(text.strip()):
        return now - parse_span(text)
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise SettingsError(f"{text!r} is no time: write 2026-11-01, 2026-11-01T12:00, or a span such as 7d") from None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
