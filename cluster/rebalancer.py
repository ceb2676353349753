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

# A layer below this imbalance is left alone: weights are not moved for a few per cent.
LEAVE_ALONE = 1.10
# And one above it is brought down to this, so that the next drift does not start it again.
TARGET = 1.05
# How much less a step is worth that spreads a gate group over one more expert group: tokens choose whole gate groups
# (n_group, topk_group), so each such step may cost a frame.
LOCALITY_DISCOUNT = 0.25

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]


class GroupCapacity(NamedTuple):
    """speed: (row, expert) pairs per second, in any unit common to all groups. max_copies: that its memory holds."""

    name: str
    speed: float
    max_copies: int


class Step(NamedTuple):
    """One copy that is loaded by group target; from source it is released (a move) or kept there (another copy)."""

    layer: int
    expert: int
    source: int
    target: int
    is_move: bool


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
    # The worst layers first: they have the first call on memory.
    order = sorted(range(num_layers), key=lambda layer: -_compute_excess(load[layer], placement[:, layer], speeds))
    for position, layer in enumerate(order):
        state = _Layer(load[layer].astype(np.float64), result[:, layer], speeds, rooms, n_group)
        if load[layer].sum() == 0 or state.compute_imbalance() <= LEAVE_ALONE:
            continue
        extra_left += state.drop_needless()
        # An equal part for each layer still to come, and what the others left.
        budget = max(0, -(-extra_left // (num_layers - position)))
        spent = state.improve(max_extra=max(budget, min(extra_left, int(extra_share * num_experts))))
        extra_left -= spent
    return Rebalancing(
        placement=result,
        before=compute_balance(load, speeds, placement),
        after=compute_balance(load, speeds, result),
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


class _Layer:
    """One layer while it is improved. hosted [num_groups, n_routed_experts] and rooms [num_groups] are changed in
    place: they are views of the whole."""

    def __init__(
        self, load: FloatArray, hosted: BoolArray, speeds: FloatArray, rooms: npt.NDArray[np.int64], n_group: int
    ) -> None:
        self._load = load
        self._hosted = hosted
        self._speeds = speeds
        self._rooms = rooms
        self._gate_groups = np.arange(len(load)) * n_group // len(load)
        self._ideal = load.sum() / speeds.sum()

    def compute_imbalance(self) -> float:
        return float((self._compute_loads() / self._speeds).max() / self._ideal)

    def drop_needless(self) -> int:
        """Release copies of experts that are not hot any more, each from its most loaded host. Returns how many."""
        dropped = 0
        hot_above = 2 * self._load.mean()
        for expert in np.nonzero((self._hosted.sum(axis=0) > 1) & (self._load <= hot_above))[0]:
            while self._hosted[:, expert].sum() > 1:
                hosts = np.nonzero(self._hosted[:, expert])[0]
                times = self._compute_loads()[hosts] / self._speeds[hosts]
                self._release(int(hosts[times.argmax()]), int(expert))
                dropped += 1
        return dropped

    def improve(self, max_extra: int) -> int:
        """Take the best step again and again until the layer is even. Returns the extra copies spent."""
        spent = 0
        # Each step lowers the sum of squares, so it ends; the bound is for the eye.
        for _ in range(4 * len(self._load)):
            if self.compute_imbalance() <= TARGET:
                break
            step = self._find_step(may_copy=spent < max_extra)
            if step is None:
                break
            expert, source, target, is_move = step
            self._hosted[target, expert] = True
            self._rooms[target] -= 1
            if is_move:
                self._release(source, expert)
            else:
                spent += 1
        return spent

    def _find_step(self, may_copy: bool) -> tuple[int, int, int, bool] | None:
        """The step away from the most loaded group that lowers sum(load^2 / speed) most: (expert, source, target,
        is_move). None if none lowers it."""
        loads = self._compute_loads()
        source = int((loads / self._speeds).argmax())
        experts = np.nonzero(self._hosted[source])[0]
        num_copies = self._hosted[:, experts].sum(axis=0)
        share = self._load[experts] / num_copies  # [num_candidates]
        # Change of sum(load^2 / speed) when a group gains x: (2 * load * x + x^2) / speed.
        gain = (2 * loads[:, None] * share + share**2) / self._speeds[:, None]  # [num_groups, num_candidates]
        move = gain + (share**2 - 2 * loads[source] * share) / self._speeds[source]
        reduced = self._load[experts] / (num_copies + 1)
        relief = share - reduced  # what every host of it loses to another copy
        hosts = self._hosted[:, experts]
        lost = hosts * (relief**2 - 2 * loads[:, None] * relief) / self._speeds[:, None]
        copy = (2 * loads[:, None] * reduced + reduced**2) / self._speeds[:, None] + lost.sum(axis=0)
        forbidden = hosts | (self._rooms[:, None] <= 0)
        is_apart = ~self._find_siblings(experts)
        best: tuple[float, int, int, bool] | None = None
        for change, is_move in ((move, True), (copy, False)):
            if not is_move and not may_copy:
                continue
            worth = np.where(forbidden, 0.0, change * np.where(is_apart, 1 - LOCALITY_DISCOUNT, 1.0))
            target, candidate = np.unravel_index(int(worth.argmin()), worth.shape)
            value = float(worth[target, candidate])
            if value < -1e-9 * self._ideal**2 and (best is None or value < best[0]):
                best = value, int(experts[candidate]), int(target), is_move
        if best is None:
            return None
        return best[1], source, best[2], best[3]

    def _find_siblings(self, experts: npt.NDArray[np.int64]) -> BoolArray:
        """[num_groups, num_candidates]: whether the group hosts an expert of the candidate's gate group already."""
        num_gate_groups = int(self._gate_groups[-1]) + 1
        present = np.zeros((len(self._speeds), num_gate_groups), dtype=bool)
        for gate_group in range(num_gate_groups):
            present[:, gate_group] = self._hosted[:, self._gate_groups == gate_group].any(axis=1)
        return present[:, self._gate_groups[experts]]

    def _compute_loads(self) -> FloatArray:
        """[num_groups]"""
        return self._hosted @ (self._load / np.maximum(1, self._hosted.sum(axis=0)))

    def _release(self, group: int, expert: int) -> None:
        self._hosted[group, expert] = False
        self._rooms[group] += 1


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
