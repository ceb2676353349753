"""The router's live view of the expert groups: the table in force and a connection per replica.

A new table is applied make-before-break: connections to replicas that stay are kept, new ones are dialled, and those
that left are closed once their outstanding frames are answered.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from experts.model_config import ModelConfig
from router.errors import ExpertsUnavailable, StaleTable, TableChanged
from router.expert_connection import ExpertConnection
from router.expert_table import EMPTY_TABLE, ExpertTable, ReplicaEntry

logger = logging.getLogger(__name__)

# How long a replica that left the table may still answer what it was sent.
CLOSE_GRACE_S = 30.0


class ExpertPool:
    """Owned by one event loop."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._table = EMPTY_TABLE
        self._connections: dict[ReplicaEntry, ExpertConnection] = {}
        self._changed = asyncio.Event()
        self._expert_groups: dict[int, npt.NDArray[np.int64]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._unserved_since: float | None = time.monotonic()

    @property
    def table(self) -> ExpertTable:
        return self._table

    def expert_groups(self, layer_id: int) -> npt.NDArray[np.int64]:
        """[n_routed_experts] group indices of the table in force."""
        groups = self._expert_groups.get(layer_id)
        if groups is None:
            groups = self._table.expert_groups(layer_id, self._config.n_routed_experts)
            self._expert_groups[layer_id] = groups
        return groups

    def apply(self, table: ExpertTable) -> None:
        """Put a newer table in force. Raises StaleTable for an older version; the same version changes nothing."""
        if table.version < self._table.version:
            raise StaleTable(f"expert table {table.version} is older than {self._table.version}, which is in force")
        if table.version == self._table.version:
            return
        wanted = {replica for group in table.groups for replica in group.replicas}
        for replica in [replica for replica in self._connections if replica not in wanted]:
            leaving = self._connections.pop(replica)
            task = asyncio.get_running_loop().create_task(self._close_when_idle(leaving))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        for replica in wanted:
            if replica not in self._connections:
                self._connections[replica] = ExpertConnection(replica, self._config.hidden_size, self._notify)
        self._table = table
        self._expert_groups.clear()
        logger.info("expert table applied version=%d num_replicas=%d", table.version, len(wanted))
        self._notify()

    def connected_replica_ids(self) -> list[str]:
        return sorted(c.replica.replica_id for c in self._connections.values() if c.ready)

    def unserved(self) -> str | None:
        """None if every (layer, expert) has a connected replica, else one line saying what is waited for."""
        missing = self._table.missing(self._serving_layer_ids(), self._config.n_routed_experts)
        if missing:
            layer_id, expert_id = missing[0]
            return f"no expert group hosts layer {layer_id}, expert {expert_id} ({len(missing)} such pairs)"
        waiting = [group.name for group in self._table.groups if self._best(group.name, ()) is None]
        return f"waiting for a replica of expert group {', '.join(waiting)}" if waiting else None

    @property
    def unserved_s(self) -> float:
        """How long some (layer, expert) has had no connected replica; 0 while all have."""
        return 0.0 if self._unserved_since is None else time.monotonic() - self._unserved_since

    def pick(self, group_name: str) -> ExpertConnection | None:
        """The connected replica of a group with the least outstanding frames; None if there is none now."""
        return self._best(group_name, ())

    async def acquire(self, group_name: str, avoid: Collection[ExpertConnection], deadline: float) -> ExpertConnection:
        """The connected replica of a group with the least outstanding frames, waiting for one until deadline.

        avoid: replicas that just failed this frame; taken only when there is no other.
        deadline: of the event loop's clock. Raises ExpertsUnavailable when it passes, TableChanged when the group
        left the table.
        """
        while True:
            best = self._best(group_name, avoid) or self._best(group_name, ())
            if best is not None:
                return best
            if self._table.group(group_name) is None:
                raise TableChanged(f"expert group {group_name} left the table")
            await self._wait_change(deadline, f"no replica of expert group {group_name} is connected")

    def has_other(self, group_name: str, tried: Collection[ExpertConnection]) -> bool:
        """Whether a replica of the group is connected that is not among those tried."""
        return self._best(group_name, tried) is not None

    async def wait_newer(self, version: int, deadline: float, reason: str) -> None:
        """Wait until a table newer than version is in force. Raises ExpertsUnavailable with the reason at deadline."""
        while self._table.version <= version:
            await self._wait_change(deadline, reason)

    async def close(self) -> None:
        await asyncio.gather(*(connection.close() for connection in self._connections.values()))
        self._connections.clear()
        for task in list(self._closing):
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)

    def _best(self, group_name: str, avoid: Collection[ExpertConnection]) -> ExpertConnection | None:
        group = self._table.group(group_name)
        if group is None:
            return None
        ready = [
            connection
            for replica in group.replicas
            if (connection := self._connections.get(replica)) is not None
            and connection.ready
            and connection not in avoid
        ]
        return min(ready, key=lambda connection: connection.outstanding, default=None)

    def _serving_layer_ids(self) -> list[int]:
        """Layers that a step runs: the MTP layer's experts are not asked for by the trunk."""
        return [layer for layer in self._config.moe_layer_ids if layer < self._config.num_hidden_layers]

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

    async def _close_when_idle(self, connection: ExpertConnection) -> None:
        deadline = asyncio.get_running_loop().time() + CLOSE_GRACE_S
        while connection.outstanding and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
        await connection.close()
