"""Adds up what the expert groups answered, in the order of the groups.

The sum of a row is the last thing before the next layer can begin, so it takes one pass over the answers, in the
library of the CPU kernel (experts/kernels/cpu/row_sums.h); without it torch adds the same numbers in the same order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from experts.kernels.cpu_ffn import load_library

# Torch's sums of many rows are added part by part, each small enough to stay in a core's cache.
ROWS_ADDED_AT_ONCE = 16


class Answer(NamedTuple):
    """rows: [num_rows, hidden_size] bfloat16 or float32, contiguous. row_ids: [num_rows] int64, ascending: where they
    belong; None: to every row of the sum."""

    rows: Tensor
    row_ids: npt.NDArray[np.int64] | None


def add_answers(answers: Sequence[Answer], num_tokens: int, hidden_size: int) -> Tensor:
    """[num_tokens, hidden_size] float32. A row that is in no answer is zero."""
    library = load_library()
    dtypes = {answer.rows.dtype for answer in answers}
    if library is None or len(dtypes) != 1 or not dtypes <= {torch.bfloat16, torch.float32}:
        return add_answers_in_torch(answers, num_tokens, hidden_size)
    total = torch.empty(num_tokens, hidden_size, dtype=torch.float32)
    count = len(answers)
    pointers = (ctypes.c_void_p * (2 * count))()
    num_rows = (ctypes.c_int64 * count)()
    for index, (rows, row_ids) in enumerate(answers):
        pointers[index] = rows.data_ptr()
        if row_ids is not None:
            assert row_ids.dtype == np.int64 and row_ids.flags.c_contiguous
            pointers[count + index] = row_ids.ctypes.data
        num_rows[index] = rows.shape[0]
    library.shoal_add_rows(
        int(torch.bfloat16 in dtypes),
        count,
        pointers,
        ctypes.byref(pointers, ctypes.sizeof(ctypes.c_void_p) * count),
        num_rows,
        num_tokens,
        hidden_size,
        total.data_ptr(),
    )
    return total


def add_answers_in_torch(answers: Sequence[Answer], num_tokens: int, hidden_size: int) -> Tensor:
    """The same sums, bit for bit."""
    total = torch.empty(num_tokens, hidden_size, dtype=torch.float32)
    for start in range(0, num_tokens, ROWS_ADDED_AT_ONCE):
        end = min(start + ROWS_ADDED_AT_ONCE, num_tokens)
        part = total[start:end].zero_()
        for rows, row_ids in answers:
            if row_ids is None:
                part.add_(rows[start:end])
                continue
            first, last = np.searchsorted(row_ids, (start, end)).tolist()
            if first < last:
                part.index_add_(0, torch.from_numpy(row_ids[first:last] - start), rows[first:last].float())
    return total
