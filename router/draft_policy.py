"""How many tokens to draft: what acceptance and step times say is fastest. Pure: no torch, no clock.

A draft pays if the tokens it adds are worth more than the time it adds, and that time is nothing to be computed
beforehand: a row more touches more experts, each pass of the draft layer is a round to the expert groups. So step times
are measured per number of sequences and depth, and depths that were not tried lately are tried again now and then.
Every choice gives the same tokens; only the speed differs.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

# Chance that a draft holds if those before it do, before anything is known. 0.85 to 0.9 is reported for DeepSeek-V3.
FIRST_RATE = 0.8
# Weight of one verification in a sequence's own rates, and in those of all sequences.
OWN_WEIGHT = 0.1
COMMON_WEIGHT = 0.01
# A depth without drafts forgets: after about a hundred steps it is tried again.
FORGETTING = 0.01
# Step times kept per depth; the median counts, so that one slow step means nothing.
MAX_SAMPLES = 7
MIN_SAMPLES = 3
# Steps until the first look at a depth beside the best one, until any later one at most (each waits twice as long as
# the one before: the first few step times are those of a machine that warms up), and how many steps a look takes.
FIRST_PROBE_AFTER = 16
PROBE_INTERVAL = 256
PROBE_STEPS = 5
# Drafts have to promise so much more tokens per second than none: what step times do not tell (steps that fit two
# numbers of sequences) is paid from it.
WORTH_DRAFTING = 1.02
# Part of what a depth costs that grows with its sequences; the rest is paid by the first of them.
COST_PER_SEQUENCE = 0.5


class Acceptance:
    """rates[j]: the chance that draft j + 1 holds if those before it do."""

    def __init__(self, rates: Sequence[float]) -> None:
        self.rates = list(rates)


@dataclass
class _StepTimes:
    """Of steps with about the same number of sequences. seconds[depth]: the latest ones; medians: of these."""

    seconds: list[deque[float]]
    medians: list[float]
    num_steps: int = 0
    next_probe: int = FIRST_PROBE_AFTER
    probe_interval: int = FIRST_PROBE_AFTER
    last_probed: dict[int, int] = field(default_factory=dict[int, int])
    # What a step without drafts costs for the draft layer, which follows along in a pass now and then.
    following_s: float = 0.0
    num_unfollowed: int = 0

    def note(self, depth: int, seconds: float) -> None:
        self.seconds[depth].append(seconds)
        self.medians[depth] = statistics.median(self.seconds[depth])

    def note_following(self, seconds: float) -> None:
        """A step with such a pass took that long."""
        per_step_s = max(0.0, seconds - self.medians[0]) / (self.num_unfollowed + 1)
        self.following_s = (self.following_s + per_step_s) / 2 if self.following_s else per_step_s
        self.num_unfollowed = 0

    def is_known(self, depth: int) -> bool:
        return len(self.seconds[depth]) >= MIN_SAMPLES

    def median(self, depth: int) -> float:
        return self.medians[depth] + (self.following_s if depth == 0 else 0.0)


class DraftPolicy:
    """Owned by one drafter."""

    def __init__(self, max_depth: int) -> None:
        """max_depth: at least 1."""
        self._max_depth = max_depth
        self._common = Acceptance([FIRST_RATE] * max_depth)
        self._times: dict[int, _StepTimes] = {}
        # (bucket, depth) of the last two choices: a step verifies the drafts of one and makes those of the other.
        self._choices: tuple[tuple[int, int] | None, tuple[int, int] | None] = (None, None)
        self._probe: tuple[int, int] | None = None  # depth, steps left

    def new_acceptance(self) -> Acceptance:
        """For a sequence that begins: what the others' was of late."""
        return Acceptance(self._common.rates)

    def note_verified(self, acceptance: Acceptance, num_drafts: int, num_accepted: int) -> None:
        """Of a sequence's num_drafts drafts, the first num_accepted held."""
        for index in range(min(num_drafts, num_accepted + 1)):  # the rest had a wrong token before it
            held = float(index < num_accepted)
            acceptance.rates[index] += OWN_WEIGHT * (held - acceptance.rates[index])
            self._common.rates[index] += COMMON_WEIGHT * (held - self._common.rates[index])

    def note_step(self, num_sequences: int, seconds: float, followed: bool) -> None:
        """A step took that long in which each of num_sequences sequences, and nothing else, was verified and drafted
        for. followed: none was drafted for, but the draft layer took in the tokens of many steps."""
        before, now = self._choices
        if now is None or before != now or now[0] != _bucket(num_sequences):
            return  # it verified drafts of another depth than it made
        times = self._times[now[0]]
        if now[1] == 0 and followed and times.is_known(0):
            times.note_following(seconds)
            return
        if now[1] == 0:
            times.num_unfollowed += 1
        times.note(now[1], seconds)

    def choose(self, acceptances: Sequence[Acceptance]) -> list[int]:
        """How many drafts to make for each of the sequences that go on; there is at least one."""
        bucket = _bucket(len(acceptances))
        times = self._times.get(bucket)
        if times is None:
            depths = self._max_depth + 1
            times = _StepTimes([deque(maxlen=MAX_SAMPLES) for _ in range(depths)], [0.0] * depths)
            self._times[bucket] = times
        times.num_steps += 1
        tokens = _sum_expected_tokens(acceptances, self._max_depth)
        depth = self._choose_depth(bucket, times, tokens)
        self._choices = (self._choices[1], (bucket, depth))
        least_chances = self._least_chances(times, tokens[depth] / len(acceptances), depth)
        return [self._limit(acceptance, least_chances) for acceptance in acceptances]

    def _choose_depth(self, bucket: int, times: _StepTimes, tokens: Sequence[float]) -> int:
        if self._probe is not None:
            depth, left = self._probe
            self._probe = (depth, left - 1) if left > 1 else None
            return depth
        known = [depth for depth in range(self._max_depth + 1) if times.is_known(depth)]
        if not known and (alike := self._find_alike(bucket)) is not None:
            return _find_best((0, 1), alike, tokens)
        if not known or (len(known) == 1 and self._find_alike(bucket) is None):
            return len(known)
        best = _find_best(known, times, tokens)
        deeper = best + 1
        if best > 0 and deeper <= self._max_depth and not times.is_known(deeper):
            return deeper
        if times.num_steps >= times.next_probe:
            times.probe_interval = min(2 * times.probe_interval, PROBE_INTERVAL)
            times.next_probe = times.num_steps + times.probe_interval
            beside = [depth for depth in (best - 1, best + 1) if 0 <= depth <= self._max_depth]
            oldest = min(beside, key=lambda depth: times.last_probed.get(depth, 0))
            times.last_probed[oldest] = times.num_steps
            self._probe = (oldest, PROBE_STEPS - 1)
            return oldest
        return best

    def _find_alike(self, bucket: int) -> _StepTimes | None:
        """Steps with the nearest number of sequences of which it is known what one draft costs: that it pays there is
        good enough to begin with, as a batch that shrinks passes through many numbers of sequences."""
        known = [other for other, times in self._times.items() if times.is_known(0) and times.is_known(1)]
        return self._times[min(known, key=lambda other: abs(other - bucket))] if known else None

    def _least_chances(self, times: _StepTimes, tokens_per_sequence: float, depth: int) -> list[float]:
        """The chance that a draft at each depth needs to be worth its row: its share of the time a depth takes, in
        tokens that this time would give otherwise."""
        chances: list[float] = []
        for index in range(depth):
            chance = 0.0
            if times.is_known(index) and times.is_known(index + 1) and times.is_known(depth):
                added = (times.median(index + 1) - times.median(index)) / times.median(depth)
                chance = max(0.0, COST_PER_SEQUENCE * tokens_per_sequence * added)
            chances.append(chance)
        return chances

    def _limit(self, acceptance: Acceptance, least_chances: Sequence[float]) -> int:
        depth, chance = 0, 1.0
        for rate, least in zip(acceptance.rates, least_chances, strict=False):
            chance *= rate
            if chance < least:
                break
            depth += 1
        for index in range(depth, self._max_depth):
            acceptance.rates[index] += FORGETTING * (self._common.rates[index] - acceptance.rates[index])
        return depth


def _sum_expected_tokens(acceptances: Sequence[Acceptance], max_depth: int) -> list[float]:
    """Of one step of them all, by depth."""
    tokens = [float(len(acceptances))] + [0.0] * max_depth
    for acceptance in acceptances:
        chance = 1.0
        for index, rate in enumerate(acceptance.rates):
            chance *= rate
            tokens[index + 1] += chance
    return list(itertools.accumulate(tokens))


def _find_best(depths: Sequence[int], times: _StepTimes, tokens: Sequence[float]) -> int:
    """tokens: of a step, by depth."""
    return max(depths, key=lambda depth: tokens[depth] / times.median(depth) * (WORTH_DRAFTING if depth == 0 else 1))


def _bucket(num_sequences: int) -> int:
    """Numbers of sequences whose step times are one: four to a doubling."""
    return round(4 * math.log2(num_sequences))
