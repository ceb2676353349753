"""Moves replicas and routers off pods that go away or are outdated: a part of each turn of the controller.

A replica is replaced, which the planner does make before break. A router cannot be in two places, as its id is fixed:
it is drained while another serves, its streams go on there, and it is made again on another pod.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import NamedTuple

from cluster import desired_state
from cluster.desired_state import DesiredState
from cluster.event_log import EventLog
from cluster.fleet import Fleet, find_residents, join_demands, measure_demand, measure_router_demand
from cluster.planner import ActorState, Observation, Plan, is_ready
from cluster.track import Track

logger = logging.getLogger(__name__)

# What a router has not finished by then goes on through another one.
ROUTER_DRAIN_S = 30.0
# The call itself, and the end of the actor.
_CALL_TIMEOUT_S = 15.0

Target = tuple[str, int]
Change = Callable[[Callable[[DesiredState], DesiredState], str], Awaitable[object]]


class Followed(NamedTuple):
    """The weights whose actors live on the pods. change: store and take over a new desired state, with the reason."""

    track: Track
    observation: Observation
    change: Change


class FleetFollower:
    """Owns the ends of routers that are under way. Lives on the controller's event loop."""

    def __init__(
        self,
        fleet: Fleet,
        events: EventLog,
        drain_router: Callable[[Target, float], Awaitable[int]],
        end_router: Callable[[str], Awaitable[None]],
    ) -> None:
        """drain_router: at most so many seconds. end_router: for good."""
        self._fleet = fleet
        self._events = events
        self._drain_router = drain_router
        self._end_router = end_router
        self._router_exits: dict[Target, asyncio.Task[None]] = {}

    async def follow(self, followed: Sequence[Followed], *, may_renew: bool) -> None:
        """followed: each after its turn. may_renew: whether pods that are outdated may be renewed now. Raises what
        `change` raises. Nothing happens while it is not known which actors exist."""
        if not followed or followed[0].observation.existing_ids is None or followed[0].observation.draining:
            return
        view = self._fleet.get_view()
        taken_ids = {id_ for each in followed for id_ in (*each.track.own_ids, *each.observation.replicas)}
        for each in followed:
            taken_ids |= each.observation.existing_ids or frozenset()
        for track, observation, change in followed:
            for replica_id in find_residents(track.desired, observation.replicas, view.leaving):
                await change(
                    lambda desired, leaver_id=replica_id, taken_ids=frozenset(taken_ids): desired_state.replace_member(
                        desired, leaver_id, taken_ids
                    ),
                    f"the pod of {replica_id} is being deleted",
                )
                taken_ids |= track.own_ids
            assert track.plan is not None
            for router_id in self._find_leaving_routers(track.plan, observation, view.leaving):
                self._begin_exit((router_id, observation.routers[router_id].incarnation))
        track, observation, change = followed[0]
        assert track.plan is not None
        if may_renew and track.plan.is_settled(track.desired):
            await self._renew(followed[0], track.plan, view.outdated)
        routers = [
            measure_router_demand(
                track.planned_spec.router_ids, observation.routers, observation.existing_ids or frozenset()
            )
            for track, observation, _ in followed
        ]
        self._fleet.set_demand(
            join_demands(
                measure_demand(track.desired, observation.replicas, observation.existing_ids or frozenset())
                for track, observation, _ in followed
            ),
            join_demands({"routers": each} for each in routers)["routers"],
        )
        self._fleet.tell(self._events.take_new())

    async def _renew(self, followed: Followed, plan: Plan, outdated: Collection[str]) -> None:
        """Replicas first, one at a time, group by group; then routers, unless there is one alone."""
        track, observation, change = followed
        replica_ids = find_residents(track.desired, observation.replicas, outdated)
        if replica_ids:
            await change(
                lambda desired: desired_state.start_member_rollout(desired, replica_ids),
                "their pods are older than their worker group's template",
            )
            return
        if len(track.spec.router_ids) > 1 and is_ready(plan, track.spec):
            for router_id in track.spec.router_ids:
                if (record := observation.routers.get(router_id)) is not None and record.node in outdated:
                    self._fleet.renew(record.node)
                    return

    def _find_leaving_routers(self, plan: Plan, observation: Observation, leaving: Collection[str]) -> list[str]:
        """On pods that go away, if another router serves or there is no other at all."""
        found: list[str] = []
        for router_id, record in observation.routers.items():
            others = [status for other_id, status in plan.routers.items() if other_id != router_id]
            is_spare = not others or any(status.state is ActorState.READY for status in others)
            if record.node in leaving and is_spare:
                found.append(router_id)
        return found

    def _begin_exit(self, target: Target) -> None:
        """Once for each start of a router."""
        if target not in self._router_exits:
            self._events.add(f"router {target[0]}", "drain", "its pod is being deleted")
            self._router_exits[target] = asyncio.create_task(self._exit(target))

    async def _exit(self, target: Target) -> None:
        """Ends in time whatever the router does."""
        try:
            async with asyncio.timeout(ROUTER_DRAIN_S + _CALL_TIMEOUT_S):
                await self._drain_router(target, ROUTER_DRAIN_S)
            self._events.add(f"router {target[0]}", "remove", "its pod is being deleted, and it is drained")
            await self._end_router(target[0])
        except Exception as error:
            # The next turn tries again.
            del self._router_exits[target]
            logger.warning("router not ended router_id=%s: %s", target[0], error or type(error).__name__)
