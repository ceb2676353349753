"""How long replicas take for frames, as the router sees it: what to expect of each, and when a reply is late.

Frames are told apart by size class, the number of bits of their (row, expert) pairs: within one the work differs by two
at most. No clock in here: times are handed in, in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

# Weight of the newest time in a replica's running mean.
_NEWEST_SHARE = 0.2
# Frames of a size that are not counted: the first ones find cold caches.
_NUM_FIRST = 2

# Of the histogram of a group's times: buckets from 10 us, four to an octave, so a quantile is at most 19 % too long.
_LEAST_S = 1e-5
_BUCKETS_PER_OCTAVE = 4
_NUM_BUCKETS = 96
# Counts are halved when they reach this, so that what was thousands of frames ago counts for little.
_MAX_COUNT = 1024
# Below it, a 99th percentile means nothing.
_LEAST_COUNT = 64
_LOOK_EVERY = 16
_LATE_SHARE = 0.01


def get_size_class(num_pairs: int) -> int:
    return num_pairs.bit_length()


class ServiceTimes:
    """Of one replica: a decaying mean for each size class."""

    def __init__(self) -> None:
        self._means_s: dict[int, float] = {}
        self._num_first: dict[int, int] = {}
        self._newest_class = 0

    def record(self, size_class: int, service_s: float) -> None:
        """service_s: from when the replica could begin with a frame until its reply was here."""
        self._newest_class = size_class
        mean_s = self._means_s.get(size_class)
        if mean_s is not None:
            self._means_s[size_class] = mean_s + _NEWEST_SHARE * (service_s - mean_s)
            return
        num_first = self._num_first.get(size_class, 0) + 1
        self._num_first[size_class] = num_first
        if num_first > _NUM_FIRST:
            self._means_s[size_class] = service_s

    def expect_s(self, size_class: int) -> float | None:
        """None before there were some frames. An unknown size is judged by the nearest known one, in proportion."""
        mean_s = self._means_s.get(size_class)
        if mean_s is not None or not self._means_s:
            return mean_s
        nearest = min(self._means_s, key=lambda known: abs(known - size_class))
        return self._means_s[nearest] * 2.0 ** (size_class - nearest)

    @property
    def newest_s(self) -> float:
        """For a frame of the size that was recorded last; 0 if there were too few."""
        return self._means_s.get(self._newest_class, 0.0)

    @property
    def means_s(self) -> Mapping[int, float]:
        """By size class."""
        return self._means_s


class LatePoint:
    """Of one group and size class: the time that one reply in a hundred exceeds, recent ones counting most."""

    def __init__(self) -> None:
        self._counts = [0.0] * _NUM_BUCKETS
        self._total = 0.0
        self._num_until_look = _LOOK_EVERY
        self._late_s: float | None = None

    def record(self, reply_s: float) -> None:
        octaves = math.log2(reply_s / _LEAST_S) if reply_s > _LEAST_S else 0.0
        self._counts[min(_NUM_BUCKETS - 1, int(octaves * _BUCKETS_PER_OCTAVE))] += 1
        self._total += 1
        self._num_until_look -= 1
        if self._num_until_look <= 0:
            self._look()

    @property
    def late_s(self) -> float | None:
        """None as long as there were too few replies to tell."""
        return self._late_s

    def _look(self) -> None:
        self._num_until_look = _LOOK_EVERY
        if self._total >= _MAX_COUNT:
            self._counts = [count / 2 for count in self._counts]
            self._total /= 2
        if self._total < _LEAST_COUNT:
            return
        above = self._total * _LATE_SHARE
        for bucket in range(_NUM_BUCKETS - 1, -1, -1):
            above -= self._counts[bucket]
            if above < 0:
                self._late_s = _LEAST_S * 2.0 ** ((bucket + 1) / _BUCKETS_PER_OCTAVE)
                return
