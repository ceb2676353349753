"""A bar on a terminal, bounded log lines elsewhere."""

from __future__ import annotations

import io
import logging

import pytest

from experts.load_progress import LoadProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Advances by a second each time it is read."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


def test_a_terminal_gets_a_bar_and_a_final_newline() -> None:
    terminal = Terminal()
    progress = LoadProgress(4_000_000_000, "weights", stream=terminal, clock=Clock())
    for _ in range(4):
        progress.advance(1_000_000_000)
    progress.finish()
    text = terminal.getvalue()
    assert "\r" in text and "50%" in text and "100%" in text and "GB/s" in text and text.endswith("\n")


def test_a_log_gets_a_line_every_few_seconds_with_rate_and_time_left(caplog: pytest.LogCaptureFixture) -> None:
    stream = io.StringIO()
    progress = LoadProgress(100_000_000_000, "weights", stream=stream, clock=Clock())
    with caplog.at_level(logging.INFO):
        for _ in range(11):
            progress.advance(1_000_000_000)
        progress.finish()
    assert stream.getvalue() == ""
    assert len(caplog.messages) == 3  # after 5 s, after 10 s, and the end
    assert "GB/s" in caplog.messages[0] and "s left" in caplog.messages[0]


def test_nothing_to_load_is_no_division_by_zero() -> None:
    seen: list[float] = []
    progress = LoadProgress(0, "weights", stream=Terminal(), on_fraction=seen.append, clock=lambda: 0.0)
    progress.advance(0)
    progress.finish()
    assert seen == [1.0]
