"""Decides into how many micro-batches a step is split, from nothing but measured steps.

What overlap gains (waiting that another micro-batch's computing covers) and what it costs (twice the frames, smaller
products, experts that share the router's cores) differ by network, machine and load, and all of it shows in one number:
how long a step took. So steps of the same size are compared in both ways, taking turns, and the faster way is kept. Of
a router that hardly waits no step is spent on this.
"""

from __future__ import annotations

import collections
import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

logger = logging.getLogger(__name__)

MicroBatchSetting = Literal["auto", "off"] | int
MAX_MICRO_BATCHES = 8

# What "auto" chooses from; neighbours are compared with each other.
CHOICES = (1, 2, 4)
# A comparison: so many steps each way, in turns.
STEPS_COMPARED = 5
# It ends early, and the next one is far off, when the other way is clearly slower: every step of it, of so many at
# least, took so much longer than the median of the way in force. On two shared cores, trying at every turn cost 8 % of
# the demo's throughput (tests/benchmarks/latency_hiding.py).
LEAST_STEPS_COMPARED, CLEARLY_SLOWER = 2, 1.08
CLEAR_PAUSE_FACTOR = 8
# The other way must take this much less time to be taken: medians of a few steps differ by as much for no reason.
LEAST_GAIN = 0.03
# Waiting is all that can be gained: below this share of a step nothing more is tried.
LEAST_WAIT_SHARE = 0.08
# Steps of one size between two comparisons. After each that changed nothing the pause doubles, so that trying what is
# slower costs less than a hundredth of the time in the long run.
FIRST_PAUSE, LAST_PAUSE = 16, 1024
# A share of waiting that differs so much from the one at the last comparison means that the network changed.
WAIT_SHARE_CHANGE = 0.15
# Steps that the share of waiting is the median of.
WAIT_WINDOW = 8


class StepSize(NamedTuple):
    """What a step's time depends on most."""

    num_tokens: int
    num_segments: int


class StepTimes(NamedTuple):
    """Seconds. wait_s: of step_s, those in which the router computed nothing."""

    step_s: float
    wait_s: float


class OverlapPolicy:
    """choose() before a step, record() after it; a step that failed is not recorded. Not thread-safe."""

    def __init__(self, setting: MicroBatchSetting, choices: Sequence[int] = CHOICES) -> None:
        """A number in setting is taken always, "off" means 1. choices: of "auto", ascending from 1."""
        self._fixed = {"auto": None, "off": 1}[setting] if isinstance(setting, str) else setting
        self._choices = tuple(choices)
        self._sizes: dict[tuple[int, int], _SizeClass] = {}

    def choose(self, size: StepSize) -> int:
        """Micro-batches of the next step of this size."""
        if self._fixed is not None:
            return self._fixed
        return self._choices[self._class_of(size).next_choice()]

    def record(self, size: StepSize, num_micro_batches: int, times: StepTimes) -> None:
        """num_micro_batches: what the step was really split into."""
        if self._fixed is not None or num_micro_batches not in self._choices:
            return
        size_class = self._class_of(size)
        before = size_class.choice
        size_class.record(self._choices.index(num_micro_batches), times)
        if size_class.choice != before:
            logger.info(
                "micro-batches=%d for steps like num_tokens=%d num_segments=%d, were %d",
                self._choices[size_class.choice],
                *size,
                self._choices[before],
            )

    def _class_of(self, size: StepSize) -> _SizeClass:
        """Sizes within a factor of two are alike."""
        key = (size.num_tokens.bit_length(), size.num_segments.bit_length())
        if key not in self._sizes:
            self._sizes[key] = _SizeClass(len(self._choices))
        return self._sizes[key]


@dataclass
class _Comparison:
    """The choice in force against another: step times of each, by choice. is_second: it won the one before."""

    other: int
    is_second: bool = False
    step_s: dict[int, list[float]] = field(default_factory=lambda: collections.defaultdict[int, list[float]](list))
    num_asked: int = 0


class _SizeClass:
    """Steps of similar size. Choices are indices here."""

    def __init__(self, num_choices: int) -> None:
        self.choice = 0
        self._num_choices = num_choices
        self._comparison: _Comparison | None = None
        self._pause = FIRST_PAUSE
        self._num_until = FIRST_PAUSE
        self._try_fewer = True
        self._wait_shares = collections.deque[float](maxlen=WAIT_WINDOW)
        self._compared_share: float | None = None

    def next_choice(self) -> int:
        comparison = self._comparison
        if comparison is None:
            return self.choice
        comparison.num_asked += 1
        return comparison.other if comparison.num_asked % 2 else self.choice

    def record(self, choice: int, times: StepTimes) -> None:
        if choice == self.choice:
            self._wait_shares.append(times.wait_s / times.step_s if times.step_s > 0 else 0.0)
        comparison = self._comparison
        if comparison is not None:
            comparison.step_s[choice].append(times.step_s)
            if comparison.num_asked >= 2 * STEPS_COMPARED or self._is_clearly_slower(comparison):
                self._conclude(comparison)
            return
        self._num_until -= 1
        if self._num_until <= 0 or self._has_changed():
            self._start_comparison()

    def _has_changed(self) -> bool:
        return (
            self._compared_share is not None
            and len(self._wait_shares) == WAIT_WINDOW
            and abs(statistics.median(self._wait_shares) - self._compared_share) > WAIT_SHARE_CHANGE
        )

    def _start_comparison(self) -> None:
        """With fewer micro-batches and with more in turns, where there are any and more could gain."""
        share = statistics.median(self._wait_shares) if self._wait_shares else 0.0
        others: list[int] = []
        if self.choice > 0:
            others.append(self.choice - 1)
        if self.choice + 1 < self._num_choices and share >= LEAST_WAIT_SHARE:
            others.append(self.choice + 1)
        self._num_until = self._pause
        if self._compared_share is None or abs(share - self._compared_share) > WAIT_SHARE_CHANGE:
            self._num_until = self._pause = FIRST_PAUSE
        self._compared_share = share
        if others:
            self._try_fewer = not self._try_fewer
            self._comparison = _Comparison(others[0] if self._try_fewer else others[-1])

    def _is_clearly_slower(self, comparison: _Comparison) -> bool:
        found, other = comparison.step_s[self.choice], comparison.step_s[comparison.other]
        return (
            min(len(found), len(other)) >= LEAST_STEPS_COMPARED
            and min(other) > CLEARLY_SLOWER * statistics.median(found)
        )  # fmt: skip

    def _conclude(self, comparison: _Comparison) -> None:
        self._comparison = None
        found, other = comparison.step_s[self.choice], comparison.step_s[comparison.other]
        is_faster = found and other and statistics.median(other) < (1 - LEAST_GAIN) * statistics.median(found)
        if is_faster and not comparison.is_second:
            # Steps of a class are alike, not the same: with drafts, of 12 tokens and of 15. It has to win twice.
            self._comparison = _Comparison(comparison.other, is_second=True)
        elif is_faster:
            self.choice = comparison.other
            self._pause = FIRST_PAUSE
            self._wait_shares.clear()
            self._compared_share = None
        else:
            # With several parts, waiting may be covered already, and then only trying shows that there is none left.
            is_plain = self.choice == 0 and self._is_clearly_slower(comparison)
            factor = CLEAR_PAUSE_FACTOR if is_plain else 2
            self._pause = min(factor * self._pause, LAST_PAUSE)
        self._num_until = self._pause


def parse_micro_batches(value: object) -> MicroBatchSetting:
    """Read "auto", "off" or a number of 1 to MAX_MICRO_BATCHES. Raises ValueError for anything else.

    YAML reads a bare off as False.
    """
    text = "off" if value is False else str(value)
    if text == "auto" or text == "off":
        return text
    if text.isdecimal() and 1 <= int(text) <= MAX_MICRO_BATCHES:
        return int(text)
    raise ValueError(f"expected auto, off or a number of 1 to {MAX_MICRO_BATCHES}, got {text!r}")
