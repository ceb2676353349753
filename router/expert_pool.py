"""The router's live view of the expert groups: the table in force and a connection per replica.

A new table is applied make-before-break: connections to replicas that stay are kept, new ones are dialled, and those
that left are closed. What such a replica has not answered moves to another as soon as one is connected.

A frame goes to the replica that will be done with it first, by what it was sent and how long it has been taking. So a
slow one gets the share that it can carry, and one that has just fallen silent gets nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from experts.model_config import ModelConfig
from experts.tls import ClusterTls
from router.dispatch_counters import DispatchCounters
from router.errors import ExpertsUnavailable, StaleTable, TableChanged
from router.expert_connection import ExpertConnection
from router.expert_table import EMPTY_TABLE, ExpertTable, ProcessKey
from router.group_traffic import TrafficBook
from router.heartbeat import DEFAULT_HEARTBEATS, HeartbeatOptions
from router.reply_times import LatePoint
from router.sequence_trace import HopRecorder

logger = logging.getLogger(__name__)

# How long a replica that left the table may still answer what it was sent.
CLOSE_GRACE_S = 30.0
# Replicas whose times differ by no more than this factor and time take turns: so much is noise.
LIKE_SPEED, LIKE_S = 1.25, 0.0005
# A replica that is too slow to get frames is measured again after this: it may have recovered.
MEASURE_AGAIN_S = 1.0

Numerics = Literal["sticky", "uniform", "mixed"]


class PoolOptions(NamedTuple):
    """numerics: which replicas of a group may answer, by their numerics_id. sticky: those with the one that the group
    began with, others only while none of these is connected; uniform: only those; mixed: all, each by its speed.
    tls: None: unencrypted."""

    heartbeats: HeartbeatOptions = DEFAULT_HEARTBEATS
    numerics: Numerics = "sticky"
    tls: ClusterTls | None = None


class ReplicaTimes(NamedTuple):
    """slowness: most that the replica takes of the time that the fastest one of its group takes for frames of a size.
    frame_ms: for a frame of the size that came last. Both 0: not known yet."""

    replica_id: str
    connected: bool
    num_frames: int
    num_outstanding: int
    slowness: float
    frame_ms: float


class _Group:
    """The connections of one group, in the table's order. numerics_id: of the replicas in use; None before the first
    frame."""

    def __init__(self, connections: Sequence[ExpertConnection], numerics_id: str | None) -> None:
        self.connections = connections
        self.numerics_id = numerics_id


class ExpertPool:
    """Owned by one event loop."""

    def __init__(self, config: ModelConfig, options: PoolOptions | None = None) -> None:
        self._config = config
        self._options = options or PoolOptions()
        self.counters = DispatchCounters()
        self.traffic = TrafficBook()
        self.hops = HopRecorder()
        self._table = EMPTY_TABLE
        self._connections: dict[ProcessKey, ExpertConnection] = {}
        # Further streams to the same replicas, for rounds at the same time; by lane, from 1.
        self._lanes: dict[tuple[ProcessKey, int], ExpertConnection] = {}
        self._groups: dict[str, _Group] = {}
        self._late_points: dict[tuple[str, int], LatePoint] = {}
        self._missing = self._describe_missing()
        self._changed = asyncio.Event()
        self._expert_groups: dict[int, npt.NDArray[np.int64]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._unserved_since: float | None = time.monotonic()

    @property
    def table(self) -> ExpertTable:
        return self._table

    def expert_groups(self, layer_id: int) -> npt.NDArray[np.int64]:
        """[num_turns, n_routed_experts] group indices of the table in force, see ExpertTable.expert_turns."""
        groups = self._expert_groups.get(layer_id)
        if groups is None:
            groups = self._table.expert_turns(layer_id, self._config.n_routed_experts)
            self._expert_groups[layer_id] = groups
        return groups

    def apply(self, table: ExpertTable) -> None:
        """Put a newer table in force. Raises StaleTable for an older version; the same version changes nothing."""
        if table.version < self._table.version:
            raise StaleTable(f"expert table {table.version} is older than {self._table.version}, which is in force")
        if table.version == self._table.version:
            return
        wanted = {replica.process: replica for group in table.groups for replica in group.replicas}
        leaving = [(name, c) for name, group in self._groups.items() for c in group.connections]
        names = {c.replica.process: name for name, c in leaving}
        leaving += [(names[process], c) for (process, _), c in self._lanes.items()]
        for connection in (*self._connections.values(), *self._lanes.values()):
            # A process that stays may host other experts now, and then its digest is another.
            connection.replica = wanted.get(connection.replica.process, connection.replica)
        for process, replica in wanted.items():
            if process not in self._connections:
                self._connections[process] = ExpertConnection(
                    replica,
                    self._config.hidden_size,
                    self._notify,
                    heartbeats=self._options.heartbeats,
                    counters=self.counters,
                    tls=self._options.tls,
                )
        self._table = table
        self._expert_groups.clear()
        self._groups = {
            group.name: _Group(
                [self._connections[replica.process] for replica in group.replicas],
                self._groups[group.name].numerics_id if group.name in self._groups else None,
            )
            for group in table.groups
        }
        for name, connection in leaving:
            if connection.replica.process not in wanted:
                self._connections.pop(connection.replica.process, None)
                task = asyncio.get_running_loop().create_task(self._release(name, connection))
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
        self._lanes = {key: connection for key, connection in self._lanes.items() if key[0] in wanted}
        self._missing = self._describe_missing()
        logger.info("expert table applied version=%d num_replicas=%d", table.version, len(wanted))
        self._notify()

    def connected_replica_ids(self) -> list[str]:
        return sorted(c.replica.replica_id for c in self._connections.values() if c.ready)

    def connected_endpoints(self) -> set[str]:
        return {c.replica.endpoint for c in self._connections.values() if c.ready}

    def replica_times(self) -> list[ReplicaTimes]:
        """Of the table in force, in its order."""
        found: list[ReplicaTimes] = []
        for group in self._groups.values():
            means = [connection.times.means_s for connection in group.connections]
            common = set.intersection(*map(set, means)) if means else set[int]()
            for connection, own in zip(group.connections, means, strict=True):
                streams = [connection, *(c for key, c in self._lanes.items() if key[0] == connection.replica.process)]
                slowness = max(
                    (own[size] / max(1e-9, min(mean[size] for mean in means)) for size in common), default=0.0
                )
                found.append(
                    ReplicaTimes(
                        connection.replica.replica_id,
                        connection.ready,
                        sum(stream.num_sent for stream in streams),
                        sum(stream.outstanding for stream in streams),
                        slowness,
                        connection.times.newest_s * 1000,
                    )
                )
        return found

    def unserved(self) -> str | None:
        """None if every (layer, expert) has a connected replica, else one line saying what is waited for."""
        if self._missing is not None:
            return self._missing
        waiting = [name for name in self._table.group_names if not self._usable(name)]
        return f"waiting for a replica of expert group {', '.join(waiting)}" if waiting else None

    def absent_groups(self) -> frozenset[int]:
        """Indices in the table of groups without a connected replica."""
        return frozenset(index for index, name in enumerate(self._table.group_names) if not self._usable(name))

    @property
    def unserved_s(self) -> float:
        """How long some (layer, expert) has had no connected replica; 0 while all have."""
        return 0.0 if self._unserved_since is None else time.monotonic() - self._unserved_since

    def pick(
        self, group_name: str, size_class: int = 0, avoid: Collection[ExpertConnection] = ()
    ) -> ExpertConnection | None:
        """The connected replica of a group that will be done first with a frame; None if there is none now."""
        usable = self._usable(group_name)
        if len(usable) == 1 and not avoid:
            return self._use(group_name, usable[0])
        best = _find_first_done([c for c in usable if c not in avoid], size_class)
        return None if best is None else self._use(group_name, best)

    def sole_connections(self, lane: int = 0) -> list[ExpertConnection] | None:
        """By group, in the table's order; None unless every group has one replica, and that is connected.

        Each lane has streams of its own; they are dialled when they are first asked for.
        """
        if not self._groups or any(len(group.connections) != 1 for group in self._groups.values()):
            return None
        found = [self.pick(name) for name in self._groups]
        connected = [connection for connection in found if connection is not None]
        if len(connected) != len(found) or lane == 0:
            return connected if len(connected) == len(found) else None
        further = [self._lane(connection, lane) for connection in connected]
        return further if all(connection.ready for connection in further) else None

    def pick_unmeasured(self, group_name: str, size_class: int, chosen: ExpertConnection) -> ExpertConnection | None:
        """A replica of the group that gets no frames because it was slow, and may have recovered; most often None."""
        usable = self._usable(group_name)
        if len(usable) < 2:
            return None
        chosen_s = chosen.times.expect_s(size_class) or 0.0
        now_s = time.monotonic()
        for connection in usable:
            if (
                connection is not chosen
                and connection.is_idle
                and now_s - connection.answered_s > MEASURE_AGAIN_S
                and (connection.times.expect_s(size_class) or 0.0) > LIKE_SPEED * chosen_s + LIKE_S
            ):
                return connection
        return None

    def late_point(self, group_name: str, size_class: int) -> LatePoint:
        """Of first answers from a group to frames of a size."""
        key = group_name, size_class
        point = self._late_points.get(key)
        if point is None:
            point = self._late_points[key] = LatePoint()
        return point

    async def acquire(
        self, group_name: str, size_class: int, avoid: Collection[ExpertConnection], deadline: float
    ) -> ExpertConnection:
        """pick(), waiting for a connected replica until deadline.

        avoid: replicas that just failed this frame; taken only when there is no other.
        deadline: of the event loop's clock. Raises ExpertsUnavailable when it passes, TableChanged when the group
        left the table.
        """
        while True:
            best = self.pick(group_name, size_class, avoid) or self.pick(group_name, size_class)
            if best is not None:
                return best
            if self._table.group(group_name) is None:
                raise TableChanged(f"expert group {group_name} left the table")
            await self._wait_change(deadline, f"no replica of expert group {group_name} is connected")

    def has_other(self, group_name: str, tried: Collection[ExpertConnection]) -> bool:
        """Whether a replica of the group is connected that is not among those tried."""
        return any(connection not in tried for connection in self._usable(group_name))

    async def wait_newer(self, version: int, deadline: float, reason: str) -> None:
        """Wait until a table newer than version is in force. Raises ExpertsUnavailable with the reason at deadline."""
        while self._table.version <= version:
            await self._wait_change(deadline, reason)

    async def close(self) -> None:
        connections = [*self._connections.values(), *self._lanes.values()]
        await asyncio.gather(*(connection.close() for connection in connections))
        self._connections.clear()
        self._lanes.clear()
        for task in list(self._closing):
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)

    def _usable(self, group_name: str) -> Sequence[ExpertConnection]:
        """The connected replicas of a group whose arithmetic may be used now."""
        group = self._groups.get(group_name)
        if group is None:
            return ()
        ready = [connection for connection in group.connections if connection.ready]
        if group.numerics_id is None or self._options.numerics == "mixed":
            return ready
        alike = [connection for connection in ready if connection.replica.numerics_id == group.numerics_id]
        return alike if alike or self._options.numerics == "uniform" else ready

    def _use(self, group_name: str, connection: ExpertConnection) -> ExpertConnection:
        """Note whose arithmetic a group goes on with."""
        group = self._groups[group_name]
        numerics_id = connection.replica.numerics_id
        if group.numerics_id != numerics_id:
            if group.numerics_id is not None:
                self.counters.num_crossings += 1
                if self._options.numerics != "mixed":
                    logger.warning("expert group %s goes on with numerics_id=%s", group_name, numerics_id)
            group.numerics_id = numerics_id
        return connection

    def _describe_missing(self) -> str | None:
        missing = self._table.missing(self._serving_layer_ids(), self._config.n_routed_experts)
        if not missing:
            return None
        layer_id, expert_id = missing[0]
        return f"no expert group hosts layer {layer_id}, expert {expert_id} ({len(missing)} such pairs)"

    def _serving_layer_ids(self) -> list[int]:
        """Layers that a step runs: the MTP layer's experts are not asked for by the trunk."""
        return [layer for layer in self._config.moe_layer_ids if layer < self._config.num_hidden_layers]

    def _lane(self, connection: ExpertConnection, lane: int) -> ExpertConnection:
        """Heartbeats are counted once for a replica, by its first connection; what it takes is measured by all."""
        key = connection.replica.process, lane
        if key not in self._lanes:
            self._lanes[key] = ExpertConnection(
                connection.replica,
                self._config.hidden_size,
                lambda: None,
                heartbeats=self._options.heartbeats,
                times=connection.times,
                tls=self._options.tls,
            )
        return self._lanes[key]

    async def _wait_change(self, deadline: float, reason: str) -> None:
        self._changed.clear()
        try:
            async with asyncio.timeout_at(deadline):
                await self._changed.wait()
        except TimeoutError as error:
            raise ExpertsUnavailable(reason) from error

    def _notify(self) -> None:
        self._changed.set()
        if self.unserved() is None:
            self._unserved_since = None
        elif self._unserved_since is None:
            self._unserved_since = time.monotonic()

    async def _release(self, group_name: str, connection: ExpertConnection) -> None:
        """Close a connection that left the table once nobody waits for its frames."""
        deadline = asyncio.get_running_loop().time() + CLOSE_GRACE_S
        while connection.outstanding and asyncio.get_running_loop().time() < deadline:
            if self._usable(group_name):
                connection.hand_over()
            else:  # better a late answer than none
                await asyncio.sleep(0.01)
        await connection.close()


def _find_first_done(connections: Sequence[ExpertConnection], size_class: int) -> ExpertConnection | None:
    """Those that are about equal take turns; one that was never asked counts as fast as the fastest."""
    if len(connections) < 2:
        return connections[0] if connections else None
    expected = [connection.times.expect_s(size_class) for connection in connections]
    fastest_s = min((value for value in expected if value is not None), default=0.0)
    best: ExpertConnection | None = None
    best_key = (0.0, 0, 0)
    for connection, value in zip(connections, expected, strict=True):
        own_s = fastest_s if value is None or value <= LIKE_SPEED * fastest_s + LIKE_S else value
        key = (connection.busy_s() + own_s, connection.outstanding, connection.num_sent)
        if best is None or key < best_key:
            best, best_key = connection, key
    return best
