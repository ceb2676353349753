"""Carries out an upgrade to another checkpoint, turn by turn: what cluster/upgrade.py says comes next.

Every step is written to the store before it counts, and follows from what is seen, so a controller that is restarted
anywhere goes on. The controller turns both tracks, of the old weights and of the new, by the same rules.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from typing import Any

from cluster import desired_state
from cluster.desired_state import DesiredState
from cluster.errors import ChangeRefused
from cluster.event_log import EventLog
from cluster.planner import Memory, Observation
from cluster.records import SPEC_KEY, UPGRADE_KEY, desired_key, rebalancing_key, router_key, table_key
from cluster.spec import ClusterSpec
from cluster.track import Track
from cluster.upgrade import (
    Upgrade,
    are_routers_ready,
    begin_empty,
    describe_wait,
    empty,
    find_failure,
    find_next_group,
    is_loaded,
)
from router.expert_table import ExpertTable

logger = logging.getLogger(__name__)

# HTTP fronts look for routers once a second; a request may be on its way to one that has nothing to do.
QUIET_S = 3.0
# Of a router that has nothing to do, or no time left.
ROUTER_DRAIN_S = 5.0
_CALL_TIMEOUT_S = 15.0

Target = tuple[str, int]


class Upgrader:
    """Owns the last upgrade and, while it is under way, the track of the weights that new requests do not go to. Lives
    on the controller's event loop. What the store does not take raises StoreUnavailable, and the next turn tries
    again."""

    def __init__(
        self,
        events: EventLog,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        put: Callable[[bytes, bytes], Awaitable[None]],
        delete: Callable[[bytes], Awaitable[None]],
        drain_router: Callable[[Target, float], Awaitable[int]],
        end_router: Callable[[str], Awaitable[None]],
    ) -> None:
        self._events = events
        self._clock = clock
        self._wall_clock = wall_clock
        self._put = put
        self._delete = delete
        self._drain_router = drain_router
        self._end_router = end_router
        self.upgrade: Upgrade | None = None
        self.beside: Track | None = None
        self._abort_reason: str | None = None
        self._is_front_told = False
        self._quiet_since_s: float | None = None
        self._release: asyncio.Task[None] | None = None

    @property
    def is_busy(self) -> bool:
        return self.beside is not None

    @property
    def last_version(self) -> int:
        """The greatest weights version that was ever given to anybody; 1 if there was no upgrade."""
        return 1 if self.upgrade is None else self.upgrade.target.weights_version

    def restore(self, upgrade: Upgrade, beside: Track | None) -> None:
        """Go on where a predecessor ended."""
        self.upgrade = upgrade
        self.beside = beside
        if beside is not None:
            beside.has_routers = upgrade.phase in ("routing", "finishing")

    async def begin(self, serving: Track, target: ClusterSpec, timeout_s: float, drain_timeout_s: float) -> None:
        """Raises ChangeRefused while another one is under way."""
        self.refuse_if_busy()
        assert serving.memory is not None
        desired = begin_empty(serving.desired, serving.spec, target)
        # A router that changes over keeps to the rule that versions of tables rise.
        memory = Memory(table=ExpertTable(version=serving.memory.table.version, groups=()))
        await self._put(desired_key(target.weights_version), desired.to_json())
        await self._delete(table_key(target.weights_version))
        upgrade = Upgrade("loading", serving.spec, target, self._wall_clock(), timeout_s, drain_timeout_s)
        await self._put(UPGRADE_KEY, upgrade.to_json())
        self.upgrade = upgrade
        self.beside = Track(target, serving.factory.for_spec(target), desired, memory, has_routers=False)
        self._abort_reason = None
        self._is_front_told = False
        self._quiet_since_s = None
        self._events.add(
            "upgrade",
            "begin",
            f"weights {target.weights_version} beside {serving.spec.weights_version}, group by group: "
            f"{serving.spec.checkpoint} to {target.checkpoint}",
        )

    def abort(self) -> None:
        """At the next turn. Raises ChangeRefused if it is too late, or there is none."""
        if self.upgrade is None or self.beside is None:
            raise ChangeRefused("no upgrade is under way")
        if self.upgrade.phase not in ("loading", "routing"):
            raise ChangeRefused(
                f"the upgrade is {self.upgrade.phase} and cannot be undone any more: when it is done, upgrade back to "
                "the old checkpoint"
            )
        self._abort_reason = "aborted by the admin API"

    def refuse_if_busy(self) -> None:
        """Raises ChangeRefused while an upgrade is under way."""
        if self.is_busy:
            assert self.upgrade is not None
            raise ChangeRefused(
                f"an upgrade to {self.upgrade.target.checkpoint} is {self.upgrade.phase}: wait until it is over, or "
                "end it with shoal upgrade --abort"
            )

    def get_view(self) -> dict[str, Any] | None:
        """None: there was none."""
        if self.upgrade is None:
            return None
        waits_for = None if self.beside is None else describe_wait(self.beside.plan)
        return {**self.upgrade.to_view(), "waits_for": waits_for}

    async def turn(
        self, serving: Track, observe: Callable[[Track], Observation], working_router_ids: Collection[str]
    ) -> Track:
        """working_router_ids: those that have sequences. Returns the track that new requests are for from now on."""
        if self.upgrade is None or self.beside is None:
            return serving
        observation = observe(self.beside)
        if observation.existing_ids is None:
            return serving
        match self.upgrade.phase:
            case "loading" | "routing":
                return await self._go_on(self.upgrade, serving, self.beside, observation)
            case "finishing":
                await self._finish(self.upgrade, self.beside, observation, working_router_ids)
            case "undoing":
                await self._undo(self.upgrade, self.beside, observation)
            case "done" | "failed":
                pass
        return serving

    async def _go_on(self, upgrade: Upgrade, serving: Track, beside: Track, observation: Observation) -> Track:
        plan = beside.plan
        if plan is None or plan.desired_version != beside.desired.version:
            return serving
        failure = self._abort_reason or find_failure(upgrade.target, plan, observation)
        if failure is None and self._wall_clock() - upgrade.began_at > upgrade.timeout_s:
            failure = f"not there after {upgrade.timeout_s:g} s, and still waiting for {describe_wait(plan)}"
        if failure is not None:
            await self._enter(replace(upgrade, phase="undoing", reason=failure))
            beside.has_routers = False
            self._events.add("upgrade", "undo", f"weights {upgrade.source.weights_version} go on serving: {failure}")
            return serving
        counts = {group.name: len(group.member_ids) for group in serving.desired.groups}
        version = upgrade.target.weights_version
        if (name := find_next_group(beside.desired, counts, plan)) is not None:
            taken_ids = serving.own_ids | beside.own_ids | observation.replicas.keys()
            await self._fill(beside, name, counts[name], taken_ids)
            self._events.add("upgrade", "load", f"group {name} with weights {version}, beside those that serve")
        elif is_loaded(beside.desired, counts, plan):
            if upgrade.phase == "loading":
                await self._enter(replace(upgrade, phase="routing"))
                beside.has_routers = True
                names = ", ".join(upgrade.target.router_ids)
                self._events.add("upgrade", "route", f"every group has weights {version}: starting {names}")
            elif are_routers_ready(upgrade.target, plan):
                return await self._switch(upgrade, serving, beside)
        return serving

    async def _fill(self, track: Track, name: str, count: int, taken_ids: Collection[str]) -> None:
        desired = desired_state.scale(track.desired, {name: count}, force=True, taken_ids=taken_ids, serving_ids=())
        await self._change(track, desired)

    async def _switch(self, upgrade: Upgrade, serving: Track, beside: Track) -> Track:
        version = max(serving.desired.version, beside.desired.version) + 1
        await self._change(beside, replace(beside.desired, version=version))
        # From here on a successor takes the new weights for those that serve.
        await self._enter(replace(upgrade, phase="finishing", switched_at=self._wall_clock()))
        self.beside = serving
        self._events.add(
            "upgrade",
            "switch",
            f"new requests go to {', '.join(upgrade.target.router_ids)} with weights {upgrade.target.weights_version}; "
            f"{', '.join(upgrade.source.router_ids)} finish what they have begun",
        )
        return beside

    async def _finish(
        self, upgrade: Upgrade, old: Track, observation: Observation, working_router_ids: Collection[str]
    ) -> None:
        if not self._is_front_told:
            await self._put(SPEC_KEY, upgrade.target.to_json())
            self._is_front_told = True
        if old.has_routers:
            self._judge_quiet(upgrade, old, working_router_ids)
        elif self._release is not None and not self._release.done():
            pass
        elif _list_routers(old, observation):
            self._release = asyncio.create_task(self._release_routers(old, observation))
        elif await self._is_empty(old, observation):
            await self._end(replace(upgrade, phase="done"), old)
            self._events.add(
                "upgrade", "done", f"everything is served with weights {upgrade.target.weights_version} alone"
            )

    def _judge_quiet(self, upgrade: Upgrade, old: Track, working_router_ids: Collection[str]) -> None:
        """Let the old routers go once none of them has had anything to do for a while, or the time is over."""
        assert upgrade.switched_at is not None
        now_s = self._clock()
        working = sorted({*working_router_ids} & {*old.spec.router_ids})
        if working:
            self._quiet_since_s = None
            if self._wall_clock() - upgrade.switched_at <= upgrade.drain_timeout_s:
                return
            reason = (
                f"{', '.join(working)} are still at work after {upgrade.drain_timeout_s:g} s: what they run is cut off"
            )
        else:
            if self._quiet_since_s is None:
                self._quiet_since_s = now_s
            if now_s - self._quiet_since_s < QUIET_S:
                return
            reason = f"weights {upgrade.source.weights_version} have answered everything that they had begun"
        old.has_routers = False
        self._events.add("upgrade", "release", reason)

    async def _release_routers(self, old: Track, observation: Observation) -> None:
        """Ends in time whatever they do; the next turn tries again what failed."""
        for router_id in _list_routers(old, observation):
            try:
                record = observation.routers.get(router_id)
                if record is not None:
                    # What comes now all the same is turned away, and tried again with the new weights.
                    async with asyncio.timeout(ROUTER_DRAIN_S + _CALL_TIMEOUT_S):
                        await self._drain_router((router_id, record.incarnation), ROUTER_DRAIN_S)
                await self._remove_router(router_id, "its checkpoint is not served any more")
            except Exception as error:
                logger.warning("router not ended router_id=%s: %s", router_id, error or type(error).__name__)

    async def _undo(self, upgrade: Upgrade, new: Track, observation: Observation) -> None:
        for router_id in _list_routers(new, observation):
            await self._remove_router(router_id, "the upgrade is undone, and nobody was sent to it")
        if await self._is_empty(new, observation):
            await self._end(replace(upgrade, phase="failed"), new)
            self._events.add(
                "upgrade", "fail", f"nothing is left of weights {upgrade.target.weights_version}: {upgrade.reason}"
            )

    async def _remove_router(self, router_id: str, reason: str) -> None:
        self._events.add(f"router {router_id}", "remove", reason)
        await self._end_router(router_id)
        await self._delete(router_key(router_id))

    async def _is_empty(self, track: Track, observation: Observation) -> bool:
        """Have all replicas leave. Whether they are gone."""
        if (desired := empty(track.desired)) is not track.desired:
            await self._change(track, desired)
            return False
        return not (observation.replicas or observation.existing_ids or observation.routers)

    async def _end(self, upgrade: Upgrade, gone: Track) -> None:
        await self._enter(upgrade)
        self.beside = None
        await self._delete(desired_key(gone.spec.weights_version))
        await self._delete(table_key(gone.spec.weights_version))
        await self._delete(rebalancing_key(gone.spec.weights_version))

    async def _enter(self, upgrade: Upgrade) -> None:
        await self._put(UPGRADE_KEY, upgrade.to_json())
        logger.info("upgrade phase=%s reason=%s", upgrade.phase, upgrade.reason)
        self.upgrade = upgrade

    async def _change(self, track: Track, desired: DesiredState) -> None:
        await self._put(desired_key(track.spec.weights_version), desired.to_json())
        track.desired = desired


def _list_routers(track: Track, observation: Observation) -> list[str]:
    """That are still there."""
    there = observation.routers.keys() | (observation.existing_ids or frozenset())
    return [router_id for router_id in track.spec.router_ids if router_id in there]
