"""Moves experts between groups while they serve, and says what it gained: by what was expected, then by what is
measured.

It plans from what replicas have counted (cluster/rebalancer.py), writes what groups should hold into the desired state,
and the controller's turns do the rest (cluster/hosting.py). Where memory does not suffice for all new experts beside
all old ones, it goes in rounds. How far it is is kept in the store, so a controller that is restarted goes on with it.
Asked for by `shoal rebalance`, or by itself every so often; a balancer that no longer looks, or does not get on, is
told by an alarm, since nothing else would show it: tokens flow, only slower.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from cluster.errors import ChangeRefused, ClusterError, StoreUnavailable
from cluster.event_log import EventLog
from cluster.hosting import Hosting, Ranges
from cluster.rebalance_view import Proposal, plan_moves
from cluster.rebalancing import Rebalancing, Throughput
from experts.load_meter import WINDOW_S

logger = logging.getLogger(__name__)

# What replicas report of their load covers WINDOW_S, and is asked for once a second.
MEASURE_AFTER_S = WINDOW_S + 2.0
# Of no progress, until it is an alarm: a round reads experts from disk.
STALLED_AFTER_S = 300.0
# A look that is this much later than it should be is an alarm.
LATE_AFTER_S = 60.0
PLAN_TIMEOUT_S = 60.0
# By itself it moves nothing for less, of the time that layers take.
LEAST_GAIN = 0.05


class Balancer:
    """Turned by the controller; lives on its event loop."""

    def __init__(
        self,
        events: EventLog,
        clock: Callable[[], float],
        propose: Callable[[float], Awaitable[Proposal]],
        rehost: Callable[[Mapping[str, Ranges], str], Awaitable[object]],
        measure: Callable[[], Throughput],
        keep: Callable[[bytes], Awaitable[None]],
        *,
        interval_s: float | None,
        extra_share: float,
    ) -> None:
        """propose: a plan for this part of extra memory. rehost: have groups hold this, for a reason; raises
        ClusterError. measure: what groups compute now. keep: Rebalancing.to_record() for a successor; raises
        StoreUnavailable. interval_s: how often it looks by itself; None: never."""
        self._events = events
        self._clock = clock
        self._propose = propose
        self._rehost = rehost
        self._measure = measure
        self._keep = keep
        self._interval_s = interval_s
        self._extra_share = extra_share
        self._current: Rebalancing | None = None
        self._is_kept = True
        self._begin_lock = asyncio.Lock()
        self._looked_s = clock()
        self._look: asyncio.Task[None] | None = None
        self._alarm: str | None = None

    async def begin(self, extra_share: float, reason: str) -> dict[str, Any]:
        """Plan and start to move. Returns get_view(). Raises ChangeRefused while another one is under way or if there
        is nothing to gain, or what rehost raises."""
        async with self._begin_lock:
            self._refuse_second()
            proposal = await self._propose(extra_share)
            if proposal.is_idle:
                raise ChangeRefused("there is nothing to move: groups are as even as this memory can make them")
            number = 1 if self._current is None else self._current.number + 1
            current = Rebalancing(number, proposal, reason, self._measure(), self._clock())
            await self._keep(current.to_record())
            self._current = current
        before, after = (proposal.view[key]["imbalance"] for key in ("before", "after"))
        self._events.add(
            "balancer", "begin", f"slowest group over the mean {before:.2f}, expected {after:.2f}: {reason}"
        )
        return self.get_view()

    def restore(self, current: Rebalancing) -> None:
        """Go on with what a predecessor began."""
        self._current = current
        if current.phase == "moving":
            self._events.add(
                "balancer", "continue", f"where another controller ended, round {current.num_rounds}: {current.reason}"
            )

    async def turn(self, hosting: Hosting, *, is_settled: bool, refusal: str | None) -> None:
        """hosting: that of the last plan. is_settled: every replica holds what it should and every router knows.
        refusal: why a replica could not do what it was asked."""
        now_s = self._clock()
        current = self._current
        if current is not None and current.phase == "moving":
            await self._get_on(current, hosting, is_settled, refusal)
        elif current is not None and current.phase == "measuring" and now_s - current.moved_s >= MEASURE_AFTER_S:
            self._finish(current)
        elif self._is_due(now_s) and is_settled:
            self._look = asyncio.create_task(self._look_by_itself())
        self._watch(now_s)
        if self._current is not None and not self._is_kept:
            try:
                await self._keep(self._current.to_record())
                self._is_kept = True
            except StoreUnavailable as error:
                logger.warning("how far a rebalancing is is not kept: %s", error)

    def get_view(self) -> dict[str, Any]:
        """For the admin API. alarm: None, or one line."""
        return {
            "interval_s": self._interval_s,
            "alarm": self._alarm,
            "current": None if self._current is None else self._current.to_json(),
        }

    async def _get_on(self, current: Rebalancing, hosting: Hosting, is_settled: bool, refusal: str | None) -> None:
        if refusal is not None and not hosting.is_published:
            current.failure = current.failure or refusal
        if current.failure is not None:
            await self._give_up(current, hosting)
            return
        if not is_settled:
            return
        placements = plan_moves(current.proposal, hosting.published)
        current.moved_s = self._clock()
        if placements is None:
            current.phase = "measuring"
            self._is_kept = False
            self._events.add(
                "balancer", "moved", f"experts are where they should be, after {current.num_rounds} rounds"
            )
            return
        current.num_rounds += 1
        self._is_kept = False
        try:
            await self._rehost(placements, f"{current.reason}, round {current.num_rounds}")
        except ClusterError as error:
            current.failure = str(error)
            await self._give_up(current, hosting)

    async def _give_up(self, current: Rebalancing, hosting: Hosting) -> None:
        """Leave experts where the table has them; tried again at the next turn if that cannot be written now."""
        try:
            await self._rehost(hosting.published, f"a rebalancing failed: {current.failure}")
        except ClusterError as error:
            logger.warning("a rebalancing that failed is still desired: %s", error)
            return
        current.phase = "failed"
        self._is_kept = False
        self._events.add("balancer", "fail", f"experts stay where they are: {current.failure}")

    def _finish(self, current: Rebalancing) -> None:
        current.after = self._measure()
        current.phase = "done"
        self._is_kept = False
        before, after = current.before.to_json(), current.after.to_json()
        self._events.add(
            "balancer",
            "done",
            f"rows per group, max over mean, measured: {before['rows_max_over_mean']} before, "
            f"{after['rows_max_over_mean']} after; {before['pairs_per_s']} and {after['pairs_per_s']} pairs/s",
        )

    def _refuse_second(self) -> None:
        if self._current is not None and self._current.phase == "moving":
            raise ChangeRefused(f"rebalancing {self._current.number} is under way: wait until it has moved its experts")

    def _is_due(self, now_s: float) -> bool:
        is_looking = self._look is not None and not self._look.done()
        return self._interval_s is not None and not is_looking and now_s - self._looked_s >= self._interval_s

    async def _look_by_itself(self) -> None:
        try:
            async with asyncio.timeout(PLAN_TIMEOUT_S):
                proposal = await self._propose(self._extra_share)
            gain = proposal.view["before"]["imbalance"] - proposal.view["after"]["imbalance"]
            if not proposal.is_idle and gain >= LEAST_GAIN:
                await self.begin(self._extra_share, "by itself")
        except (ClusterError, TimeoutError, OSError) as error:
            logger.warning("the balancer could not plan: %s", error or type(error).__name__)
            return
        self._looked_s = self._clock()

    def _watch(self, now_s: float) -> None:
        """Raise the alarm, or end it."""
        alarm: str | None = None
        current = self._current
        if current is not None and current.phase == "moving" and now_s - current.moved_s > STALLED_AFTER_S:
            alarm = f"rebalancing {current.number} has not got on for {now_s - current.moved_s:.0f} s"
        elif (
            self._interval_s is not None
            and now_s - self._looked_s > self._interval_s + LATE_AFTER_S
            and (current is None or current.phase in ("done", "failed"))
        ):
            alarm = f"the balancer has not looked for {now_s - self._looked_s:.0f} s"
        if (alarm is None) != (self._alarm is None):
            self._events.add("balancer", "alarm" if alarm else "resume", alarm or "it gets on again")
            if alarm is not None:
                logger.error("%s", alarm)
        self._alarm = alarm
