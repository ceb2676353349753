"""Dates in JSON schemas: the grammars' library takes 29 February of any year, and the year 0000, for a date.

RFC 3339 wants days that there are (section 5.7), and clients' date types begin with the year 1. So what such a format
allows is bound by a pattern as well.
"""

from __future__ import annotations

from typing import Any

_YEAR = r"(?:[1-9]\d{3}|0[1-9]\d{2}|00[1-9]\d|000[1-9])"
_LEAP_YEAR = r"(?:\d{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][48]|[2468]0|[13579][26])00)"
_DAY = r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)|02-(?:0[1-9]|1\d|2[0-8]))"
_DATE = rf"^(?:{_YEAR}-{_DAY}|{_LEAP_YEAR}-02-29)"
# Their values are data, whatever they look like.
_DATA_KEYWORDS = frozenset({"const", "enum", "default", "examples"})


def bind_dates(schema: Any) -> Any:
    """The schema with a pattern beside every `format` that begins with a date."""
    if isinstance(schema, list):
        return [bind_dates(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    bound = {key: value if key in _DATA_KEYWORDS else bind_dates(value) for key, value in schema.items()}
    if schema.get("format") in ("date", "date-time"):
        others = bound.get("allOf", [])
        bound["allOf"] = [*(others if isinstance(others, list) else [others]), {"pattern": _DATE}]
    return bound
