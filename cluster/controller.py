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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from cluster import autoscaler, desired_state
from cluster.autoscaler import Decision, GroupMemory, ReplicaLoad, compute_group_load, find_rule
from cluster.balancer import Balancer, Throughput
from cluster.desired_state import DesiredGroup, DesiredState
from cluster.errors import BadRecord, ChangeRefused, StoreUnavailable
from cluster.event_log import EventLog
from cluster.expert_load import build_expert_load
from cluster.fleet import Fleet
from cluster.fleet_follower import FleetFollower
from cluster.hosting import Ranges, read_hosting
from cluster.hosting_calls import HostingCalls
from cluster.planner import (
    ActorState,
    CreateReplica,
    CreateRouter,
    DrainReplica,
    Health,
    HostExperts,
    Memory,
    Observation,
    Plan,
    PushTable,
    RemoveReplica,
    RouterReport,
    compute_plan,
)
from cluster.rebalance_view import Proposal, build_proposal, sum_pairs
from cluster.record_store import RecordStore
from cluster.records import (
    DESIRED_KEY,
    EVENTS_KEY,
    REPLICA_PREFIX,
    ROUTER_PREFIX,
    TABLE_KEY,
    ActorRecord,
    ReplicaRecord,
    RouterRecord,
    replica_key,
)
from cluster.router_figures import read_figures
from cluster.spec import ClusterSpec
from cluster.status_view import build_plan_view, build_status
from cluster.stored_table import memory_from_json, memory_to_json
from experts.model_config import ModelConfig
from experts.v1 import experts_pb2
from router.expert_table import ExpertTable

logger = logging.getLogger(__name__)

# One look costs two calls of about a millisecond, and the table follows a restart within one interval.
LOOP_INTERVAL_S = 0.1
# Which actors exist is asked less often: only an actor that failed in its constructor needs it.
LIST_INTERVAL_S = 1.0
RAY_CALL_TIMEOUT_S = 10.0
# As often as replicas are asked for their load.
AUTOSCALE_INTERVAL_S = 1.0
# Frames take less than a second; a router closes its streams to a replica that left the table once they are answered.
REPLICA_DRAIN_S = 30.0
# Of which experts are asked for; every viewer of the status page and every scrape asks.
EXPERT_LOAD_AGE_S = 2.0
_GOOD_REASON = "as it should be"

T = TypeVar("T")
RecordT = TypeVar("RecordT", bound=ActorRecord)


class Factory(Protocol):
    """Synchronous calls into Ray; they may block."""

    def create_replica(self, replica_id: str, node_id: str | None) -> Any: ...

    def create_router(self, router_id: str) -> Any: ...

    def list_existing(self) -> frozenset[str]: ...

    def list_nodes(self) -> frozenset[str]: ...

    def drain_replica(self, replica_id: str, grace_s: float) -> None: ...

    def host_experts(self, replica_id: str, hosted: Ranges, timeout_s: float) -> None: ...

    def kill(self, name: str) -> None: ...


class Prober(Protocol):
    """See cluster.probes.Probes."""

    @property
    def replica_health(self) -> Mapping[tuple[str, int], Health]: ...

    @property
    def router_reports(self) -> Mapping[tuple[str, int], RouterReport]: ...

    @property
    def replica_loads(self) -> Mapping[tuple[str, int], ReplicaLoad]: ...

    async def fetch_pairs(self) -> Sequence[experts_pb2.LoadResponse]: ...

    def router_details(self) -> Mapping[tuple[str, int], Any]: ...

    def set_targets(self, replicas: Mapping[tuple[str, int], str], routers: Mapping[tuple[str, int], str]) -> None: ...

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
    ) -> None:
        """clock: seconds, monotonic. wall_clock: seconds since the epoch. fleet: the pods under the replicas; None
        where nodes stay as they are. may_act: False while another controller may be at work; no turn begins then."""
        self._spec = spec
        self._may_act = may_act
        self._store = store
        self._factory = factory
        self._prober = prober
        self._clock = clock
        self._store_calls = _CallThread("record store")
        self._ray_calls = _CallThread("ray")
        self._desired = desired_state.begin(spec)
        self._change_lock = asyncio.Lock()
        self._events = EventLog(wall_clock)
        self._memory: Memory | None = None
        self._observation = Observation(
            now_s=clock(),
            replicas={},
            routers={},
            replica_health={},
            router_reports={},
            existing_ids=None,
            node_ids=frozenset(),
            drained=frozenset(),
            draining=False,
        )
        self._plan: Plan | None = None
        self._stored: Memory | None = None
        self._listed_s: float | None = None
        # The last start seen of each actor.
        self._incarnations: dict[str, int] = {}
        self._rules = {
            group.name: rule for group in spec.groups if (rule := find_rule(group.name, spec.autoscale)) is not None
        }
        self._group_memories: dict[str, GroupMemory] = {}
        self._decisions: Sequence[Decision] = ()
        self._autoscaled_s: float | None = None
        self._drains: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._follower = (
            None
            if fleet is None
            else FleetFollower(spec, fleet, self._events, self._change, prober.drain_router, self._kill_router)
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
            interval_s=spec.rebalance_interval_s,
            extra_share=spec.rebalance_extra_share,
        )
        self._expert_load: dict[str, Any] | None = None
        self._expert_load_s = 0.0
        self._expert_load_lock = asyncio.Lock()
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
        """One turn: observe, plan, act."""
        if self._memory is None:
            self._memory = await self._load()
        await self._observe()
        plan = compute_plan(self._spec, self._desired, self._observation, self._memory)
        await self._persist(plan.memory)
        self._record_changes(plan)
        self._memory = plan.memory
        self._plan = plan
        await self._act(plan)
        if self._desired.rollout and plan.is_settled(replace(self._desired, rollout=())):
            await self._change(
                lambda desired: desired_state.advance_rollout(desired, self._list_taken_ids()), "rolling replacement"
            )
        await self._autoscale(plan)
        if self._follower is not None:
            await self._follower.follow(lambda: self._desired, plan, self._observation)
        if not self._observation.draining:
            await self._balancer.turn(
                read_hosting(self._desired, plan.table),
                is_settled=plan.is_settled(self._desired),
                refusal=self._hosting_calls.take_refusal(),
            )
        await self._store_events()
        return plan

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
        status = build_status(self._spec, self._desired, self._observation, self._get_plan(), details, loads)
        return {**status, "balancer_alarm": self._balancer.get_view()["alarm"]}

    def get_plan_view(self) -> dict[str, Any]:
        return build_plan_view(self._desired, self._observation, self._get_plan(), self._decisions)

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
                config = await asyncio.to_thread(ModelConfig.from_folder, Path(self._spec.checkpoint))
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
        config = await asyncio.to_thread(ModelConfig.from_folder, Path(self._spec.checkpoint))
        load = sum_pairs(await self._prober.fetch_pairs(), config)
        hosted = read_hosting(self._desired, self._get_plan().table).published
        speeds = self._measure_speeds()
        return await asyncio.to_thread(build_proposal, config, self._spec.groups, hosted, speeds, load, extra_share)

    def _measure_speeds(self) -> dict[str, float]:
        """Pairs per second of each group's ready replicas together, each taken as fast as its kind (numerics_id) is:
        a replica that is asked for more joins more rows, and would look faster than its twin. One per replica if a
        kind's speed is not known."""
        plan = self._get_plan()
        kinds: dict[str, list[str]] = {}
        measured: dict[str, list[float]] = {}
        for group in self._desired.groups:
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
                for group in self._desired.groups
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
        self._observation = replace(self._observation, draining=True)
        return await self._prober.drain_routers(timeout_s)

    async def _change(self, change: Callable[[DesiredState], DesiredState], reason: str) -> int:
        """Store a new desired state, then act on it: a successor must know of it first."""
        async with self._change_lock:
            if self._observation.draining:
                raise ChangeRefused("the cluster is being stopped: nothing is changed any more")
            if self._memory is None or self._observation.existing_ids is None:
                raise StoreUnavailable("Ray's control service does not answer: nothing was changed, try again later")
            before, after = self._desired, change(self._desired)
            if after is before:
                return before.version
            await self._store_calls.call(lambda: self._store.put(DESIRED_KEY, after.to_json()))
            self._desired = after
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
        await self._ray_calls.call(functools.partial(self._factory.kill, router_id))
        self._note_existing(set(), {router_id})

    async def _autoscale(self, plan: Plan) -> None:
        """Judge every group that has a rule by its own load, once per AUTOSCALE_INTERVAL_S."""
        now_s = self._observation.now_s
        is_due = self._autoscaled_s is None or now_s - self._autoscaled_s >= AUTOSCALE_INTERVAL_S
        if not self._rules or not is_due or self._desired.rollout or self._observation.existing_ids is None:
            return
        self._autoscaled_s = now_s
        counts = {group.name: len(group.member_ids) for group in self._desired.groups}
        loads = {
            group.name: compute_group_load(list(self._list_loads(plan, group.member_ids).values()))
            for group in self._desired.groups
        }
        settled = {name: plan.is_group_ready(name, counts[name]) for name in counts}
        self._decisions = autoscaler.decide_all(self._rules, counts, settled, loads, self._group_memories, now_s)
        if self._observation.draining:
            return
        for decision in self._decisions:
            if decision.action == "keep":
                self._group_memories[decision.group_name] = decision.memory
            elif not self._spec.autoscale_dry_run:
                await self._scale_group(decision)

    async def _scale_group(self, decision: Decision) -> None:
        try:
            await self.scale(
                {decision.group_name: decision.num_replicas}, force=False, reason=f"autoscaled: {decision.reason}"
            )
        except (ChangeRefused, StoreUnavailable) as error:
            logger.warning("not autoscaled group=%s: %s", decision.group_name, error)
            return
        self._group_memories[decision.group_name] = decision.memory

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

    def _get_plan(self) -> Plan:
        return self._plan or compute_plan(self._spec, self._desired, self._observation, self._memory or Memory())

    def _list_taken_ids(self) -> frozenset[str]:
        return (self._observation.existing_ids or frozenset()) | self._observation.replicas.keys()

    async def _persist(self, memory: Memory) -> None:
        """Keep table and digests for a successor, before they are pushed.

        With the store down they are pushed all the same: routers must hear of a dead replica, and a successor outbids
        whatever version they hold.
        """
        if self._stored is not None and (memory.table, memory.digests) == (self._stored.table, self._stored.digests):
            return
        if self._memory is None or memory.table is not self._memory.table:
            self._events.add("expert table", "publish", f"version {memory.table.version}: {_describe(memory.table)}")
        try:
            await self._store_calls.call(lambda: self._store.put(TABLE_KEY, memory_to_json(memory)))
        except StoreUnavailable:
            # The look at the records has said so; the next turn tries again.
            return
        self._stored = memory

    async def _store_events(self) -> None:
        if self._events.is_stored:
            return
        data = self._events.to_json()
        try:
            await self._store_calls.call(lambda: self._store.put(EVENTS_KEY, data))
        except StoreUnavailable:
            return
        self._events.is_stored = True

    async def _load(self) -> Memory:
        """What a predecessor left. Raises StoreUnavailable."""

        async def fetch(key: bytes) -> bytes | None:
            return await self._store_calls.call(lambda: self._store.get(key))

        table, desired, events = await fetch(TABLE_KEY), await fetch(DESIRED_KEY), await fetch(EVENTS_KEY)
        memory = Memory()
        try:
            if events is not None:
                self._events.restore(events)
                self._events.add("controller", "start", "it goes on where another one ended")
            if desired is not None:
                self._desired = desired_state.desired_from_json(desired)
            if table is not None:
                memory = memory_from_json(table)
        except BadRecord as error:
            logger.warning("starting without what a predecessor left: %s", error)
        logger.info("table version=%d desired version=%d", memory.table.version, self._desired.version)
        return memory

    async def _observe(self) -> None:
        """Read the records, point the probes at them. What cannot be read stays as it was seen last."""
        now_s = self._clock()
        observation = replace(self._observation, now_s=now_s)
        try:
            replicas = await self._store_calls.call(lambda: self._store.get_all(REPLICA_PREFIX))
            routers = await self._store_calls.call(lambda: self._store.get_all(ROUTER_PREFIX))
            observation = replace(
                observation, replicas=_parse(replicas, ReplicaRecord), routers=_parse(routers, RouterRecord)
            )
            if self._listed_s is None or now_s - self._listed_s >= LIST_INTERVAL_S:
                self._listed_s = now_s
                existing_ids = await self._ray_calls.call(self._factory.list_existing)
                node_ids = await self._ray_calls.call(self._factory.list_nodes)
                if observation.existing_ids is None and self._plan is not None:
                    self._events.add("control plane", "resume", "Ray's control service answers again")
                observation = replace(observation, existing_ids=existing_ids, node_ids=node_ids)
        except StoreUnavailable as error:
            if observation.existing_ids is not None:
                self._events.add("control plane", "pause", f"nothing is started or ended meanwhile: {error}")
            observation = replace(observation, existing_ids=None)
            # Asked again at the next turn.
            self._listed_s = None
        self._prober.set_targets(_get_endpoints(observation.replicas), _get_endpoints(observation.routers))
        self._observation = replace(
            observation,
            replica_health=self._prober.replica_health,
            router_reports=self._prober.router_reports,
            drained=frozenset(target for target, task in self._drains.items() if task.done()),
            draining=self._observation.draining,
        )

    async def _act(self, plan: Plan) -> None:
        for action in plan.actions:
            match action:
                case PushTable(router_id, incarnation):
                    self._prober.push_table((router_id, incarnation), plan.table)
                case CreateReplica(replica_id, node_id):
                    self._events.add(f"replica {replica_id}", "create", action.reason)
                    await self._ray_calls.call(functools.partial(self._factory.create_replica, replica_id, node_id))
                    self._note_existing({replica_id}, set())
                case CreateRouter(router_id):
                    self._events.add(f"router {router_id}", "create", action.reason)
                    await self._ray_calls.call(functools.partial(self._factory.create_router, router_id))
                    self._note_existing({router_id}, set())
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
                    await self._ray_calls.call(functools.partial(self._factory.kill, replica_id))
                    await self._store_calls.call(functools.partial(self._store.delete, replica_key(replica_id)))
                    self._note_existing(set(), {replica_id})
                    for target in [target for target in self._drains if target[0] == replica_id]:
                        del self._drains[target]

    async def _drain_replica(self, replica_id: str) -> None:
        """Ends in time whatever Ray does."""
        try:
            async with asyncio.timeout(REPLICA_DRAIN_S + RAY_CALL_TIMEOUT_S):
                await asyncio.to_thread(self._factory.drain_replica, replica_id, REPLICA_DRAIN_S)
        except Exception as error:
            logger.warning("drain failed replica_id=%s: %s", replica_id, error or type(error).__name__)

    def _note_existing(self, added: set[str], removed: set[str]) -> None:
        """What was just done shows before Ray is asked again."""
        existing_ids = self._observation.existing_ids
        if existing_ids is not None:
            self._observation = replace(self._observation, existing_ids=(existing_ids | added) - removed)

    def _record_changes(self, plan: Plan) -> None:
        for kind, now, before in (
            ("router", plan.routers, self._plan.routers if self._plan else {}),
            ("replica", plan.replicas, self._plan.replicas if self._plan else {}),
        ):
            for actor_id, status in now.items():
                record = self._observation.get_record(actor_id)
                incarnation = record.incarnation if record is not None else None
                if self._incarnations.get(actor_id) != incarnation and record is not None:
                    self._incarnations[actor_id] = record.incarnation
                    self._events.add(f"{kind} {actor_id}", "start", _describe_start(record))
                if actor_id not in before or before[actor_id].state is not status.state:
                    self._events.add(f"{kind} {actor_id}", status.state.value, status.message or _GOOD_REASON)


class _CallThread:
    """Runs blocking calls one at a time, each with a deadline; while one hangs, further ones fail at once.

    The controller's turns and the admin API's requests call at the same time: they wait for each other.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._turn = asyncio.Lock()
        # A call that did not answer in time and still runs.
        self._hanging: asyncio.Future[Any] | None = None

    async def call(self, function: Callable[[], T]) -> T:
        """Raises StoreUnavailable when there is no answer in time, or what function raises."""
        async with self._turn:
            if self._hanging is not None and not self._hanging.done():
                raise StoreUnavailable(f"{self._name} still hangs in an earlier call")
            future = asyncio.get_running_loop().run_in_executor(self._executor, function)
            done, _ = await asyncio.wait([future], timeout=RAY_CALL_TIMEOUT_S)
            if not done:
                self._hanging = future
                future.add_done_callback(_discard_outcome)
                raise StoreUnavailable(f"{self._name} did not answer within {RAY_CALL_TIMEOUT_S:.0f} s")
            return future.result()


def _discard_outcome(future: asyncio.Future[Any]) -> None:
    """A late error has been told as a timeout already."""
    if not future.cancelled():
        future.exception()


def _parse(values: Mapping[bytes, bytes], record_type: type[RecordT]) -> dict[str, RecordT]:
    records: dict[str, RecordT] = {}
    for key, data in values.items():
        try:
            record = record_type.from_json(data)
        except BadRecord as error:
            logger.warning("ignoring the record %s: %s", key.decode(errors="replace"), error)
            continue
        records[record.actor_id] = record
    return records


def _get_endpoints(records: Mapping[str, ActorRecord]) -> dict[tuple[str, int], str]:
    """Every start that listens, by (actor id, incarnation)."""
    return {
        (record.actor_id, record.incarnation): record.endpoint
        for record in records.values()
        if record.endpoint is not None
    }


def _describe_start(record: ActorRecord) -> str:
    place = f"process {record.pid} on {record.node}"
    if record.num_failed_starts == 0:
        return place
    return f"{place}, after {record.num_failed_starts} starts in a row that ended early"


def _describe(table: ExpertTable) -> str:
    return " ".join(
        f"{group.name}={','.join(replica.replica_id for replica in group.replicas) or 'none'}" for group in table.groups
    )
