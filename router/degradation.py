"""Answering without the experts that nobody serves now: opt-in, bounded, and always told. Pure.

A row keeps the experts that can be asked; their weights are raised so that they add up to what all of them did. That is
another model, so it is off by default, at most so many experts of a row are left out, and whoever reads the answer is
told how many were (GenerateResponse.num_left_out).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from router.dispatch_plan import compute_turns


class LeftOut(NamedTuple):
    """What is left to ask for. topk_ids: -1 where an expert is left out. topk_weights: of the others, renormalised.
    num_left_out: [num_tokens] int32."""

    topk_ids: npt.NDArray[np.int64]
    topk_weights: npt.NDArray[np.float32]
    num_left_out: npt.NDArray[np.int32]


def leave_out(
    topk_ids: npt.NDArray[np.int64],
    topk_weights: npt.NDArray[np.float32],
    expert_groups: npt.NDArray[np.int64],
    absent_groups: frozenset[int],
    most: int,
) -> LeftOut | None:
    """Do without the experts whose turn falls on a group that is absent.

    topk_ids, topk_weights, expert_groups: see plan_frames. None if nothing is to be left out, or some row would lose
    more than most experts or all it has: then its frame has to wait, and the other rows get theirs by waiting with it.
    """
    if not topk_ids.size:
        return None
    turns = compute_turns(topk_weights, len(expert_groups))
    groups = expert_groups[0, topk_ids] if turns is None else expert_groups[turns[:, None], topk_ids]
    is_chosen = topk_ids >= 0
    is_gone = is_chosen & np.isin(groups, list(absent_groups))
    num_left_out = is_gone.sum(axis=1, dtype=np.int32)
    is_reduced = num_left_out > 0
    loses_all = is_reduced & (num_left_out == is_chosen.sum(axis=1))
    if not is_reduced.any() or (num_left_out > most).any() or loses_all.any():
        return None
    weights = topk_weights.copy()
    chosen = np.where(is_chosen, topk_weights, np.float32(0))[is_reduced]
    kept = np.where(is_gone[is_reduced], np.float32(0), chosen)
    weights[is_reduced] = kept * (chosen.sum(axis=1, keepdims=True) / kept.sum(axis=1, keepdims=True))
    return LeftOut(np.where(is_gone, -1, topk_ids), weights, num_left_out)
