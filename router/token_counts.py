"""What penalties need to know of a sequence. No torch: sequences are the scheduler's business, too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

_FIRST_CAPACITY = 64


class TokenCounts:
    """The distinct tokens of one sequence, and how often its answer holds each. A new token costs the same at any
    length."""

    def __init__(self, prompt_token_ids: Iterable[int], answer_token_ids: Iterable[int]) -> None:
        """answer_token_ids: what was generated already."""
        self._slots: dict[int, int] = {}
        self._token_ids = np.empty(_FIRST_CAPACITY, dtype=np.int64)
        self._counts = np.empty(_FIRST_CAPACITY, dtype=np.float32)
        for token_id in prompt_token_ids:
            self._slot(token_id)
        for token_id in answer_token_ids:
            self.add(token_id)

    def add(self, token_id: int) -> None:
        """Count a token of the answer."""
        slot = self._slot(token_id)  # may replace the arrays
        self._counts[slot] += 1

    def after(self, following: Sequence[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """(token ids, counts) as they will be if the answer goes on with `following`; neither may be changed."""
        length = len(self._slots)
        token_ids, counts = self._token_ids[:length], self._counts[:length]
        if not following:
            return token_ids, counts
        added = [token_id for token_id in dict.fromkeys(following) if token_id not in self._slots]
        slots = {**{token_id: self._slots[token_id] for token_id in following if token_id in self._slots},
                 **{token_id: length + index for index, token_id in enumerate(added)}}  # fmt: skip
        token_ids = np.concatenate([token_ids, np.array(added, dtype=np.int64)])
        counts = np.concatenate([counts, np.zeros(len(added), dtype=np.float32)])
        for token_id in following:
            counts[slots[token_id]] += 1
        return token_ids, counts

    def _slot(self, token_id: int) -> int:
        slot = self._slots.get(token_id)
        if slot is not None:
            return slot
        slot = len(self._slots)
        if slot == len(self._token_ids):
            self._token_ids = np.concatenate([self._token_ids, np.empty_like(self._token_ids)])
            self._counts = np.concatenate([self._counts, np.empty_like(self._counts)])
        self._slots[token_id] = slot
        self._token_ids[slot], self._counts[slot] = token_id, 0
        return slot
