"""What the controller sees of its actors: their records, which of them exist, and what the probes hear."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol, TypeVar

from cluster.autoscaler import ReplicaLoad
from cluster.call_thread import CallThread
from cluster.errors import BadRecord, StoreUnavailable
from cluster.event_log import EventLog
from cluster.planner import Health, Observation, RouterReport
from cluster.records import REPLICA_PREFIX, ROUTER_PREFIX, ActorRecord, ReplicaRecord, RouterRecord
from cluster.stored_state import StoredState
from cluster.track import Factory

logger = logging.getLogger(__name__)

# Which actors exist is asked less often than what they published: only one that failed in its constructor needs it.
LIST_INTERVAL_S = 1.0

RecordT = TypeVar("RecordT", bound=ActorRecord)


class Probed(Protocol):
    """The part of cluster.probes.Probes that looks."""

    @property
    def replica_health(self) -> Mapping[tuple[str, int], Health]: ...

    @property
    def router_reports(self) -> Mapping[tuple[str, int], RouterReport]: ...

    @property
    def replica_loads(self) -> Mapping[tuple[str, int], ReplicaLoad]: ...

    def set_targets(self, replicas: Mapping[tuple[str, int], str], routers: Mapping[tuple[str, int], str]) -> None: ...


class Observer:
    """observation: the last look."""

    def __init__(
        self,
        stored: StoredState,
        ray_calls: CallThread,
        probed: Probed,
        events: EventLog,
        clock: Callable[[], float],
    ) -> None:
        """clock: seconds, monotonic."""
        self._stored = stored
        self._ray_calls = ray_calls
        self._probed = probed
        self._events = events
        self._clock = clock
        self._listed_s: float | None = None
        self.observation = Observation(
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

    def start_draining(self) -> None:
        """From now on, the cluster is being stopped."""
        self.observation = replace(self.observation, draining=True)

    async def look(self, factory: Factory, drained: frozenset[tuple[str, int]], *, has_planned: bool) -> None:
        """Read the records, point the probes at them. What cannot be read stays as it was seen last. drained: replicas,
        by start, that have answered all. has_planned: this is not the first look."""
        now_s = self._clock()
        observation = replace(self.observation, now_s=now_s)
        try:
            replicas = await self._stored.fetch_all(REPLICA_PREFIX)
            routers = await self._stored.fetch_all(ROUTER_PREFIX)
            observation = replace(
                observation, replicas=_parse(replicas, ReplicaRecord), routers=_parse(routers, RouterRecord)
            )
            if self._listed_s is None or now_s - self._listed_s >= LIST_INTERVAL_S:
                self._listed_s = now_s
                existing_ids = await self._ray_calls.call(factory.list_existing)
                node_ids = await self._ray_calls.call(factory.list_nodes)
                if observation.existing_ids is None and has_planned:
                    self._events.add("control plane", "resume", "Ray's control service answers again")
                observation = replace(observation, existing_ids=existing_ids, node_ids=node_ids)
        except StoreUnavailable as error:
            if observation.existing_ids is not None:
                self._events.add("control plane", "pause", f"nothing is started or ended meanwhile: {error}")
            observation = replace(observation, existing_ids=None)
            # Asked again at the next turn.
            self._listed_s = None
        self._probed.set_targets(_get_endpoints(observation.replicas), _get_endpoints(observation.routers))
        self.observation = replace(
            observation,
            replica_health=self._probed.replica_health,
            router_reports=self._probed.router_reports,
            drained=drained,
            draining=self.observation.draining,
        )

    def note_existing(self, added: set[str], removed: set[str]) -> None:
        """What was just done shows before Ray is asked again."""
        existing_ids = self.observation.existing_ids
        if existing_ids is not None:
            self.observation = replace(self.observation, existing_ids=(existing_ids | added) - removed)


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
