"""Where a front writes down what requests use, so that nothing is lost if it is killed at any moment.

A front has two kinds of files in the journal's folder. NAME.running is mapped into memory and has a slot for each
request being worked on; counting a token is a store to memory, before the token is sent. NAME-N.log gets a line per
request that has ended. Both are the kernel's once they are written, whatever becomes of the process; only when the
machine itself fails, what its disk had not got yet is lost, usually less than the last half minute.
The front holds a lock on its running file as long as it lives. Whoever takes the records away (journal_reader.py) knows
by that whether the slots still change.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import mmap
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from router.tenancy.errors import JournalFull, LedgerError
from router.tenancy.usage import Outcome, UsageRecord

logger = logging.getLogger(__name__)

# A slot is some counters of 8 bytes, and the rest of the record as JSON. A model's name has up to 256 characters.
SLOT_BYTES = 2048
WORDS_PER_SLOT = SLOT_BYTES // 8
HEADER_OFFSET = 64
# Another file is begun then, so that the reader can delete what it has.
MAX_LOG_BYTES = 4 * 2**20
RUNNING_SUFFIX, LOG_SUFFIX = ".running", ".log"


class SlotState:
    """FREE: nobody's. RUNNING: of a request that goes on. ENDED: of one that has ended, but is in no log yet."""

    FREE, RUNNING, ENDED = range(3)


class Word:
    """What the words of a slot are. CHANGED_MS: since the epoch; when the request was last heard of."""

    STATE, TOKENS_IN, TOKENS_CACHED, TOKENS_OUT, ROUTER_US, EXPERT_US, CHANGED_MS, HEADER_BYTES = range(8)


class SlotHeader(NamedTuple):
    """The part of a record that does not change."""

    id: str
    request_id: str
    team: str
    key_id: str
    model: str
    started_at: float


class UsageJournal:
    """Of one front; used by one thread."""

    def __init__(self, folder: Path, num_slots: int, clock: Callable[[], float] = time.time) -> None:
        """num_slots: requests that may be running, or wait to be logged, at once. clock: seconds since the epoch.
        Raises LedgerError if the folder cannot be written."""
        self._clock = clock
        self._folder = folder
        self._name = uuid.uuid4().hex
        self._log_number = 0
        self._log_bytes = 0
        self._unlogged: list[tuple[int, UsageRecord]] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = _create_locked(folder / f"{self._name}{RUNNING_SUFFIX}", num_slots * SLOT_BYTES)
            self._log = self._open_log()
        except OSError as error:
            raise LedgerError(f"cannot write the usage journal in {folder}: {error.strerror}") from None
        self._map = mmap.mmap(self._descriptor, num_slots * SLOT_BYTES)
        self._words = memoryview(self._map).cast("Q")
        self._free = list(range(num_slots - 1, -1, -1))

    def begin(self, *, request_id: str, team: str, key_id: str, model: str, tokens_in: int) -> JournalEntry:
        """A request begins. Raises JournalFull if it could not be written down."""
        if self._unlogged:
            self._flush()
        header = SlotHeader(uuid.uuid4().hex, request_id, team, key_id, model, self._clock())
        data = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if not self._free or len(data) > SLOT_BYTES - HEADER_OFFSET:
            raise JournalFull("there is no place in the usage journal: is the disk full?")
        slot = self._free.pop()
        start = slot * SLOT_BYTES + HEADER_OFFSET
        self._map[start : start + len(data)] = data
        base = slot * WORDS_PER_SLOT
        for word, value in ((Word.HEADER_BYTES, len(data)), (Word.TOKENS_IN, tokens_in)):
            self._words[base + word] = value
        for word in (Word.TOKENS_CACHED, Word.TOKENS_OUT, Word.ROUTER_US, Word.EXPERT_US):
            self._words[base + word] = 0
        self._words[base + Word.CHANGED_MS] = int(header.started_at * 1000)
        # Last: from here on the slot says something.
        self._words[base + Word.STATE] = SlotState.RUNNING
        return JournalEntry(self, slot, header, self._words[base : base + WORDS_PER_SLOT], self._clock)

    def end(self, slot: int, header: SlotHeader, words: memoryview[int], outcome: Outcome) -> None:
        """A request has ended. What cannot be logged now stays in its slot, and is logged as soon as it can be."""
        record = UsageRecord(
            *header[:5], outcome, header.started_at, self._clock(), *words[Word.TOKENS_IN : Word.CHANGED_MS].tolist()
        )
        self._unlogged.append((slot, record))
        if outcome is Outcome.FINISHED:
            words[Word.STATE] = SlotState.ENDED
        self._flush()

    def close(self) -> None:
        """The front ends in order: nothing of it is running any more."""
        self._flush()
        os.close(self._log)
        # The map has a copy of the descriptor, and ends when nobody has an entry any more: too late for the lock.
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)

    def _flush(self) -> None:
        while self._unlogged:
            slot, record = self._unlogged[0]
            try:
                self._append(record.to_line())
            except OSError as error:
                logger.error("usage is not logged yet records=%d reason=%s", len(self._unlogged), error.strerror)
                return
            # Logged first: a record in both is one record, by its id.
            self._words[slot * WORDS_PER_SLOT + Word.STATE] = SlotState.FREE
            self._free.append(slot)
            del self._unlogged[0]

    def _append(self, line: bytes) -> None:
        """Raises OSError; a line that was written in part is written again, in a file of its own."""
        if self._log_bytes + len(line) > MAX_LOG_BYTES:
            log = self._open_log()
            os.close(self._log)
            self._log, self._log_bytes = log, 0
        written = os.write(self._log, line)
        self._log_bytes += written
        if written < len(line):
            self._log_bytes = MAX_LOG_BYTES
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _open_log(self) -> int:
        self._log_number += 1
        path = self._folder / f"{self._name}-{self._log_number:06d}{LOG_SUFFIX}"
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_EXCL, 0o600)


class JournalEntry:
    """One request that is being worked on. Counters are set before the client is sent what they count."""

    def __init__(
        self,
        journal: UsageJournal,
        slot: int,
        header: SlotHeader,
        words: memoryview[int],
        clock: Callable[[], float],
    ) -> None:
        self._clock = clock
        self._journal = journal
        self._slot = slot
        self._header = header
        self._words = words

    def set_counters(self, *, tokens_cached: int, tokens_out: int, router_us: int, expert_us: int) -> None:
        words = self._words
        words[Word.TOKENS_OUT] = tokens_out
        words[Word.TOKENS_CACHED] = tokens_cached
        words[Word.ROUTER_US] = router_us
        words[Word.EXPERT_US] = expert_us
        words[Word.CHANGED_MS] = int(self._clock() * 1000)

    def end(self, outcome: Outcome) -> None:
        """Once. A request that failed before anything was generated used nothing."""
        if outcome is Outcome.FAILED and self._words[Word.TOKENS_OUT] == 0:
            self._words[Word.TOKENS_IN] = 0
        self._journal.end(self._slot, self._header, self._words, outcome)


def _create_locked(path: Path, size_bytes: int) -> int:
    """A file of zeros that has its place on the disk, locked before anybody can see it under its name."""
    hidden = path.with_name(f".{path.name}")
    descriptor = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        hidden.rename(path)
    except BaseException:
        os.close(descriptor)
        hidden.unlink(missing_ok=True)
        raise
    return descriptor
