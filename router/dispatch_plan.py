"""Which rows go to which expert group: a pure function of the gate's choice and the expert table.

Worked example: 3 rows, top-2 of 4 experts, experts 0-1 in group 0 and 2-3 in group 1.

    topk_ids [[1, 0], [3, 2], [0, 3]]  ->  group 0: row_ids [0, 2], pairs (0, e0) (0, e1) (1, e0)
                                           group 1: row_ids [1, 2], pairs (0, e2) (0, e3) (1, e3)

Row 0 travels once to group 0 although two of its experts live there; group 1 never sees it. A group that no row
chose gets no frame at all.

An expert that several groups host is asked of them in turns, and whose turn it is follows from the row's own weights:
so rows spread evenly, yet a row is computed in one way whatever else is in the batch, however often it is repeated.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# Up to so many pairs a plan in plain Python takes less time than numpy's calls.
_FEW_PAIRS = 32
# The multipliers with which MurmurHash3 ends (fmix32): every bit of 32 comes to depend on every other.
_MIXERS = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)


class GroupFrame(NamedTuple):
    """The part of one layer's batch that one group computes.

    row_ids: [num_rows] int64, rows of the batch, ascending and distinct.
    pair_rows: [num_pairs] int32, positions in row_ids; pairs are sorted by row, then expert.
    pair_experts: [num_pairs] int32.  pair_weights: [num_pairs] float32.
    pair_slots: [num_pairs] int64, row * num_experts_per_tok + rank of the expert among the row's, ascending by id.
    """

    group_index: int
    row_ids: npt.NDArray[np.int64]
    pair_rows: npt.NDArray[np.int32]
    pair_experts: npt.NDArray[np.int32]
    pair_weights: npt.NDArray[np.float32]
    pair_slots: npt.NDArray[np.int64]


def plan_frames(
    topk_ids: npt.NDArray[np.int64],
    topk_weights: npt.NDArray[np.float32],
    expert_groups: npt.NDArray[np.int64],
    turns: npt.NDArray[np.int64] | None = None,
) -> list[GroupFrame]:
    """Split a layer's batch into one frame per expert group that any row chose, in the table's group order.

    topk_ids: [num_tokens, num_experts_per_tok] int64; a negative id is no choice and is skipped.
    topk_weights: the same shape, float32.
    expert_groups: [num_turns, n_routed_experts], group index of each expert (ExpertTable.expert_turns).
    turns: [num_tokens], None: compute_turns of the weights.
    Raises LookupError naming the expert if a chosen one is served by no group.
    """
    num_tokens, num_experts_per_tok = topk_ids.shape
    if not topk_ids.size:
        return []
    if turns is None:
        turns = compute_turns(topk_weights, len(expert_groups))
    if topk_ids.size <= _FEW_PAIRS:
        return _plan_few_frames(topk_ids, topk_weights, expert_groups, turns)
    order = np.argsort(topk_ids, axis=1, kind="stable")
    # Into the flattened arrays: take_along_axis takes three times as long on a few rows.
    order += np.arange(0, num_tokens * num_experts_per_tok, num_experts_per_tok)[:, None]
    experts = topk_ids.ravel()[order.ravel()]
    weights = topk_weights.ravel()[order.ravel()]
    served_by = (
        expert_groups[0, experts] if turns is None else expert_groups[turns.repeat(num_experts_per_tok), experts]
    )
    groups = np.where(experts >= 0, served_by, -2)
    unserved = experts[groups == -1]
    if unserved.size:
        raise LookupError(f"expert {int(unserved[0])} is served by no expert group")
    # Everything is computed once for all groups, then cut: small numpy calls are what a plan of a few rows costs.
    slots = np.argsort(groups, kind="stable")  # by group, then row, then expert
    groups = groups[slots]
    rows = slots // num_experts_per_tok
    pair_experts = experts[slots].astype(np.int32)
    pair_weights = weights[slots]
    is_first = np.empty(slots.size, dtype=bool)  # of its row in its group
    is_first[0] = True
    is_first[1:] = (rows[1:] != rows[:-1]) | (groups[1:] != groups[:-1])
    row_ids = rows[is_first]
    pair_rows = np.cumsum(is_first, dtype=np.int32) - np.int32(1)
    starts = np.flatnonzero(np.diff(groups, prepend=-3)).tolist()
    frames: list[GroupFrame] = []
    for start, end in zip(starts, [*starts[1:], slots.size], strict=True):
        if groups[start] < 0:
            continue
        first_row, last_row = int(pair_rows[start]), int(pair_rows[end - 1])
        frames.append(
            GroupFrame(
                group_index=int(groups[start]),
                row_ids=row_ids[first_row : last_row + 1],
                pair_rows=pair_rows[start:end] - np.int32(first_row),
                pair_experts=pair_experts[start:end],
                pair_weights=pair_weights[start:end],
                pair_slots=slots[start:end],
            )
        )
    return frames


def compute_turns(topk_weights: npt.NDArray[np.float32], num_turns: int) -> npt.NDArray[np.int64] | None:
    """[num_tokens]: which turn each row takes, by a hash of its weights; None where there is only one.

    Each weight is mixed before they are added up: a gate makes its weights add up to the same number for every row, and
    mostly the sum of their bits as well. num_turns: a power of two. scatter.h computes the same.
    """
    if num_turns == 1:
        return None
    bits = np.ascontiguousarray(topk_weights).view(np.uint32)
    bits = (bits ^ bits >> np.uint32(16)) * _MIXERS[0]
    bits = (bits ^ bits >> np.uint32(13)) * _MIXERS[1]
    return (bits.sum(axis=1, dtype=np.uint32) >> np.uint32(33 - num_turns.bit_length())).astype(np.int64)


def _plan_few_frames(
    topk_ids: npt.NDArray[np.int64],
    topk_weights: npt.NDArray[np.float32],
    expert_groups: npt.NDArray[np.int64],
    turns: npt.NDArray[np.int64] | None,
) -> list[GroupFrame]:
    """plan_frames() for a few pairs."""
    num_experts_per_tok = topk_ids.shape[1]
    # By group: row_ids, pair_rows, pair_experts, slots in the order of topk_ids, slots in ascending order.
    plans: dict[int, tuple[list[int], list[int], list[int], list[int], list[int]]] = {}
    slot = 0
    for row, ids in enumerate(topk_ids.tolist()):
        served_by = expert_groups[0 if turns is None else turns.item(row)]
        for rank, choice in enumerate(sorted(range(num_experts_per_tok), key=ids.__getitem__)):
            expert = ids[choice]
            if expert >= 0:
                group = served_by.item(expert)
                if group < 0:
                    raise LookupError(f"expert {expert} is served by no expert group")
                plan = plans.get(group)
                if plan is None:
                    plan = plans[group] = ([], [], [], [], [])
                row_ids, pair_rows, pair_experts, sources, slots = plan
                if not row_ids or row_ids[-1] != row:
                    row_ids.append(row)
                pair_rows.append(len(row_ids) - 1)
                pair_experts.append(expert)
                sources.append(slot + choice)
                slots.append(slot + rank)
        slot += num_experts_per_tok
    weights = topk_weights.ravel()
    return [
        GroupFrame(
            group_index=group,
            row_ids=np.array(row_ids, dtype=np.int64),
            pair_rows=np.array(pair_rows, dtype=np.int32),
            pair_experts=np.array(pair_experts, dtype=np.int32),
            pair_weights=weights[sources],
            pair_slots=np.array(slots, dtype=np.int64),
        )
        for group, (row_ids, pair_rows, pair_experts, sources, slots) in sorted(plans.items())
    ]


def split_frame(frame: GroupFrame, max_rows: int) -> list[GroupFrame]:
    """Cut a frame into parts of at most max_rows rows, so that each fits in one message. Sums do not change."""
    if len(frame.row_ids) <= max_rows:
        return [frame]
    parts: list[GroupFrame] = []
    for start in range(0, len(frame.row_ids), max_rows):
        stop = min(start + max_rows, len(frame.row_ids))
        first, last = np.searchsorted(frame.pair_rows, [start, stop])
        pairs = slice(int(first), int(last))
        parts.append(
            GroupFrame(
                group_index=frame.group_index,
                row_ids=frame.row_ids[start:stop],
                pair_rows=frame.pair_rows[pairs] - np.int32(start),
                pair_experts=frame.pair_experts[pairs],
                pair_weights=frame.pair_weights[pairs],
                pair_slots=frame.pair_slots[pairs],
            )
        )
    return parts
