"""What a request asks of single tokens: penalties on those its sequence holds already, and a bias on those it names.

Both touch few logits of a row, so they are gathered, changed and put back for all rows of a step at once. Semantics are
vLLM's: the bias first, then the repetition penalty on every token of prompt and answer, then the frequency and presence
penalties on tokens of the answer; all before the temperature.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from router.token_counts import TokenCounts


@dataclass(frozen=True)
class Penalties:
    """repetition 1, presence 0 and frequency 0 change nothing."""

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0


class LogitBias:
    """token_ids: [num_biased] int64, distinct; values: [num_biased] float32, added to their logits."""

    def __init__(self, biases: Iterable[tuple[int, float]]) -> None:
        """biases: (token id, value)."""
        pairs = list(biases)
        self.token_ids = np.array([token_id for token_id, _ in pairs], dtype=np.int64)
        self.values = np.array([value for _, value in pairs], dtype=np.float32)


class BiasedRow(NamedTuple):
    """row: of the logits."""

    row: int
    bias: LogitBias


class PenalisedRow(NamedTuple):
    """row: of the logits. following: tokens assumed to come after those counted."""

    row: int
    penalties: Penalties
    counts: TokenCounts
    following: Sequence[int]


def add_biases_(logits: Tensor, rows: Sequence[BiasedRow]) -> None:
    """Change logits, [num_rows, vocab_size] float32, in place."""
    index = _index([(row.row, row.bias.token_ids) for row in rows], logits.device)
    logits[index] += _join([row.bias.values for row in rows], logits.device)


def penalise_(logits: Tensor, rows: Sequence[PenalisedRow]) -> None:
    """Change logits, [num_rows, vocab_size] float32, in place."""
    held = [row.counts.after(row.following) for row in rows]
    index = _index([(row.row, ids) for row, (ids, _) in zip(rows, held, strict=True)], logits.device)
    counts = _join([row_counts for _, row_counts in held], logits.device)
    lengths = [len(ids) for ids, _ in held]
    settings = np.array([(p.repetition, p.frequency, p.presence) for _, p, _, _ in rows], dtype=np.float32)
    repetition, frequency, presence = torch.from_numpy(np.repeat(settings, lengths, axis=0)).to(logits.device).unbind(1)
    values = logits[index]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[index] = values - frequency * counts - presence * (counts > 0)


def _index(rows: Sequence[tuple[int, npt.NDArray[np.int64]]], device: torch.device) -> tuple[Tensor, Tensor]:
    numbers = np.repeat(np.array([row for row, _ in rows]), [len(token_ids) for _, token_ids in rows])
    return torch.from_numpy(numbers).to(device), _join([token_ids for _, token_ids in rows], device)


def _join(arrays: Sequence[npt.NDArray[np.int64]] | Sequence[npt.NDArray[np.float32]], device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays)).to(device)
