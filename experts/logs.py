"""How every process writes its log: lines for people, or one JSON object per line for machines.

Messages are an event and its fields, `request failed request_id=%s status=%d`, so both forms follow from one call: in
JSON each `name=%s` is a field with the value that was given, not its text. Prompts and answers are in no message.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["text", "json"]
LOG_FORMATS: tuple[LogFormat, ...] = ("text", "json")

# Of the request that a task works for: lines that do not name one get it.
logged_request_id: ContextVar[str | None] = ContextVar("logged_request_id", default=None)

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# A conversion of the logging module's %-style, with the name before it if it is a field of its own.
_CONVERSION = re.compile(r"(?:(?<![^\s])(?P<name>[A-Za-z_]\w*)=)?%(?:%|[-+ #0]*\d*(?:\.\d+)?[a-zA-Z])")


def set_up_logging(level: str = "info", log_format: LogFormat = "text", *, replaces: bool = False) -> None:
    """To stderr. replaces: also where the process's host has set up a log of its own, and put it
    in stderr's place, as Ray Serve does."""
    handler = logging.StreamHandler(sys.__stderr__ if replaces else sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=replaces)


class JsonFormatter(logging.Formatter):
    """time, level, logger, message, pid, request_id where there is one, the message's fields, and error."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "pid": os.getpid(),
        }
        request_id = logged_request_id.get()
        if request_id is not None:
            line["request_id"] = request_id
        fields = find_fields(record)
        # A line's own request is the nearer one; its other names mean the same everywhere.
        line |= {name: value for name, value in fields.items() if name == "request_id" or name not in line}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, allow_nan=False)


def find_fields(record: logging.LogRecord) -> dict[str, str | int | float | bool | None]:
    """What the message's template names. Empty for messages that are no template."""
    if not isinstance(record.args, tuple) or not isinstance(record.msg, str):
        return {}
    conversions = [found for found in _CONVERSION.finditer(record.msg) if not found[0].endswith("%%")]
    if len(conversions) != len(record.args):
        return {}
    return {
        found["name"]: _plain(value) for found, value in zip(conversions, record.args, strict=True) if found["name"]
    }


def _plain(value: object) -> str | int | float | bool | None:
    """As JSON has it; numbers that it has not, as text."""
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)
