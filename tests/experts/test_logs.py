"""One JSON object per line, with the fields that the message names."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import pytest

from experts.logs import JsonFormatter, logged_request_id


def write(message: object, *args: object, exc_info: Any = None) -> dict[str, Any]:
    record = logging.LogRecord("router.api", logging.WARNING, __file__, 1, message, args, exc_info)
    line = JsonFormatter().format(record)
    assert "\n" not in line
    return json.loads(line, parse_constant=pytest.fail)


def test_fields_have_the_values_that_were_given():
    line = write("request failed request_id=%s status=%d ms=%.1f code=%s", "r1", 503, 1.25, None)
    assert line["message"] == "request failed request_id=r1 status=503 ms=1.2 code=None"
    assert {name: line[name] for name in ("request_id", "status", "ms", "code")} == {
        "request_id": "r1", "status": 503, "ms": 1.25, "code": None
    }  # fmt: skip
    assert (line["level"], line["logger"]) == ("warning", "router.api")
    assert line["time"].endswith("+00:00")


@pytest.mark.parametrize(
    ("message", "args", "fields"),
    [
        ("the loop has not turned for %.0f s", (3.0,), {}),
        ("group %s share=%d%% left=%s", ("g0", 3, 4), {"share": 3, "left": 4}),
        ("text with share=50% and no arguments", (), {}),
        ("rate=%s", (float("nan"),), {"rate": "nan"}),
        ("reason=%r", (ValueError("x"),), {"reason": "x"}),
        ("level=%s pid=%d", ("high", -1), {}),
        (ValueError("an error"), (), {}),
        ("%(a)s", ({"a": 1},), {}),
    ],
)
def test_only_what_is_named_is_a_field(message: object, args: tuple[object, ...], fields: dict[str, object]):
    line = write(message, *args)
    own = {"time", "level", "logger", "message", "pid"}
    assert {name: value for name, value in line.items() if name not in own} == fields
    assert line["level"] == "warning" and line["pid"] > 0


def test_the_request_of_the_task_unless_the_message_names_another():
    token = logged_request_id.set("outer")
    try:
        assert write("stream failed")["request_id"] == "outer"
        assert write("router failed request_id=%s", "outer-0")["request_id"] == "outer-0"
    finally:
        logged_request_id.reset(token)
    assert "request_id" not in write("stream failed")


def test_errors_stay_on_the_line():
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        assert "ValueError: first\nsecond" in write("failed", exc_info=sys.exc_info())["error"]
