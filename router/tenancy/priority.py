"""The three classes of urgency that requests may have, and their numbers on the wire (lower goes first)."""

from __future__ import annotations

import enum
from collections.abc import Sequence


class PriorityClass(enum.StrEnum):
    """In order of urgency."""

    INTERACTIVE = "interactive"
    STANDARD = "standard"
    BATCH = "batch"

    @property
    def number(self) -> int:
        """GenerateRequest.priority; 0 is what a request gets that says nothing."""
        return _NUMBERS[self]


_NUMBERS = {PriorityClass.INTERACTIVE: -1, PriorityClass.STANDARD: 0, PriorityClass.BATCH: 1}


def classify(number: int) -> PriorityClass:
    """The class of a number that a client gives, as vLLM's clients do: lower goes first, 0 is the default."""
    if number == 0:
        return PriorityClass.STANDARD
    return PriorityClass.INTERACTIVE if number < 0 else PriorityClass.BATCH


def choose_default(allowed: Sequence[PriorityClass] | None) -> PriorityClass:
    """The class of a request that names none: standard, or the most urgent one allowed. None: all are."""
    if allowed is None or PriorityClass.STANDARD in allowed:
        return PriorityClass.STANDARD
    return min(allowed, key=lambda each: each.number)
