"""Takes records out of the journal's folder into the ledger, and deletes what is in the ledger.

Reading anew from the start is always right, because the ledger takes a record's id once only; so nothing has to be
remembered, and a reader may be killed anywhere. The slots of a front that is dead are its requests that were cut off.
"""

from __future__ import annotations

import fcntl
import json
import logging
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from router.tenancy.journal import (
    HEADER_OFFSET,
    LOG_SUFFIX,
    RUNNING_SUFFIX,
    SLOT_BYTES,
    WORDS_PER_SLOT,
    SlotHeader,
    SlotState,
    Word,
)
from router.tenancy.usage import Outcome, UsageRecord

logger = logging.getLogger(__name__)

# Records of one transaction.
BATCH_RECORDS = 1000


class JournalReader:
    """Of all fronts that write into one folder. Used by one thread."""

    def __init__(self, folder: Path, store: Callable[[Sequence[UsageRecord]], None]) -> None:
        """store: puts records into the ledger for good, or raises."""
        self._folder = folder
        self._store = store
        self._offsets: dict[Path, int] = {}

    def collect(self) -> int:
        """Take what there is. Returns the number of records that were read. Raises what store raises, and OSError."""
        count = 0
        for running in sorted(self._folder.glob(f"*{RUNNING_SUFFIX}")):
            with _lock_if_dead(running) as is_dead:
                count += self._collect_front(running, is_dead=is_dead)
        return count

    def _collect_front(self, running: Path, *, is_dead: bool) -> int:
        count = 0
        logs = sorted(self._folder.glob(f"{running.name.removesuffix(RUNNING_SUFFIX)}-*{LOG_SUFFIX}"))
        for index, log in enumerate(logs):
            count += self._collect_log(log)
            if index < len(logs) - 1 or is_dead:
                self._delete(log)
        if is_dead:
            # Behind the logs: what is in both has ended, and the ledger keeps what it had first.
            records = list(_read_slots(running))
            self._store(records)
            count += len(records)
            running.unlink(missing_ok=True)
            logger.info("collected what a front left behind records=%d", count)
        return count

    def _collect_log(self, log: Path) -> int:
        with log.open("rb") as source:
            source.seek(self._offsets.get(log, 0))
            data = source.read()
        whole = data[: data.rfind(b"\n") + 1]
        records = [record for line in whole.splitlines() if (record := _read_line(line, log)) is not None]
        for start in range(0, len(records), BATCH_RECORDS):
            self._store(records[start : start + BATCH_RECORDS])
        self._offsets[log] = self._offsets.get(log, 0) + len(whole)
        return len(records)

    def _delete(self, log: Path) -> None:
        log.unlink(missing_ok=True)
        self._offsets.pop(log, None)


@contextmanager
def _lock_if_dead(running: Path) -> Iterator[bool]:
    """Whether the front that wrote the file is gone; nobody else collects it meanwhile then."""
    try:
        descriptor = os.open(running, os.O_RDONLY)
    except FileNotFoundError:  # another reader was faster
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_dead = True
    except BlockingIOError:
        is_dead = False
    try:
        yield is_dead
    finally:
        os.close(descriptor)


def _read_slots(running: Path) -> Iterator[UsageRecord]:
    """The requests that a dead front was working on, or had not logged."""
    with running.open("rb") as source:
        size_bytes = os.fstat(source.fileno()).st_size
        if size_bytes == 0:
            return
        with mmap.mmap(source.fileno(), size_bytes, access=mmap.ACCESS_READ) as mapped:
            for start in range(0, size_bytes - SLOT_BYTES + 1, SLOT_BYTES):
                words = memoryview(mapped[start : start + SLOT_BYTES]).cast("Q")
                assert len(words) == WORDS_PER_SLOT
                if words[Word.STATE] == SlotState.FREE:
                    continue
                data = mapped[start + HEADER_OFFSET : start + HEADER_OFFSET + words[Word.HEADER_BYTES]]
                try:
                    header = SlotHeader(*json.loads(data))
                except (ValueError, TypeError) as error:
                    logger.error("a slot of %s cannot be read: %s", running.name, error)
                    continue
                outcome = Outcome.FINISHED if words[Word.STATE] == SlotState.ENDED else Outcome.CUT_OFF
                counters = words[Word.TOKENS_IN : Word.CHANGED_MS].tolist()
                ended_at = words[Word.CHANGED_MS] / 1000
                yield UsageRecord(*header[:5], outcome, header.started_at, ended_at, *counters)


def _read_line(line: bytes, log: Path) -> UsageRecord | None:
    try:
        return UsageRecord.from_line(line)
    except (ValueError, KeyError, TypeError) as error:
        logger.error("a line of %s cannot be read: %s", log.name, error)
        return None
