"""What the controller keeps in the record store for a successor: desired state, tables, events, what is under way."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

from cluster import desired_state
from cluster.call_thread import CallThread
from cluster.desired_state import DesiredState
from cluster.errors import BadRecord, StoreUnavailable
from cluster.event_log import EventLog
from cluster.planner import Memory
from cluster.rebalancing import Rebalancing, rebalancing_from_record
from cluster.record_store import RecordStore
from cluster.records import EVENTS_KEY, SPEC_KEY, UPGRADE_KEY, desired_key, rebalancing_key, table_key
from cluster.spec import ClusterSpec, spec_from_json
from cluster.stored_table import memory_from_json, memory_to_json
from cluster.track import Track
from cluster.upgrade import Upgrade, upgrade_from_json
from router.expert_table import ExpertTable

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Predecessor(NamedTuple):
    """What another controller left. track: of the weights that new requests are for; beside: of the others, while the
    cluster is upgraded."""

    track: Track
    rebalancing: Rebalancing | None
    upgrade: Upgrade | None
    beside: Track | None


class StoredState:
    """Everything raises StoreUnavailable unless it says otherwise."""

    def __init__(self, store: RecordStore, calls: CallThread, events: EventLog, clock: Callable[[], float]) -> None:
        """clock: seconds, monotonic."""
        self._store = store
        self._calls = calls
        self._events = events
        self._clock = clock

    async def put(self, key: bytes, value: bytes) -> None:
        await self._calls.call(lambda: self._store.put(key, value))

    async def delete(self, key: bytes) -> None:
        await self._calls.call(lambda: self._store.delete(key))

    async def fetch(self, key: bytes) -> bytes | None:
        return await self._calls.call(lambda: self._store.get(key))

    async def fetch_all(self, prefix: bytes) -> Mapping[bytes, bytes]:
        return await self._calls.call(lambda: self._store.get_all(prefix))

    async def keep_memory(self, track: Track, memory: Memory) -> None:
        """Keep table and digests for a successor, before they are pushed.

        With the store down they are pushed all the same: routers must hear of a dead replica, and a successor outbids
        whatever version they hold. So this raises nothing.
        """
        stored = track.stored
        if stored is not None and (memory.table, memory.digests) == (stored.table, stored.digests):
            return
        if track.memory is None or memory.table is not track.memory.table:
            self._events.add("expert table", "publish", f"version {memory.table.version}: {_describe(memory.table)}")
        try:
            await self.put(table_key(track.spec.weights_version), memory_to_json(memory))
        except StoreUnavailable:
            # The look at the records has said so; the next turn tries again.
            return
        track.stored = memory

    async def keep_events(self) -> None:
        """Those that are new; the next turn tries again where the store is down."""
        if self._events.is_stored:
            return
        try:
            await self.put(EVENTS_KEY, self._events.to_json())
        except StoreUnavailable:
            return
        self._events.is_stored = True

    async def take_over(self, track: Track) -> Predecessor:
        """track: as the cluster began. Nothing of it, and no event, changes before all has been read."""
        events = await self.fetch(EVENTS_KEY)
        upgrade = _read(await self.fetch(UPGRADE_KEY), upgrade_from_json)
        spec = _read(await self.fetch(SPEC_KEY), spec_from_json)
        for each in (None if upgrade is None else upgrade.serving, spec):
            if each is not None and each.weights_version > track.spec.weights_version:
                track = Track(each, track.factory.for_spec(each), desired_state.begin(each))
        rebalancing = await self._fetch_rebalancing(track.spec)
        beside: Track | None = None
        if upgrade is not None and upgrade.beside is not None:
            beside = Track(upgrade.beside, track.factory.for_spec(upgrade.beside), desired_state.begin(upgrade.beside))
        tracks = [track] if beside is None else [track, beside]
        for each, (desired, memory) in zip(tracks, [await self._fetch_track(each) for each in tracks], strict=True):
            each.desired, each.memory = desired, memory
        if events is not None:
            try:
                self._events.restore(events)
            except BadRecord as error:
                logger.warning("starting without a predecessor's events: %s", error)
            else:
                self._events.add("controller", "start", "it goes on where another one ended")
        return Predecessor(track, rebalancing, upgrade, beside)

    async def _fetch_track(self, track: Track) -> tuple[DesiredState, Memory]:
        version = track.spec.weights_version
        table = _read(await self.fetch(table_key(version)), memory_from_json)
        desired = _read(await self.fetch(desired_key(version)), desired_state.desired_from_json)
        desired, memory = desired or track.desired, table or Memory()
        logger.info("weights=%d table version=%d desired version=%d", version, memory.table.version, desired.version)
        return desired, memory

    async def _fetch_rebalancing(self, spec: ClusterSpec) -> Rebalancing | None:
        stored = await self.fetch(rebalancing_key(spec.weights_version))
        found = _read(stored, lambda data: rebalancing_from_record(data, self._clock()))
        if found is None or set(found.proposal.group_names) != {group.name for group in spec.groups}:
            return None
        return found


def _read(stored: bytes | None, parse: Callable[[bytes], T]) -> T | None:
    """What cannot be read is as good as absent: the cluster starts without it."""
    if stored is None:
        return None
    try:
        return parse(stored)
    except BadRecord as error:
        logger.warning("starting without what a predecessor left: %s", error)
        return None


def _describe(table: ExpertTable) -> str:
    return " ".join(
        f"{group.name}={','.join(replica.replica_id for replica in group.replicas) or 'none'}" for group in table.groups
    )
