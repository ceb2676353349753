"""The seam between the scheduler and whoever decides who is next; and the plainest such policy.

A policy owns the order of the sequences that wait. It is asked at each admission, since whose turn it is changes with
everything that is computed meanwhile, and it is told of that. Which blocks and how many tokens a sequence gets is the
scheduler's business.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence as Items
from typing import Protocol

from router.sequence import Rank, Sequence


class QueuePolicy(Protocol):
    """Every sequence is pushed, admitted any number of times (pushed again in between, if it had to give way), and
    dropped once."""

    def list_waiting(self) -> list[Sequence]:
        """In no order that promises anything but whom peek() names first."""
        ...

    def find_refusal(self, sequence: Sequence, max_waiting: int) -> str | None:
        """Why a new sequence finds no place among those that wait; None: it does."""
        ...

    def push(self, sequence: Sequence) -> None:
        """It waits: a new one, whose rank is set here, or one that ran and had to give way."""
        ...

    def peek(self) -> Sequence | None:
        """Who is next; None: nobody waits."""
        ...

    def admit(self, sequence: Sequence) -> None:
        """The one that peek() named runs now. How much of it was found in the cache is known."""
        ...

    def drop(self, sequence: Sequence) -> None:
        """It neither waits nor runs any more. Nothing happens if it did not."""
        ...

    def note_computed(self, sequence: Sequence, num_prompt_tokens: int, num_generated: int) -> None:
        """What a step gave a running sequence."""
        ...

    def turn(self, sequence: Sequence) -> Rank:
        """Lower ones have prompts computed first, now. Of waiting and running sequences."""
        ...

    def find_victims(self, running: Items[Sequence], newcomer: Sequence | None) -> list[Sequence]:
        """Who gives way, the first one first. newcomer: who waits for room; None: those that run need blocks, and then
        somebody always gives way, but never the one of lowest rank as long as there are others."""
        ...


class FirstComeFirstServed:
    """In order of arrival among those of one priority. What another router had begun came before all."""

    def __init__(self) -> None:
        self._waiting: list[Sequence] = []
        self._num_arrived = 0

    def list_waiting(self) -> list[Sequence]:
        return list(self._waiting)

    def find_refusal(self, sequence: Sequence, max_waiting: int) -> str | None:
        # Half an answer must not be lost to those who have not begun.
        if len(self._waiting) < max_waiting or sequence.request.num_answer_tokens > 0:
            return None
        return f"{len(self._waiting)} requests are waiting already"

    def push(self, sequence: Sequence) -> None:
        if not sequence.rank:
            request = sequence.request
            sequence.rank = (request.priority, 0 if request.num_answer_tokens else 1, self._num_arrived)
            self._num_arrived += 1
        insort(self._waiting, sequence, key=rank_of)

    def peek(self) -> Sequence | None:
        return self._waiting[0] if self._waiting else None

    def admit(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)

    def drop(self, sequence: Sequence) -> None:
        if sequence in self._waiting:
            self._waiting.remove(sequence)

    def note_computed(self, sequence: Sequence, num_prompt_tokens: int, num_generated: int) -> None:
        pass

    def turn(self, sequence: Sequence) -> Rank:
        return sequence.rank

    def find_victims(self, running: Items[Sequence], newcomer: Sequence | None) -> list[Sequence]:
        return [] if newcomer is not None else sorted(running, key=rank_of, reverse=True)


def rank_of(sequence: Sequence) -> Rank:
    return sequence.rank
