"""The autoscaler at work: asks the rules (autoscaler.py) now and then, and has groups scaled as they say."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Mapping, Sequence
from typing import Protocol

from cluster.autoscaler import Decision, GroupLoad, GroupMemory, decide_all, find_rule
from cluster.errors import ChangeRefused, StoreUnavailable
from cluster.spec import ClusterSpec

logger = logging.getLogger(__name__)

# As often as replicas are asked for their load.
AUTOSCALE_INTERVAL_S = 1.0


class Scale(Protocol):
    """ControllerLoop.scale."""

    def __call__(self, counts: Mapping[str, int], force: bool, reason: str) -> Awaitable[int]: ...


class Autoscaling:
    """decisions: the last ones, of every group that has a rule."""

    def __init__(self, spec: ClusterSpec, scale: Scale) -> None:
        self._rules = {
            group.name: rule for group in spec.groups if (rule := find_rule(group.name, spec.autoscale)) is not None
        }
        self._is_dry_run = spec.autoscale_dry_run
        self._scale = scale
        self._memories: dict[str, GroupMemory] = {}
        self._judged_s: float | None = None
        self.decisions: Sequence[Decision] = ()

    def is_due(self, now_s: float) -> bool:
        return bool(self._rules) and (self._judged_s is None or now_s - self._judged_s >= AUTOSCALE_INTERVAL_S)

    async def judge(
        self,
        counts: Mapping[str, int],
        settled: Mapping[str, bool],
        loads: Mapping[str, GroupLoad | None],
        now_s: float,
        *,
        may_act: bool,
    ) -> None:
        """Every group by its own load; arguments as of decide_all. may_act: False, it is only said what would be
        done."""
        self._judged_s = now_s
        self.decisions = decide_all(self._rules, counts, settled, loads, self._memories, now_s)
        if not may_act:
            return
        for decision in self.decisions:
            if decision.action == "keep":
                self._memories[decision.group_name] = decision.memory
            elif not self._is_dry_run:
                await self._scale_group(decision)

    async def _scale_group(self, decision: Decision) -> None:
        counts = {decision.group_name: decision.num_replicas}
        try:
            await self._scale(counts, force=False, reason=f"autoscaled: {decision.reason}")
        except (ChangeRefused, StoreUnavailable) as error:
            logger.warning("not autoscaled group=%s: %s", decision.group_name, error)
            return
        self._memories[decision.group_name] = decision.memory
