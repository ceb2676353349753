"""How many replicas each expert group should have for the load it carries. Pure: the clock's reading is handed in.

A group is judged by its own replicas alone, so a hot group grows alone. Two figures decide (see experts/load_meter.py):
- busy share: what part of the time a replica computes. It says how much work there is, and is what a group is sized by:
  n replicas that are busy b of their time would be busy n * b / m of it as m replicas.
- queue delay: how long a frame waits. It says that the work comes in bursts, when the share alone would look fine.

To grow, the load must be too high for grow_after_s without a pause; to shrink, it must be so low for shrink_after_s
that one replica fewer would still be well below the target. The gap between the two and the cool-down after every
change keep a group from swinging.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

# A group shrinks only if the share after it is at most this part of the target.
SHRINK_SHARE = 0.7


@dataclass(frozen=True, slots=True)
class AutoscaleRule:
    """For one group. Shares are of a replica's time, delays are means over its window."""

    min_replicas: int = 1
    max_replicas: int = 4
    target_busy_share: float = 0.6
    target_queue_ms: float = 5.0
    grow_after_s: float = 3.0
    shrink_after_s: float = 30.0
    cooldown_s: float = 10.0


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What one replica said of itself."""

    busy_share: float
    queue_ms: float
    # (row, expert) pairs per second of computing; None if it computed nothing.
    pairs_per_busy_s: float | None
    # Pairs per second of all its time.
    pairs_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class GroupLoad:
    """Of a group's ready replicas: how many reported, mean busy share, mean queue delay."""

    num_reporting: int
    busy_share: float
    queue_ms: float


@dataclass(frozen=True, slots=True)
class GroupMemory:
    """Since when (s) a group has been too busy, or too idle, without a pause, and when it was changed last."""

    busy_since_s: float | None = None
    idle_since_s: float | None = None
    changed_s: float | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """num_replicas: what the group should have now. reason: one line, also when nothing changes."""

    group_name: str
    action: Literal["grow", "shrink", "keep"]
    num_replicas: int
    reason: str
    memory: GroupMemory = field(compare=False)


def compute_group_load(loads: Sequence[ReplicaLoad]) -> GroupLoad | None:
    """None without any report."""
    if not loads:
        return None
    count = len(loads)
    return GroupLoad(
        count, sum(load.busy_share for load in loads) / count, sum(load.queue_ms for load in loads) / count
    )


def find_rule(group_name: str, rules: Sequence[tuple[str, AutoscaleRule]]) -> AutoscaleRule | None:
    """The rule of the first pattern that matches, as in `g*` or `g0`."""
    return next((rule for pattern, rule in rules if fnmatch.fnmatchcase(group_name, pattern)), None)


def decide_all(
    rules: Mapping[str, AutoscaleRule],
    counts: Mapping[str, int],
    settled: Mapping[str, bool],
    loads: Mapping[str, GroupLoad | None],
    memories: Mapping[str, GroupMemory],
    now_s: float,
) -> list[Decision]:
    """One decision per group that has a rule. counts: desired replicas; settled: whether those all serve; loads: None
    where no replica has reported."""
    return [
        decide(name, rule, counts[name], settled[name], loads.get(name), memories.get(name, GroupMemory()), now_s)
        for name, rule in rules.items()
        if name in counts
    ]


def decide(
    name: str,
    rule: AutoscaleRule,
    count: int,
    is_settled: bool,
    load: GroupLoad | None,
    memory: GroupMemory,
    now_s: float,
) -> Decision:
    """count: replicas desired now. load: None if no replica has reported."""

    def keep(reason: str, remembered: GroupMemory) -> Decision:
        return Decision(name, "keep", count, reason, remembered)

    def change(action: Literal["grow", "shrink"], wanted: int, reason: str) -> Decision:
        return Decision(name, action, wanted, reason, GroupMemory(changed_s=now_s))

    if count < rule.min_replicas:
        return change("grow", rule.min_replicas, f"{count} is below the minimum of {rule.min_replicas}")
    if count > rule.max_replicas:
        return change("shrink", rule.max_replicas, f"{count} is above the maximum of {rule.max_replicas}")
    if not is_settled:
        # Half of a change says nothing about the whole of it.
        return keep("an earlier change is under way", GroupMemory(changed_s=memory.changed_s))
    if load is None or load.num_reporting == 0:
        return keep("no replica has reported its load", GroupMemory(changed_s=memory.changed_s))

    figures = f"busy {load.busy_share:.0%} of {rule.target_busy_share:.0%}, queue {load.queue_ms:.1f} of " + (
        f"{rule.target_queue_ms:.1f} ms"
    )
    total_busy = count * load.busy_share
    is_busy = load.busy_share > rule.target_busy_share or load.queue_ms > rule.target_queue_ms
    fewer_share = total_busy / (count - 1) if count > 1 else math.inf
    is_idle = fewer_share <= SHRINK_SHARE * rule.target_busy_share and load.queue_ms <= rule.target_queue_ms / 2
    busy_since_s = (memory.busy_since_s if memory.busy_since_s is not None else now_s) if is_busy else None
    idle_since_s = (memory.idle_since_s if memory.idle_since_s is not None else now_s) if is_idle else None
    remembered = GroupMemory(busy_since_s, idle_since_s, memory.changed_s)

    if busy_since_s is not None:
        wanted = min(rule.max_replicas, max(count + 1, math.ceil(total_busy / rule.target_busy_share - 1e-9)))
        if wanted == count:
            return keep(f"{figures}: too busy, but it has its maximum of {rule.max_replicas}", remembered)
        if (left_s := rule.grow_after_s - (now_s - busy_since_s)) > 0:
            return keep(f"{figures}: too busy, grows in {left_s:.1f} s if it stays so", remembered)
        if (left_s := _get_cooldown_left(rule, memory, now_s)) > 0:
            return keep(f"{figures}: too busy, but changed {rule.cooldown_s - left_s:.1f} s ago", remembered)
        return change("grow", wanted, f"{figures} for {now_s - busy_since_s:.1f} s")
    if idle_since_s is not None and count > rule.min_replicas:
        if (left_s := rule.shrink_after_s - (now_s - idle_since_s)) > 0:
            return keep(f"{figures}: idle, shrinks in {left_s:.1f} s if it stays so", remembered)
        if (left_s := _get_cooldown_left(rule, memory, now_s)) > 0:
            return keep(f"{figures}: idle, but changed {rule.cooldown_s - left_s:.1f} s ago", remembered)
        # One at a time: a load that comes back finds most of the group still there.
        reason = f"{figures} for {now_s - idle_since_s:.1f} s: {count - 1} would be busy {fewer_share:.0%}"
        return change("shrink", count - 1, reason)
    return keep(f"{figures}: as it should be", remembered)


def _get_cooldown_left(rule: AutoscaleRule, memory: GroupMemory, now_s: float) -> float:
    return 0.0 if memory.changed_s is None else rule.cooldown_s - (now_s - memory.changed_s)
