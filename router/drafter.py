"""The seam of speculative decoding: who guesses tokens ahead, and what a step tells of its sequences.

The engine verifies guesses as tokens of the next step: it samples every position with its own noise, and a draft
holds where it equals that sample. So a drafter decides how fast the output comes, never what it is.
"""

from __future__ import annotations

from collections.abc import Sequence as Series
from typing import NamedTuple, Protocol

from torch import Tensor

from router.sequence import Sequence


class DraftInput(NamedTuple):
    """What a step computed of a sequence that goes on.

    rows: of the step, n of them, for the positions from start on, without those of rejected drafts. The token behind
    each is known: token_ids[start + 1 : start + n + 1].
    num_drafts: how many to guess; 0 for a prompt that is not complete. The sequence has blocks for
    len(token_ids) + num_drafts tokens; rows at positions from num_computed on are overwritten by the next step.
    """

    sequence: Sequence
    rows: range
    start: int
    num_drafts: int


class Drafter(Protocol):
    def choose_depths(self, sequences: Series[Sequence]) -> list[int]:
        """How many tokens to guess now for each of those that decode; 0: not worth it."""
        ...

    def note_verified(self, sequence: Sequence, num_drafts: int, num_accepted: int) -> None:
        """Of num_drafts guesses, the first num_accepted held."""
        ...

    def note_step(self, num_sequences: int, seconds: float) -> None:
        """A step took that long, with drafting and what follows until the next one; it computed so many sequences,
        none of them a prompt."""
        ...

    async def draft(self, hidden_states: Tensor, inputs: Series[DraftInput]) -> list[list[int]]:
        """hidden_states: [num_tokens, hidden_size], the trunk's of the step. Returns the guesses for each input, at
        most its num_drafts. Inputs with 0 are there for what the drafter keeps in the cache. Raises what the expert
        groups raise."""
        ...


def count_accepted(drafts: Series[int], sampled: Series[int]) -> int:
    """How many drafts hold: those before the first that is not what was sampled at its position."""
    for index, (draft, token_id) in enumerate(zip(drafts, sampled, strict=False)):
        if draft != token_id:
            return index
    return min(len(drafts), len(sampled))
