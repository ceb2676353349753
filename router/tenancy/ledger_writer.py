"""Writes what fronts noted in the journal's folder into the ledger: a process of its own, beside the way of tokens.

It may be killed anywhere and run twice; a database that is away is waited for, with everything kept in the journal.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from experts.stop_signal import StopSignal
from router.tenancy.errors import LedgerError
from router.tenancy.journal_reader import JournalReader
from router.tenancy.ledger import Ledger
from router.tenancy.usage import SECONDS_PER_DAY

logger = logging.getLogger(__name__)

COLLECT_INTERVAL_S = 0.5
_FIRST_RETRY_S = 0.5
_LAST_RETRY_S = 30.0
_COMPACT_INTERVAL_S = 3600.0


def collect_once(journal: Path, url: str) -> int:
    """Take what there is into the ledger. Returns how many records were read. Raises LedgerError, OSError."""
    ledger = Ledger(url)
    try:
        return JournalReader(journal, ledger.add).collect()
    finally:
        ledger.close()


class LedgerWriter:
    """Used by one thread."""

    def __init__(self, journal: Path, url: str, retention_days: int, stopped: StopSignal) -> None:
        """retention_days: after which records are kept as sums by day. stopped: ends run()."""
        self._journal = journal
        self._url = url
        self._retention_days = retention_days
        self._stopped = stopped
        self._compacted_s: float | None = None

    def run(self) -> None:
        """Until it is stopped; then collects once more."""
        retry_s = _FIRST_RETRY_S
        ledger: Ledger | None = None
        reader: JournalReader | None = None
        is_last = False
        while not is_last:
            is_last = self._stopped.is_set()
            try:
                ledger = ledger or Ledger(self._url)
                reader = reader or JournalReader(self._journal, ledger.add)
                reader.collect()
                self._compact(ledger)
                pause_s, retry_s = COLLECT_INTERVAL_S, _FIRST_RETRY_S
            except (LedgerError, OSError) as error:
                logger.error("usage stays in the journal, next try in %.1f s: %s", retry_s, error)
                pause_s, retry_s = retry_s, min(2 * retry_s, _LAST_RETRY_S)
            if not is_last:
                self._stopped.wait(pause_s)
        if ledger is not None:
            ledger.close()

    def _compact(self, ledger: Ledger) -> None:
        now_s = time.monotonic()
        if self._compacted_s is not None and now_s - self._compacted_s < _COMPACT_INTERVAL_S:
            return
        self._compacted_s = now_s
        if (count := ledger.compact(time.time() - self._retention_days * SECONDS_PER_DAY)) > 0:
            logger.info("added up by day records=%d", count)
