"""Sets of allowed tokens, one bit per token id: the lowest id in the lowest bit of the first byte."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class BoundRow(NamedTuple):
    """row: of the logits. allowed: at least a bit for each of its tokens."""

    row: int
    allowed: bytes


def forbid_others_(logits: Tensor, rows: Sequence[BoundRow]) -> None:
    """Leave the rows only their allowed tokens. Changes logits, [num_rows, vocab_size] float32, in place."""
    vocab_size = logits.shape[1]
    packed = np.stack([np.frombuffer(row.allowed, np.uint8, (vocab_size + 7) // 8) for row in rows])
    allowed = np.unpackbits(packed, axis=1, count=vocab_size, bitorder="little")
    index = torch.tensor([row.row for row in rows], device=logits.device)
    forbidden = torch.from_numpy(allowed == 0).to(logits.device)
    logits[index] = logits[index].masked_fill(forbidden, float("-inf"))


def has_only(allowed: bytes, token_ids: Sequence[int]) -> bool:
    """Whether no other token than these is allowed."""
    num_of_them = sum((allowed[token_id >> 3] >> (token_id & 7)) & 1 for token_id in set(token_ids))
    return int.from_bytes(allowed, "little").bit_count() == num_of_them
