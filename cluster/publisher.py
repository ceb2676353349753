"""Keeps one actor's record in the store up to date: what both kinds of actor do at every start.

It counts failed starts and delays the next one, so that neither a crash in native code (which Ray restarts at once,
about three times a second) nor a bad file eats the machine.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace
from typing import Any, Generic, TypeVar

from cluster.errors import BadRecord, StoreUnavailable
from cluster.record_store import RecordStore
from cluster.records import ActorRecord, StartState, compute_start_delay_s, count_failed_starts

logger = logging.getLogger(__name__)

# Progress is for eyes: more often helps nobody.
_PROGRESS_INTERVAL_S = 0.25
_PUBLISH_TRIES = 15

RecordT = TypeVar("RecordT", bound=ActorRecord)


class Publisher(Generic[RecordT]):
    """Owns the record. Called from one thread at a time."""

    def __init__(self, store: RecordStore, key: bytes, record_type: type[RecordT], **fields: Any) -> None:
        """Publishes `starting`. fields: those of record_type that ActorRecord does not have, and actor_id, node and
        node_id."""
        self._store = store
        self._key = key
        previous = _read_previous(store, key, record_type)
        now = time.time()
        incarnation = time.time_ns()
        if previous is not None:
            incarnation = max(incarnation, previous.incarnation + 1)
        self.record: RecordT = record_type(
            state=StartState.STARTING,
            incarnation=incarnation,
            pid=os.getpid(),
            endpoint=None,
            message="starting",
            num_failed_starts=count_failed_starts(previous, now),
            load_progress=0.0,
            started_at=now,
            ready_at=None,
            **fields,
        )
        self._published_s = 0.0
        self._publish()

    def wait_turn(self) -> None:
        """Sleep as long as a process should that failed to start before."""
        delay_s = compute_start_delay_s(self.record.num_failed_starts)
        if delay_s > 0:
            self.update(message=f"waits {delay_s:.0f} s after {self.record.num_failed_starts} failed starts")
            time.sleep(delay_s)

    def show_progress(self, fraction: float) -> None:
        if time.monotonic() - self._published_s >= _PROGRESS_INTERVAL_S:
            self.update(load_progress=fraction, message=f"loading weights, {fraction:.0%}")

    def update(self, **changes: Any) -> None:
        self.record = replace(self.record, **changes)
        self._publish()

    def publish_ready(self, **changes: Any) -> None:
        """changes: endpoint, and what else is known only now."""
        self.update(state=StartState.READY, message="", load_progress=1.0, ready_at=time.time(), **changes)

    def publish_failure(self, error: BaseException) -> None:
        message = " ".join(f"{type(error).__name__}: {error}".split())[:1000]
        self.update(state=StartState.FAILED, message=message)

    def _publish(self) -> None:
        data = self.record.to_json()
        for attempt in range(_PUBLISH_TRIES):
            try:
                self._store.put(self._key, data)
                break
            except StoreUnavailable as error:
                if attempt == _PUBLISH_TRIES - 1:
                    raise
                logger.warning("cannot publish: %s; trying again", error)
                time.sleep(1.0)
        self._published_s = time.monotonic()


def _read_previous(store: RecordStore, key: bytes, record_type: type[RecordT]) -> RecordT | None:
    data = store.get(key)
    if data is None:
        return None
    try:
        return record_type.from_json(data)
    except BadRecord as error:
        logger.warning("ignoring the record of the start before: %s", error)
        return None
