"""The controller: observes what the actors publish, plans, acts. The only place with a clock.

ControllerLoop has every effect handed in, so tests run it on fakes; cluster/controller_actor.py is the Ray actor around
it. Restarted, it reads desired state, table and events back from the record store and goes on. Tokens never wait for
it: routers keep working with the table they have while it is away.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from cluster import desired_state
from cluster.autoscaler import ReplicaLoad, compute_group_load
from cluster.autoscaling import Autoscaling
from cluster.balancer import Balancer
from cluster.call_thread import CALL_TIMEOUT_S, CallThread
from cluster.desired_state import DesiredGroup, DesiredState
from cluster.errors import ChangeRefused, StoreUnavailable
from cluster.event_log import EventLog
from cluster.expert_load import build_expert_load
from cluster.fleet import Fleet
from cluster.fleet_follower import FleetFollower, Followed
from cluster.hosting import read_hosting
from cluster.hosting_calls import HostingCalls
from cluster.observer import Observer, Probed
from cluster.planner import (
    ActorState,
    CreateReplica,
    CreateRouter,
    DrainReplica,
    HostExperts,
    Memory,
    Observation,
    Plan,
    PushTable,
    RemoveReplica,
    compute_plan,
)
from cluster.rebalance_view import Proposal, build_proposal, sum_pairs
from cluster.rebalancing import Throughput
from cluster.record_store import RecordStore
from cluster.records import (
    ActorRecord,
    desired_key,
    rebalancing_key,
    replica_key,
)
from cluster.router_figures import read_figures
from cluster.spec import ClusterSpec
from cluster.status_view import build_plan_view, build_status
from cluster.stored_state import StoredState
from cluster.track import Factory, Track
from cluster.upgrade import DEFAULT_DRAIN_TIMEOUT_S, DEFAULT_TIMEOUT_S, narrow, plan_target
from cluster.upgrade_preflight import Room, check_candidate, check_room
from cluster.upgrader import Upgrader
from experts.errors import ExpertsError
from experts.model_config import ModelConfig
from experts.v1 import experts_pb2
from router.expert_table import ExpertTable

logger = logging.getLogger(__name__)

# One look costs two calls of about a millisecond, and the table follows a restart within one interval.
LOOP_INTERVAL_S = 0.1
# Frames take less than a second; a router closes its streams to a replica that left the table once they are answered.
REPLICA_DRAIN_S = 30.0
# Of which experts are asked for; every viewer of the status page and every scrape asks.
EXPERT_LOAD_AGE_S = 2.0
# Of tries to upgrade to what the settings name, as long as that is refused.
WANTED_INTERVAL_S = 30.0
_GOOD_REASON = "as it should be"

T = TypeVar("T")
RecordT = TypeVar("RecordT", bound=ActorRecord)


class Prober(Probed, Protocol):
    """See cluster.probes.Probes."""

    async def fetch_pairs(self) -> Sequence[experts_pb2.LoadResponse]: ...

    def router_details(self) -> Mapping[tuple[str, int], Any]: ...

    def push_table(self, target: tuple[str, int], table: ExpertTable) -> None: ...

    async def drain_routers(self, timeout_s: float) -> int: ...

    async def drain_router(self, target: tuple[str, int], timeout_s: float) -> int: ...


class ControllerLoop:
    """Owns desired state, events and the memory between plans. Every method runs on one event loop."""

    def __init__(
        self,
        spec: ClusterSpec,
        store: RecordStore,
        factory: Factory,
        prober: Prober,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        fleet: Fleet | None = None,
        may_act: Callable[[], bool] = lambda: True,
        wanted_checkpoint: str | None = None,
    ) -> None:
        """spec: as the cluster began; what the store says of a later checkpoint goes before. clock: seconds, monotonic.
        wall_clock: seconds since the epoch. fleet: the pods under the replicas; None
        where nodes stay as they are. may_act: False while another controller may be at work; no turn begins then.
        wanted_checkpoint: what the settings name, which is upgraded to by itself; None: whoever asks decides."""
        self._may_act = may_act
        self._prober = prober
        self._clock = clock
        self._wall_clock = wall_clock
        self._ray_calls = CallThread("ray")
        self._change_lock = asyncio.Lock()
        self._events = EventLog(wall_clock)
        self._stored = StoredState(store, CallThread("record store"), self._events, clock)
        self._observer = Observer(self._stored, self._ray_calls, prober, self._events, clock)
        # Of the weights that new requests are for; those beside them are the upgrader's.
        self._track = Track(spec, factory, desired_state.begin(spec))
        self._autoscaling = Autoscaling(spec, self.scale)
        self._drains: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._follower = (
            None if fleet is None else FleetFollower(fleet, self._events, prober.drain_router, self._kill_router)
        )
        self._fleet = fleet
        self._upgrader = Upgrader(
            self._events,
            clock,
            wall_clock,
            self._stored.put,
            self._stored.delete,
            prober.drain_router,
            self._kill_router,
        )
        self._hosting_calls = HostingCalls(factory, clock)
        self._balancer = Balancer(
            self._events,
            clock,
            self._propose_rebalancing,
            lambda placements, reason: self._change(
                lambda desired: desired_state.rehost(desired, placements), f"rebalanced: {reason}"
            ),
            self._measure_throughput,
            lambda record: self._stored.put(rebalancing_key(self._track.spec.weights_version), record),
            interval_s=spec.rebalance_interval_s,
            extra_share=spec.rebalance_extra_share,
        )
        self._expert_load: dict[str, Any] | None = None
        self._expert_load_s = 0.0
        self._expert_load_lock = asyncio.Lock()
        self._wanted_checkpoint = wanted_checkpoint
        self._wanted_refusal: str | None = None
        self._wanted_at_s = clock()
        # When the last turn ended, by the clock: proof that the loop moves.
        self.turned_s: float | None = None

    async def run(self) -> None:
        """For ever. A turn that fails is logged and the next one starts afresh."""
        while True:
            try:
                if self._may_act():
                    await self.step()
            except StoreUnavailable as error:
                logger.warning("a turn of the controller failed: %s", error)
            except Exception:
                logger.exception("a turn of the controller failed")
            self.turned_s = self._clock()
            await asyncio.sleep(LOOP_INTERVAL_S)

    async def step(self) -> Plan:
        """One turn: observe, plan, act. Returns the plan for the weights that new requests are for."""
        if self._track.memory is None:
            await self._take_over()
        drained = frozenset(target for target, task in self._drains.items() if task.done())
        await self._observer.look(self._track.factory, drained, has_planned=self._track.plan is not None)
        plan = await self._turn(self._track)
        if (beside := self._upgrader.beside) is not None:
            await self._turn(beside)
        is_upgrading = self._upgrader.is_busy
        if self._track.desired.rollout and plan.is_settled(replace(self._track.desired, rollout=())):
            await self._change(
                lambda desired: desired_state.advance_rollout(desired, self._list_taken_ids()), "rolling replacement"
            )
        if not is_upgrading:
            await self._autoscale(plan)
        if self._follower is not None:
            # Pods that are made now are for the wanted checkpoint.
            may_renew = not is_upgrading and self._wanted_checkpoint in (None, self._track.spec.checkpoint)
            await self._follower.follow(self._list_followed(), may_renew=may_renew)
        if not self._observation.draining:
            if not is_upgrading:
                await self._balancer.turn(
                    read_hosting(self._track.desired, plan.table),
                    is_settled=plan.is_settled(self._track.desired),
                    refusal=self._hosting_calls.take_refusal(),
                )
            self._track = await self._upgrader.turn(self._track, self._get_observation, self._list_working_routers())
            await self._follow_settings(plan)
        await self._stored.keep_events()
        return plan

    async def _take_over(self) -> None:
        """Go on where a predecessor ended. Raises StoreUnavailable, and nothing is taken over then."""
        found = await self._stored.take_over(self._track)
        self._track = found.track
        if found.rebalancing is not None:
            self._balancer.restore(found.rebalancing)
        if found.upgrade is not None:
            self._upgrader.restore(found.upgrade, found.beside)

    @property
    def _observation(self) -> Observation:
        return self._observer.observation

    async def _turn(self, track: Track) -> Plan:
        observation = self._get_observation(track)
        assert track.memory is not None  # _load and the upgrader have seen to it
        plan = compute_plan(track.planned_spec, track.desired, observation, track.memory)
        await self._stored.keep_memory(track, plan.memory)
        self._record_changes(track, plan, observation)
        track.memory = plan.memory
        track.plan = plan
        await self._act(track, plan)
        return plan

    def _get_observation(self, track: Track) -> Observation:
        """What belongs to these weights."""
        beside = self._upgrader.beside
        if beside is None:
            return self._observation
        is_beside = track is beside
        foreign_ids = None if is_beside else beside.own_ids
        return narrow(self._observation, track.spec.weights_version, track.own_ids, foreign_ids)

    def _list_working_routers(self) -> frozenset[str]:
        """Routers that have sequences, or may have some, as they do not answer."""
        details = self._prober.router_details()
        working: set[str] = set()
        for router_id, record in self._observation.routers.items():
            target = router_id, record.incarnation
            report, status = self._observation.router_reports.get(target), details.get(target)
            if report is None or not report.reachable or status is None or status.num_running + status.num_waiting > 0:
                working.add(router_id)
        return frozenset(working)

    def _list_followed(self) -> list[Followed]:
        return [
            Followed(
                track,
                self._get_observation(track),
                lambda change, reason, track=track: self._change(change, reason, track),
            )
            for track in self._list_tracks()
            if track.plan is not None
        ]

    def _list_tracks(self) -> list[Track]:
        """That of the weights that new requests are for comes first."""
        return [self._track] if self._upgrader.beside is None else [self._track, self._upgrader.beside]

    def get_status(self) -> dict[str, Any]:
        details = {
            router_id: {
                "num_running": status.num_running,
                "num_waiting": status.num_waiting,
                "num_steps": status.num_steps,
                "current_step_ms": status.current_step_ms,
                "table_version": status.table_version,
                "connected_replicas": list(status.connected_replica_ids),
                "figures": read_figures(status),
            }
            for (router_id, _), status in self._prober.router_details().items()
        }
        loads = self._prober.replica_loads

        def describe(track: Track) -> dict[str, Any]:
            plan = self._get_plan(track)
            # Those that an upgrade has begun to want since its last plan are in none yet.
            router_ids = tuple(id_ for id_ in track.planned_spec.router_ids if id_ in plan.routers)
            spec = replace(track.spec, router_ids=router_ids)
            return build_status(spec, track.desired, self._get_observation(track), plan, details, loads)

        status = describe(self._track)
        return {
            **status,
            "settled": status["settled"] and not self._upgrader.is_busy,
            "balancer_alarm": self._balancer.get_view()["alarm"],
            "upgrade": self.get_upgrade_view(),
            # The other weights' routers and groups, while there are any.
            "beside": None if (beside := self._upgrader.beside) is None else describe(beside),
        }

    def get_plan_view(self) -> dict[str, Any]:
        """Of both weights, while the cluster is upgraded."""
        tracks = self._list_tracks()
        views = [
            build_plan_view(
                track.desired, self._get_observation(track), self._get_plan(track), self._autoscaling.decisions
            )
            for track in tracks
        ]
        view = {**views[0], "settled": views[0]["settled"] and len(tracks) == 1}
        return {**view, "steps": [step for each in views for step in each["steps"]]}

    def get_upgrade_view(self) -> dict[str, Any] | None:
        return self._upgrader.get_view()

    def get_events(self, after: int) -> list[dict[str, Any]]:
        """Events with a greater sequence number, oldest first."""
        return self._events.get_after(after)

    def get_event_counts(self) -> Mapping[tuple[str, str], int]:
        """See EventLog.counts."""
        return self._events.counts

    async def fetch_expert_load(self) -> dict[str, Any]:
        """See build_expert_load; at most EXPERT_LOAD_AGE_S old."""
        async with self._expert_load_lock:
            if self._expert_load is None or self._clock() - self._expert_load_s > EXPERT_LOAD_AGE_S:
                config = await asyncio.to_thread(ModelConfig.from_folder, Path(self._track.spec.checkpoint))
                self._expert_load = build_expert_load(await self._prober.fetch_pairs(), config)
                self._expert_load_s = self._clock()
            return self._expert_load

    async def plan_rebalancing(self, extra_share: float) -> dict[str, Any]:
        """What rebalancing would gain; see build_proposal. Nothing is changed."""
        return dict((await self._propose_rebalancing(extra_share)).view)

    async def rebalance(self, extra_share: float) -> dict[str, Any]:
        """Begin to move experts. Returns the balancer's view. Raises as scale does."""
        return await self._balancer.begin(extra_share, "asked for by the admin API")

    def get_balancer_view(self) -> dict[str, Any]:
        return self._balancer.get_view()

    async def _propose_rebalancing(self, extra_share: float) -> Proposal:
        config = await asyncio.to_thread(ModelConfig.from_folder, Path(self._track.spec.checkpoint))
        load = sum_pairs(await self._prober.fetch_pairs(), config)
        hosted = read_hosting(self._track.desired, self._get_plan().table).published
        speeds = self._measure_speeds()
        return await asyncio.to_thread(
            build_proposal, config, self._track.spec.groups, hosted, speeds, load, extra_share
        )

    def _measure_speeds(self) -> dict[str, float]:
        """Pairs per second of each group's ready replicas together, each taken as fast as its kind (numerics_id) is:
        a replica that is asked for more joins more rows, and would look faster than its twin. One per replica if a
        kind's speed is not known."""
        plan = self._get_plan()
        kinds: dict[str, list[str]] = {}
        measured: dict[str, list[float]] = {}
        for group in self._track.desired.groups:
            kinds[group.name] = [self._observation.replicas[id_].numerics_id for id_ in self._list_ready(plan, group)]
            for id_, load in self._list_loads(plan, group.member_ids).items():
                if load.pairs_per_busy_s:
                    kind = self._observation.replicas[id_].numerics_id
                    measured.setdefault(kind, []).append(load.pairs_per_busy_s)
        if any(kind not in measured for own in kinds.values() for kind in own):
            return {name: float(max(1, len(own))) for name, own in kinds.items()}
        means = {kind: sum(values) / len(values) for kind, values in measured.items()}
        return {
            name: sum(means[kind] for kind in own) or max(means.values(), default=1.0) for name, own in kinds.items()
        }

    def _measure_throughput(self) -> Throughput:
        plan = self._get_plan()
        return Throughput(
            {
                group.name: sum(load.pairs_per_s for load in self._list_loads(plan, group.member_ids).values())
                for group in self._track.desired.groups
            }
        )

    async def scale(self, counts: Mapping[str, int], force: bool, reason: str = "scaled by the admin API") -> int:
        """Returns the version of the desired state. Raises ChangeRefused or StoreUnavailable: nothing was changed."""

        def change(desired: DesiredState) -> DesiredState:
            ready_ids = {
                replica_id
                for replica_id, status in self._get_plan().replicas.items()
                if status.state is ActorState.READY
            }
            taken_ids = self._list_taken_ids()
            return desired_state.scale(desired, counts, force=force, taken_ids=taken_ids, serving_ids=ready_ids)

        return await self._change(change, reason)

    async def replace_replica(self, replica_id: str) -> int:
        """Let one replica leave once another has taken its place. Raises as scale does."""
        return await self._change(
            lambda desired: desired_state.replace_member(desired, replica_id, self._list_taken_ids()),
            "drained by the admin API",
        )

    async def restart_groups(self, names: Sequence[str]) -> int:
        """Replace every replica of these groups, or of all, one at a time. Raises as scale does."""
        return await self._change(
            lambda desired: desired_state.start_rollout(desired, names), "restarted by the admin API"
        )

    async def drain(self, timeout_s: float) -> int:
        """Stop creating actors and drain the routers. Returns the sequences still running after timeout_s."""
        self._events.add("cluster", "drain", f"asked for by the admin API, for at most {timeout_s:g} s")
        self._observer.start_draining()
        return await self._prober.drain_routers(timeout_s)

    async def upgrade(self, checkpoint: str, timeout_s: float, drain_timeout_s: float) -> dict[str, Any]:
        """Begin to serve another checkpoint beside this one, and then in its place. Returns the upgrade's view. Raises
        as scale does."""
        async with self._change_lock:
            self._check_changeable()
            track = self._track
            if self._wanted_checkpoint not in (None, checkpoint):
                raise ChangeRefused(
                    f"the settings of this cluster name {self._wanted_checkpoint}: change them (model.folder of the "
                    "chart), and the controller upgrades by itself"
                )
            if not self._get_plan(track).is_settled(track.desired):
                raise ChangeRefused("a change is under way: `shoal plan` shows it; upgrade once it is done")
            try:
                before, after, report = await asyncio.to_thread(check_candidate, track.spec, Path(checkpoint))
                target = plan_target(
                    track.spec,
                    checkpoint,
                    before,
                    after,
                    self._list_taken_ids() | self._observation.routers.keys(),
                    max(self._upgrader.last_version, track.spec.weights_version),
                )
            except ExpertsError as error:
                raise ChangeRefused(str(error)) from error
            occupied = {id_: record.node_id for id_, record in self._observation.replicas.items()}
            check_room(track.spec, target, track.desired, occupied, report, await self._measure_room(track))
            await self._upgrader.begin(track, target, timeout_s, drain_timeout_s)
            view = self._upgrader.get_view()
            assert view is not None
            return view

    async def _follow_settings(self, plan: Plan) -> None:
        """Begin an upgrade to the checkpoint that the settings name. One that failed is tried again only if it is asked
        for."""
        wanted, last = self._wanted_checkpoint, self._upgrader.upgrade
        if wanted is None or wanted == self._track.spec.checkpoint or self._upgrader.is_busy:
            return
        if last is not None and last.phase == "failed" and last.target.checkpoint == wanted:
            return
        if self._clock() < self._wanted_at_s or not plan.is_settled(self._track.desired):
            return
        self._wanted_at_s = self._clock() + WANTED_INTERVAL_S
        try:
            await self.upgrade(wanted, DEFAULT_TIMEOUT_S, DEFAULT_DRAIN_TIMEOUT_S)
        except (ChangeRefused, StoreUnavailable) as error:
            if str(error) != self._wanted_refusal:
                self._wanted_refusal = str(error)
                self._events.add("upgrade", "refuse", str(error))

    async def abort_upgrade(self) -> dict[str, Any] | None:
        """Raises ChangeRefused if it is too late."""
        self._upgrader.abort()
        return self._upgrader.get_view()

    async def _measure_room(self, track: Track) -> Room:
        if self._fleet is not None:
            limits = self._fleet.get_limits()
            if limits is None:
                raise StoreUnavailable("the pods are not known yet: try again later")
            counts = {group.name: len(group.member_ids) for group in track.desired.groups}
            num_pods = {name: limits.max_pods.get(name, 0) - count for name, count in counts.items()}
            return Room({}, num_pods=num_pods, num_router_pods=limits.max_router_pods - len(track.spec.router_ids))
        return Room(
            await self._ray_calls.call(track.factory.measure_available),
            await self._ray_calls.call(track.factory.count_free_gpus),
        )

    def _check_changeable(self) -> None:
        """Raises ChangeRefused or StoreUnavailable if nothing may be changed now."""
        if self._observation.draining:
            raise ChangeRefused("the cluster is being stopped: nothing is changed any more")
        if self._track.memory is None or self._observation.existing_ids is None:
            raise StoreUnavailable("Ray's control service does not answer: nothing was changed, try again later")
        self._upgrader.refuse_if_busy()

    async def _change(
        self, change: Callable[[DesiredState], DesiredState], reason: str, track: Track | None = None
    ) -> int:
        """Store a new desired state, then act on it: a successor must know of it first. track: None: as somebody asked
        for it; else on our own accord, also while the cluster is upgraded."""
        async with self._change_lock:
            if track is None:
                self._check_changeable()
                track = self._track
            before, after = track.desired, change(track.desired)
            if after is before:
                return before.version
            await self._stored.put(desired_key(track.spec.weights_version), after.to_json())
            track.desired = after
            for old, new in zip(before.groups, after.groups, strict=True):
                if old.hosted != new.hosted:
                    self._events.add(f"group {new.name}", "rehost", reason)
                if old.member_ids != new.member_ids:
                    members = f"{','.join(old.member_ids) or 'none'} to {','.join(new.member_ids) or 'none'}"
                    self._events.add(f"group {new.name}", "change", f"from {members}: {reason}")
            if len(after.rollout) > len(before.rollout):
                self._events.add("cluster", "restart", f"{', '.join(after.rollout)}, one at a time: {reason}")
            logger.info("desired state version=%d reason=%s", after.version, reason)
            return after.version

    async def _kill_router(self, router_id: str) -> None:
        await self._ray_calls.call(functools.partial(self._track.factory.kill, router_id))
        self._observer.note_existing(set(), {router_id})

    async def _autoscale(self, plan: Plan) -> None:
        observation, groups = self._observation, self._track.desired.groups
        if self._track.desired.rollout or observation.existing_ids is None:
            return
        if not self._autoscaling.is_due(observation.now_s):
            return
        counts = {group.name: len(group.member_ids) for group in groups}
        await self._autoscaling.judge(
            counts,
            {name: plan.is_group_ready(name, count) for name, count in counts.items()},
            {
                group.name: compute_group_load(list(self._list_loads(plan, group.member_ids).values()))
                for group in groups
            },
            observation.now_s,
            may_act=not observation.draining,
        )

    def _list_loads(self, plan: Plan, member_ids: Sequence[str]) -> dict[str, ReplicaLoad]:
        """Of ready replicas that reported, by id."""
        loads = self._prober.replica_loads
        return {
            member_id: loads[member_id, record.incarnation]
            for member_id in member_ids
            if (record := self._observation.replicas.get(member_id)) is not None
            and (member_id, record.incarnation) in loads
            and plan.replicas[member_id].state is ActorState.READY
        }

    def _list_ready(self, plan: Plan, group: DesiredGroup) -> list[str]:
        return [
            member_id
            for member_id in group.member_ids
            if member_id in self._observation.replicas
            and (status := plan.replicas.get(member_id)) is not None
            and status.state is ActorState.READY
        ]

    def _get_plan(self, track: Track | None = None) -> Plan:
        """track: None: that of the weights that new requests are for."""
        track = track or self._track
        return track.plan or compute_plan(
            track.planned_spec, track.desired, self._get_observation(track), track.memory or Memory()
        )

    def _list_taken_ids(self) -> frozenset[str]:
        """Of actors and records, and of those that are still to be made."""
        wanted = (id_ for track in self._list_tracks() for id_ in track.own_ids)
        return (self._observation.existing_ids or frozenset()) | self._observation.replicas.keys() | frozenset(wanted)

    async def _act(self, track: Track, plan: Plan) -> None:
        for action in plan.actions:
            match action:
                case PushTable(router_id, incarnation):
                    self._prober.push_table((router_id, incarnation), plan.table)
                case CreateReplica(replica_id, node_id):
                    self._events.add(f"replica {replica_id}", "create", action.reason)
                    await self._ray_calls.call(functools.partial(track.factory.create_replica, replica_id, node_id))
                    self._observer.note_existing({replica_id}, set())
                case CreateRouter(router_id):
                    self._events.add(f"router {router_id}", "create", action.reason)
                    await self._ray_calls.call(functools.partial(track.factory.create_router, router_id))
                    self._observer.note_existing({router_id}, set())
                case HostExperts(replica_id, _, hosted):
                    if self._hosting_calls.ask(replica_id, hosted):
                        self._events.add(f"replica {replica_id}", "host", action.reason)
                case DrainReplica(replica_id, incarnation):
                    if (replica_id, incarnation) not in self._drains:
                        self._events.add(f"replica {replica_id}", "drain", action.reason)
                        task = asyncio.create_task(self._drain_replica(replica_id))
                        self._drains[replica_id, incarnation] = task
                case RemoveReplica(replica_id):
                    self._events.add(f"replica {replica_id}", "remove", action.reason)
                    await self._ray_calls.call(functools.partial(self._track.factory.kill, replica_id))
                    await self._stored.delete(replica_key(replica_id))
                    self._observer.note_existing(set(), {replica_id})
                    for target in [target for target in self._drains if target[0] == replica_id]:
                        del self._drains[target]

    async def _drain_replica(self, replica_id: str) -> None:
        """Ends in time whatever Ray does."""
        try:
            async with asyncio.timeout(REPLICA_DRAIN_S + CALL_TIMEOUT_S):
                await asyncio.to_thread(self._track.factory.drain_replica, replica_id, REPLICA_DRAIN_S)
        except Exception as error:
            logger.warning("drain failed replica_id=%s: %s", replica_id, error or type(error).__name__)

    def _record_changes(self, track: Track, plan: Plan, observation: Observation) -> None:
        for kind, now, before in (
            ("router", plan.routers, track.plan.routers if track.plan else {}),
            ("replica", plan.replicas, track.plan.replicas if track.plan else {}),
        ):
            for actor_id, status in now.items():
                record = observation.get_record(actor_id)
                incarnation = record.incarnation if record is not None else None
                if track.incarnations.get(actor_id) != incarnation and record is not None:
                    track.incarnations[actor_id] = record.incarnation
                    self._events.add(f"{kind} {actor_id}", "start", _describe_start(record))
                if actor_id not in before or before[actor_id].state is not status.state:
                    self._events.add(f"{kind} {actor_id}", status.state.value, status.message or _GOOD_REASON)


def _describe_start(record: ActorRecord) -> str:
    place = f"process {record.pid} on {record.node}"
    if record.num_failed_starts == 0:
        return place
    return f"{place}, after {record.num_failed_starts} starts in a row that ended early"
