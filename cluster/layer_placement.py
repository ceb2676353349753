"""The experts of one layer on groups, improved step by step; see cluster/rebalancer.py for words and purpose. Pure.

A step takes load away from the group that is finished last. It moves one of its experts, copies it, or releases a copy
of it that others have, too. Where memory is full, or no expert is of the right size, two experts change at once: one
goes to a group that hands another one on, to the first group (a swap) or to a third. Every step lowers
sum(load^2 / speed), which is least where all groups finish together, so the search ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# How much less a step is worth that spreads a gate group over one more expert group: tokens choose whole gate groups
# (n_group, topk_group), so each such step may cost a frame.
LOCALITY_DISCOUNT = 0.25

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


class Copy(NamedTuple):
    expert: int
    group: int


class Step(NamedTuple):
    """Copies that appear and disappear together. worth: how much it lowers sum(load^2 / speed), discounted, for each
    copy that has to be loaded."""

    worth: float
    loaded: tuple[Copy, ...]
    released: tuple[Copy, ...]

    @property
    def num_extra(self) -> int:
        return len(self.loaded) - len(self.released)


class LayerPlacement:
    """hosted [num_groups, n_routed_experts] and rooms [num_groups], copies for which a group still has memory, are
    changed in place: they are views of the whole placement."""

    def __init__(self, load: FloatArray, hosted: BoolArray, speeds: FloatArray, rooms: IntArray, n_group: int) -> None:
        self._load = load
        self._hosted = hosted
        self._before = hosted.copy()
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
                self._release(Copy(int(expert), int(hosts[times.argmax()])))
                dropped += 1
        return dropped

    def improve(self, target: float, max_extra: int) -> int:
        """Take the best step again and again until the imbalance is at most target. Returns the extra copies spent,
        fewer than none if some were released."""
        spent = 0
        # Each step lowers the sum of squares, so it ends; the bound is for the eye.
        for _ in range(4 * len(self._load)):
            if self.compute_imbalance() <= target:
                break
            step = self._find_step(may_copy=spent < max_extra)
            if step is None:
                break
            for copy in step.loaded:
                self._host(copy)
            for copy in step.released:
                self._release(copy)
            spent += step.num_extra
        return spent

    def undo_needless(self, target: float) -> int:
        """Take back what was loaded and is not needed, the least loaded first: the imbalance stays at most target, or
        as it is. Returns how many extra copies that gives back."""
        saved = 0
        loaded = [Copy(int(expert), int(group)) for group, expert in np.argwhere(self._hosted & ~self._before)]
        for copy in sorted(loaded, key=lambda copy: (self._load[copy.expert], copy)):
            limit = max(target, self.compute_imbalance())
            left = np.nonzero(self._before[:, copy.expert] & ~self._hosted[:, copy.expert] & (self._rooms > 0))[0]
            back = Copy(copy.expert, int(left[0])) if len(left) else None
            if back is None and self._hosted[:, copy.expert].sum() == 1:
                continue
            self._release(copy)
            if back is not None:
                self._host(back)
            if self.compute_imbalance() <= limit:
                saved += back is None
                continue
            if back is not None:
                self._release(back)
            self._host(copy)
        return saved

    def _find_step(self, may_copy: bool) -> Step | None:
        """The step of most worth, from the group that is finished last, or the last but one, and so on; None if none
        lowers the sum. Two experts at once only where one alone gains nothing: that loads twice as much, and there are
        many such steps to try."""
        loads = self._compute_loads()
        order = np.argsort(-loads / self._speeds, kind="stable")
        for source in map(int, order[loads[order] > 0]):
            kinds = [_Relief.by_move(self, source)]
            if may_copy:
                kinds.append(_Relief.by_copy(self, source))
            for list_steps in (self._list_single_steps, self._list_exchanges):
                best = max(list_steps(loads, source, kinds), key=lambda step: step.worth, default=None)
                if best is not None and best.worth > 1e-9 * self._ideal**2:
                    return best
        return None

    def _list_single_steps(self, loads: FloatArray, source: int, kinds: list[_Relief]) -> Iterator[Step]:
        """The best of each kind."""
        for kind in kinds:
            worth = -self._compute_change(loads, kind.shift) * self._discount(kind.experts).T  # [C, num_groups]
            worth[kind.is_hosted | (self._rooms <= 0)] = 0.0
            index, group = np.unravel_index(int(worth.argmax()), worth.shape)
            expert = int(kind.experts[index])
            released = (Copy(expert, source),) if kind.is_move else ()
            yield Step(float(worth[index, group]), (Copy(expert, int(group)),), released)
        experts = np.nonzero(self._hosted[source] & (self._hosted.sum(axis=0) > 1))[0]
        if len(experts):
            hosts = self._hosted[:, experts].T  # [C, num_groups]
            num_copies = hosts.sum(axis=1)
            shift = hosts * (self._load[experts] / (num_copies - 1) - self._load[experts] / num_copies)[:, None]
            shift[:, source] = -self._load[experts] / num_copies
            worth = -self._compute_change(loads, shift)
            index = int(worth.argmax())
            yield Step(float(worth[index]), (), (Copy(int(experts[index]), source),))

    def _list_exchanges(self, loads: FloatArray, source: int, kinds: list[_Relief]) -> Iterator[Step]:
        """The best of each kind for each group that an expert may go to, which hands on another one."""
        num_copies = self._hosted.sum(axis=0)
        for kind in kinds:
            changes = self._compute_change(loads, kind.shift)  # [C, num_groups]
            has_room = self._rooms > 0
            if kind.is_move:
                has_room[source] = True
            for group in range(len(self._speeds)):
                others = np.nonzero(self._hosted[group])[0]
                if group == source or kind.is_hosted[:, group].all() or not len(others):
                    continue
                share = self._load[others] / num_copies[others]  # [F]
                leaves = (share**2 - 2 * loads[group] * share) / self._speeds[group]  # [F]
                arrives = (2 * loads * share[:, None] + share[:, None] ** 2) / self._speeds  # [F, num_groups]
                # What both at once change beyond each by itself.
                shift = kind.shift[:, group] / self._speeds  # [C, num_groups]
                cross = 2 * share[:, None] * (shift[:, None] - shift[:, None, group, None])  # [C, F, num_groups]
                change = changes[:, group, None, None] + leaves[:, None] + arrives + cross
                discount = self._discount(kind.experts)[group][:, None, None] * self._discount(others).T
                worth = -change * discount / 2
                worth[kind.is_hosted[:, group]] = 0.0
                worth[:, self._hosted[:, others].T | ~has_room] = 0.0
                index, other, refuge = np.unravel_index(int(worth.argmax()), worth.shape)
                expert, handed_on = int(kind.experts[index]), int(others[other])
                loaded = Copy(expert, group), Copy(handed_on, int(refuge))
                released = (Copy(handed_on, group), *((Copy(expert, source),) if kind.is_move else ()))
                yield Step(float(worth[index, other, refuge]), loaded, released)

    def _compute_change(self, loads: FloatArray, shift: FloatArray) -> FloatArray:
        """Of sum(load^2 / speed), when loads change by shift [..., num_groups]."""
        return ((2 * loads * shift + shift**2) / self._speeds).sum(axis=-1)

    def _discount(self, experts: IntArray) -> FloatArray:
        """[num_groups, len(experts)]: less than 1 where the group hosts no expert of that gate group yet."""
        num_gate_groups = int(self._gate_groups[-1]) + 1
        present = np.zeros((len(self._speeds), num_gate_groups), dtype=bool)
        for gate_group in range(num_gate_groups):
            present[:, gate_group] = self._hosted[:, self._gate_groups == gate_group].any(axis=1)
        return np.where(present[:, self._gate_groups[experts]], 1.0, 1 - LOCALITY_DISCOUNT)

    def _compute_loads(self) -> FloatArray:
        """[num_groups]"""
        return self._hosted @ (self._load / np.maximum(1, self._hosted.sum(axis=0)))

    def _host(self, copy: Copy) -> None:
        self._hosted[copy.group, copy.expert] = True
        self._rooms[copy.group] -= 1

    def _release(self, copy: Copy) -> None:
        self._hosted[copy.group, copy.expert] = False
        self._rooms[copy.group] += 1


class _Relief(NamedTuple):
    """Ways to take load off a group. experts: [C], those that it hosts. is_hosted: [C, num_groups]. shift: [C,
    num_groups, num_groups], what happens to the load of each group (last) when the expert goes to a group."""

    is_move: bool
    experts: IntArray
    is_hosted: BoolArray
    shift: FloatArray

    @classmethod
    def by_move(cls, layer: LayerPlacement, source: int) -> _Relief:
        experts, is_hosted, share = cls._read(layer, source)
        num_groups = is_hosted.shape[1]
        shift = np.eye(num_groups) * share[:, None, None]
        shift[:, :, source] -= share[:, None]
        return cls(True, experts, is_hosted, shift)

    @classmethod
    def by_copy(cls, layer: LayerPlacement, source: int) -> _Relief:
        experts, is_hosted, share = cls._read(layer, source)
        num_copies = is_hosted.sum(axis=1)
        reduced = share * num_copies / (num_copies + 1)
        shift = np.eye(is_hosted.shape[1]) * reduced[:, None, None]
        shift -= (is_hosted * (share - reduced)[:, None])[:, None]
        return cls(False, experts, is_hosted, shift)

    @staticmethod
    def _read(layer: LayerPlacement, source: int) -> tuple[IntArray, BoolArray, FloatArray]:
        experts = np.nonzero(layer._hosted[source])[0]
        is_hosted = layer._hosted[:, experts].T
        return experts, is_hosted, layer._load[experts] / is_hosted.sum(axis=1)
