"""What goes between a router and each expert group: frames, rows, bytes, how long answers take.

Counted where frames are sent: by the native library for the usual round (experts/kernels/cpu/scatter.h), by the
dispatcher for all others. Both are added up when somebody asks, so that counting costs a round nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

# Bucket i of the latencies holds answers within FIRST_BOUND_US << i, the last one all others: up to 8.4 s.
FIRST_BOUND_US = 64
NUM_BUCKETS = 19
LATENCY_BOUNDS_S: Sequence[float] = tuple((FIRST_BOUND_US << index) / 1e6 for index in range(NUM_BUCKETS - 1))


@dataclass(slots=True)
class GroupTraffic:
    """Since start. num_frames: attempts of any kind, copies included; num_rows, num_pairs: in them. sent_bytes: of
    whole messages; received_bytes: of the answers' tensors. latency_counts: by bucket, answered frames from sending to
    answer; latency_us: their sum."""

    num_frames: int = 0
    num_rows: int = 0
    num_pairs: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    num_retries: int = 0
    num_hedges: int = 0
    latency_us: int = 0
    latency_counts: list[int] = field(default_factory=lambda: [0] * NUM_BUCKETS)

    def count_frame(self, num_rows: int, num_pairs: int, size_bytes: int) -> None:
        self.num_frames += 1
        self.num_rows += num_rows
        self.num_pairs += num_pairs
        self.sent_bytes += size_bytes

    def count_answer(self, size_bytes: int, latency_s: float) -> None:
        latency_us = max(0, int(latency_s * 1e6))
        self.received_bytes += size_bytes
        self.latency_us += latency_us
        self.latency_counts[find_bucket(latency_us)] += 1


def find_bucket(latency_us: int) -> int:
    """Index into latency_counts."""
    return min(NUM_BUCKETS - 1, ((latency_us - 1) // FIRST_BOUND_US).bit_length() if latency_us > 0 else 0)


class NativeTraffic(ctypes.Structure):
    """GroupTraffic of scatter.h."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("num_frames", "num_rows", "num_pairs", "sent_bytes", "received_bytes", "latency_us")
        ),
        ("latency_counts", ctypes.c_int64 * NUM_BUCKETS),
    )


class TrafficBook:
    """The traffic of every group that was ever sent a frame, by name. Owned by the router's event loop."""

    def __init__(self) -> None:
        self._groups: dict[str, GroupTraffic] = {}
        self._collectors: list[Callable[[], None]] = []

    def of(self, group_name: str) -> GroupTraffic:
        """To be counted into."""
        traffic = self._groups.get(group_name)
        if traffic is None:
            traffic = self._groups[group_name] = GroupTraffic()
        return traffic

    def add_collector(self, collect: Callable[[], None]) -> None:
        """collect: adds what was counted elsewhere since it was last called; called before the book is read."""
        self._collectors.append(collect)

    def add_native(self, group_names: Sequence[str], counted: Sequence[NativeTraffic]) -> None:
        """counted: by group."""
        for name, native in zip(group_names, counted, strict=True):
            if native.num_frames == 0 and native.received_bytes == 0:
                continue
            traffic = self.of(name)
            traffic.num_frames += native.num_frames
            traffic.num_rows += native.num_rows
            traffic.num_pairs += native.num_pairs
            traffic.sent_bytes += native.sent_bytes
            traffic.received_bytes += native.received_bytes
            traffic.latency_us += native.latency_us
            for bucket, count in enumerate(native.latency_counts):
                traffic.latency_counts[bucket] += count

    def read(self) -> Mapping[str, GroupTraffic]:
        for collect in self._collectors:
            collect()
        return self._groups
