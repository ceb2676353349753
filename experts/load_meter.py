"""How busy one expert replica is, and which of its experts are asked for: counters over a sliding window.

The autoscaler needs busy share and queue delay, the rebalancer rows per (layer, expert). Both come from here and not
from the routers, since only the replica sees the work of all routers. It knows no clock: times are handed in.

A frame costs one note_frame call, a few microseconds; a snapshot copies the counts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from experts.model_config import ModelConfig
from experts.v1 import experts_pb2

# Long enough to be steady, short enough to follow a step of the load within seconds.
WINDOW_S = 10.0
_NUM_SLOTS = 20
# Expert popularity follows the topics of the requests, so it is counted over minutes.
COUNT_WINDOW_S = 600.0
SLOT_S = WINDOW_S / _NUM_SLOTS


@dataclass(frozen=True, slots=True)
class LoadSnapshot:
    """window_s: what the figures cover, shorter after a start. busy_share: of that time, from 0 to 1.
    queue_ms, max_queue_ms: delay between arrival and computing, mean and longest; 0 without frames.
    num_pairs: (row, expert) pairs computed. pairs: [num_layers, n_routed_experts] int64 over count_window_s."""

    window_s: float
    busy_share: float
    queue_ms: float
    max_queue_ms: float
    num_frames: int
    num_pairs: int
    count_window_s: float
    pairs: npt.NDArray[np.int64]


@dataclass(slots=True)
class LoadSlot:
    """Sums over one part of the window; index is the part's number since time 0."""

    index: int
    busy_s: float = 0.0
    queue_s: float = 0.0
    max_queue_s: float = 0.0
    num_frames: int = 0
    num_pairs: int = 0


class LoadSums(NamedTuple):
    """Counted elsewhere since it was last asked for. pairs: int64 [layer id, expert id], as far as they go."""

    slots: Sequence[LoadSlot]
    pairs: npt.NDArray[np.int64]


class LoadMeter:
    """Thread-safe. Times are seconds of one monotonic clock."""

    def __init__(self, layer_ids: Sequence[int], n_routed_experts: int, now_s: float) -> None:
        """layer_ids: the layers that are counted, in the order of the rows of `pairs`."""
        self.layer_ids = tuple(layer_ids)
        self._rows = {layer_id: row for row, layer_id in enumerate(self.layer_ids)}
        self._lock = threading.Lock()
        self._started_s = now_s
        self._slots: list[LoadSlot] = []
        self._busy_until_s = now_s
        # Counts of the current half of the count window and of the half before.
        self._pairs = np.zeros((len(self.layer_ids), n_routed_experts), dtype=np.int64)
        self._earlier_pairs = np.zeros_like(self._pairs)
        self._half_started_s = now_s
        self._earlier_half_s = 0.0
        self._sources: list[Callable[[], LoadSums]] = []

    def add_source(self, take_sums: Callable[[], LoadSums]) -> None:
        """take_sums is called for every snapshot, from any thread."""
        self._sources.append(take_sums)

    def note_frame(
        self,
        layer_id: int,
        pair_experts: npt.NDArray[np.int32],
        *,
        received_s: float,
        started_s: float,
        ended_s: float,
    ) -> None:
        """A frame has been computed. Frames that were joined into one call have its times, and count once as busy.

        pair_experts: [num_pairs] int32 expert ids, within n_routed_experts.
        """
        queue_s = max(0.0, started_s - received_s)
        with self._lock:
            slot = self._get_slot(ended_s)
            slot.busy_s += max(0.0, ended_s - max(started_s, self._busy_until_s))
            self._busy_until_s = max(self._busy_until_s, ended_s)
            slot.queue_s += queue_s
            slot.max_queue_s = max(slot.max_queue_s, queue_s)
            slot.num_frames += 1
            slot.num_pairs += len(pair_experts)
            row = self._rows.get(layer_id)
            if row is not None:
                self._turn_half(ended_s)
                self._pairs[row] += np.bincount(pair_experts, minlength=self._pairs.shape[1])

    def take_snapshot(self, now_s: float) -> LoadSnapshot:
        with self._lock:
            self._turn_half(now_s)
            for take_sums in self._sources:
                self._add_sums(take_sums())
            oldest = int(now_s / SLOT_S) - _NUM_SLOTS + 1
            slots = [slot for slot in self._slots if slot.index >= oldest]
            window_s = min(now_s - oldest * SLOT_S, now_s - self._started_s)
            num_frames = sum(slot.num_frames for slot in slots)
            return LoadSnapshot(
                window_s=window_s,
                busy_share=min(1.0, sum(slot.busy_s for slot in slots) / window_s) if window_s > 0 else 0.0,
                queue_ms=1e3 * sum(slot.queue_s for slot in slots) / num_frames if num_frames else 0.0,
                max_queue_ms=1e3 * max((slot.max_queue_s for slot in slots), default=0.0),
                num_frames=num_frames,
                num_pairs=sum(slot.num_pairs for slot in slots),
                count_window_s=now_s - self._half_started_s + self._earlier_half_s,
                pairs=self._pairs + self._earlier_pairs,
            )

    def _add_sums(self, sums: LoadSums) -> None:
        slots = {slot.index: slot for slot in self._slots}
        for found in sums.slots:
            slot = slots.setdefault(found.index, LoadSlot(found.index))
            slot.busy_s += found.busy_s
            slot.queue_s += found.queue_s
            slot.max_queue_s = max(slot.max_queue_s, found.max_queue_s)
            slot.num_frames += found.num_frames
            slot.num_pairs += found.num_pairs
        self._slots = [slots[index] for index in sorted(slots)][-_NUM_SLOTS:]
        for layer_id, row in self._rows.items():
            if layer_id < sums.pairs.shape[0]:
                self._pairs[row, : sums.pairs.shape[1]] += sums.pairs[layer_id]

    def _get_slot(self, now_s: float) -> LoadSlot:
        """The slot of this moment; an older moment than the last one's belongs to the last."""
        index = int(now_s / SLOT_S)
        if not self._slots or index > self._slots[-1].index:
            self._slots.append(LoadSlot(index))
            del self._slots[:-_NUM_SLOTS]
        return self._slots[-1]

    def _turn_half(self, now_s: float) -> None:
        """Half the count window is over: what is older than that half is forgotten."""
        elapsed_s = now_s - self._half_started_s
        if elapsed_s < COUNT_WINDOW_S / 2:
            return
        is_recent = elapsed_s < COUNT_WINDOW_S
        self._earlier_pairs = self._pairs if is_recent else np.zeros_like(self._pairs)
        self._earlier_half_s = elapsed_s if is_recent else 0.0
        self._pairs = np.zeros_like(self._pairs)
        self._half_started_s = now_s


def make_load_meter(config: ModelConfig, now_s: float) -> LoadMeter:
    """A meter for whatever a replica of the model may host while it lives."""
    return LoadMeter(config.moe_layer_ids, config.n_routed_experts, now_s)


def load_to_proto(meter: LoadMeter, incarnation: int, now_s: float, with_pairs: bool) -> experts_pb2.LoadResponse:
    snapshot = meter.take_snapshot(now_s)
    response = experts_pb2.LoadResponse(
        incarnation=incarnation,
        window_s=snapshot.window_s,
        busy_share=snapshot.busy_share,
        queue_ms=snapshot.queue_ms,
        max_queue_ms=snapshot.max_queue_ms,
        num_frames=snapshot.num_frames,
        num_pairs=snapshot.num_pairs,
        count_window_s=snapshot.count_window_s,
    )
    if with_pairs:
        for layer_id, pairs in zip(meter.layer_ids, snapshot.pairs, strict=True):
            if pairs.any():
                response.layers.add(layer_id=layer_id, pairs=pairs.tolist())
    return response
