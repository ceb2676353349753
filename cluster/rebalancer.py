"""Where each expert should be hosted, given how often it is asked for. Pure; numpy only.

The idea is that of DeepSeek's EPLB: an expert that is asked for too often is hosted by more than one group, and experts
are packed so that groups finish together. What is different here: groups are of unequal speed and memory, and there is
a placement already, so the new one is found by single steps from it, each worth the bytes that it moves.

Words: a *copy* is one expert of one layer on one group. An expert with several copies is asked of each of them equally
often (ExpertTable.expert_groups), so a copy carries load / number of copies. The *imbalance* of a layer is the load of
its most loaded group over the mean, each divided by the group's speed: a layer takes as long as its last group.

Worked example, one layer, two equal groups, loads [6, 1, 1, 0], experts 0-1 on group 0 and 2-3 on group 1:
    group loads 7 and 1, mean 4, imbalance 1.75
    copy expert 0 to group 1: expert 0 carries 3 on each, group loads 4 and 4, imbalance 1.0, one copy moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cluster.layer_placement import BoolArray, FloatArray, LayerPlacement

# A layer below this imbalance is left alone: weights are not moved for a few per cent.
LEAVE_ALONE = 1.10
# And one above it is brought down to this, so that the next drift does not start it again.
TARGET = 1.05
# How often layers are gone over: what one leaves of memory may serve another.
MAX_PASSES = 3


class GroupCapacity(NamedTuple):
    """speed: (row, expert) pairs per second, in any unit common to all groups. max_copies: that its memory holds."""

    name: str
    speed: float
    max_copies: int


@dataclass(frozen=True, slots=True)
class Balance:
    """imbalance: mean over the layers, weighted by their load: what a step of the engine waits for.
    max_over_mean: of the groups' loads over all layers. copies: in all."""

    imbalance: float
    max_over_mean: float
    copies: int


@dataclass(frozen=True, slots=True)
class Rebalancing:
    """placement: [num_groups, num_layers, n_routed_experts], True where hosted. loaded, released: copies."""

    placement: BoolArray
    before: Balance
    after: Balance
    loaded: int
    released: int


def rebalance(
    load: npt.NDArray[np.int64],
    groups: Sequence[GroupCapacity],
    placement: BoolArray,
    *,
    n_group: int,
    extra_share: float,
) -> Rebalancing:
    """Improve a placement for a load.

    load: [num_layers, n_routed_experts] rows per expert over a window. placement: [num_groups, num_layers,
    n_routed_experts], every expert hosted at least once. extra_share: copies beyond one per expert, as part of the
    number of experts, e.g. 0.12; what is there already counts. n_group: gate groups, equal runs of expert ids.
    Raises ValueError if shapes contradict each other, an expert is hosted nowhere, or a speed is not positive.
    """
    _check(load, groups, placement, n_group)
    num_layers, num_experts = load.shape
    speeds = np.array([group.speed for group in groups], dtype=np.float64)
    rooms = np.array([group.max_copies for group in groups]) - placement.sum(axis=(1, 2))
    extra_left = int(extra_share * load.size) - (int(placement.sum()) - load.size)
    result = placement.copy()
    layers = {
        index: LayerPlacement(load[index].astype(np.float64), result[:, index], speeds, rooms, n_group)
        for index in range(num_layers)
        if load[index].any()
    }
    uneven = {index: layer for index, layer in layers.items() if layer.compute_imbalance() > LEAVE_ALONE}
    extra_left += sum(layer.drop_needless() for layer in uneven.values())
    for _ in range(MAX_PASSES):
        # The worst layers first: they have the first call on memory.
        order = sorted(uneven, key=lambda index: (-_compute_excess(load[index], result[:, index], speeds), index))
        for position, index in enumerate(order):
            # An equal part for each layer still to come, and what the others left.
            budget = max(0, -(-extra_left // (len(order) - position)))
            most = max(budget, min(extra_left, int(extra_share * num_experts)))
            extra_left -= uneven[index].improve(TARGET, max_extra=most)
            extra_left += uneven[index].undo_needless(TARGET)
        uneven = {index: uneven[index] for index in order if uneven[index].compute_imbalance() > TARGET}
        if not uneven:
            break
    before, after = (compute_balance(load, speeds, each) for each in (placement, result))
    if after.imbalance >= before.imbalance:
        # What was released as needless was not, in so little memory.
        result, after = placement.copy(), before
    return Rebalancing(
        placement=result,
        before=before,
        after=after,
        loaded=int((result & ~placement).sum()),
        released=int((placement & ~result).sum()),
    )


def plan_round(current: BoolArray, target: BoolArray, max_copies: Sequence[int]) -> BoolArray | None:
    """The next placement on the way to target, shaped like both, so that no group ever holds more than its most copies
    while new ones are loaded beside old ones; None once it is reached.

    A group whose memory is full still gets one copy beside what it has. An expert is only released where a group that
    shall keep it has it.
    """
    if (current == target).all():
        return None
    result = current.copy()
    for group, most in enumerate(max_copies):
        arriving = np.flatnonzero(target[group] & ~current[group])
        room = max(1, most - int(current[group].sum()))
        result[group].reshape(-1)[arriving[:room]] = True
    has_lasting_host = (result & target).any(axis=0)  # [num_layers, n_routed_experts]
    return result & (target | ~has_lasting_host)


def compute_balance(load: npt.NDArray[np.int64], speeds: FloatArray, placement: BoolArray) -> Balance:
    """How even a placement is under a load; see rebalance for the shapes. 1.0 everywhere without any load."""
    shares = load / np.maximum(1, placement.sum(axis=0))  # [num_layers, n_routed_experts]
    times = np.einsum("gle,le->gl", placement, shares) / speeds[:, None]  # [num_groups, num_layers]
    ideal = load.sum(axis=1) / speeds.sum()  # [num_layers]
    if not ideal.sum() > 0:
        return Balance(1.0, 1.0, int(placement.sum()))
    return Balance(
        imbalance=float(times.max(axis=0).sum() / ideal.sum()),
        max_over_mean=float(times.sum(axis=1).max() / ideal.sum()),
        copies=int(placement.sum()),
    )


def _compute_excess(load: npt.NDArray[np.int64], hosted: BoolArray, speeds: FloatArray) -> float:
    """Time of the slowest group above the mean: what evening out this layer can save."""
    times = (hosted @ (load / np.maximum(1, hosted.sum(axis=0)))) / speeds
    return float(times.max() - load.sum() / speeds.sum())


def _check(load: npt.NDArray[np.int64], groups: Sequence[GroupCapacity], placement: BoolArray, n_group: int) -> None:
    if load.ndim != 2 or placement.shape != (len(groups), *load.shape):
        raise ValueError(f"load {load.shape} and placement {placement.shape} do not belong to {len(groups)} groups")
    if not 1 <= n_group <= load.shape[1]:
        raise ValueError(f"n_group is {n_group}, with {load.shape[1]} experts")
    if (load < 0).any():
        raise ValueError("a load is negative")
    if not all(group.speed > 0 for group in groups):
        raise ValueError("the speed of every group must be positive")
    absent = np.argwhere(~placement.any(axis=0))
    if len(absent):
        raise ValueError(f"layer {absent[0][0]}, expert {absent[0][1]} is hosted by no group")
