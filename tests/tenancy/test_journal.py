"""What fronts write down, and how it gets into the ledger, whoever dies in between."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from router.tenancy import journal as journal_module
from router.tenancy.errors import JournalFull, LedgerError
from router.tenancy.journal import JournalEntry, UsageJournal
from router.tenancy.journal_reader import JournalReader
from router.tenancy.ledger import Ledger
from router.tenancy.ledger_writer import collect_once
from router.tenancy.usage import Outcome, UsageRecord

REPOSITORY = Path(__file__).parents[2]


class Store:
    """Keeps a record once, as the ledger does. num_failures: the next calls raise."""

    def __init__(self) -> None:
        self.records: dict[str, UsageRecord] = {}
        self.num_failures = 0

    def __call__(self, records: Sequence[UsageRecord]) -> None:
        if self.num_failures > 0:
            self.num_failures -= 1
            raise LedgerError("away")
        for record in records:
            self.records.setdefault(record.id, record)

    def list_tokens(self) -> list[tuple[str, int, int]]:
        return sorted((each.outcome.value, each.tokens_in, each.tokens_out) for each in self.records.values())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def begin(journal: UsageJournal, tokens_in: int = 3, **changes: str) -> JournalEntry:
    fields = {"request_id": "r", "team": "red", "key_id": "k1", "model": "m", **changes}
    return journal.begin(tokens_in=tokens_in, **fields)


def count(entry: JournalEntry, tokens_out: int) -> None:
    entry.set_counters(tokens_cached=1, tokens_out=tokens_out, router_us=10 * tokens_out, expert_us=20 * tokens_out)


def list_files(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.iterdir())


def test_a_request_that_ended_is_read_and_one_that_goes_on_is_not(folder: Path) -> None:
    journal, store = UsageJournal(folder, 4, clock=lambda: 1e9), Store()
    ended, running = begin(journal), begin(journal)
    count(ended, 7)
    count(running, 5)
    ended.end(Outcome.FINISHED)
    JournalReader(folder, store).collect()
    (record,) = store.records.values()
    assert (record.team, record.key_id, record.model, record.request_id) == ("red", "k1", "m", "r")
    assert (record.tokens_in, record.tokens_cached, record.tokens_out) == (3, 1, 7)
    assert (record.router_us, record.expert_us, record.started_at, record.ended_at) == (70, 140, 1e9, 1e9)
    running.end(Outcome.CUT_OFF)
    JournalReader(folder, store).collect()
    assert store.list_tokens() == [("cut_off", 3, 5), ("finished", 3, 7)]


def test_what_fails_before_its_first_token_used_nothing(folder: Path) -> None:
    journal, store = UsageJournal(folder, 4), Store()
    begin(journal).end(Outcome.FAILED)
    begin(journal).end(Outcome.CUT_OFF)
    JournalReader(folder, store).collect()
    assert store.list_tokens() == [("cut_off", 3, 0), ("failed", 0, 0)]


def test_a_reader_goes_on_where_it_was_and_another_starts_anew_without_harm(folder: Path) -> None:
    journal, store = UsageJournal(folder, 4), Store()
    reader = JournalReader(folder, store)
    for number in range(5):
        begin(journal).end(Outcome.FINISHED)
        assert reader.collect() == 1
        assert JournalReader(folder, store).collect() == number + 1
    assert len(store.records) == 5


def test_what_could_not_be_stored_is_stored_the_next_time(folder: Path) -> None:
    journal, store = UsageJournal(folder, 4), Store()
    begin(journal).end(Outcome.FINISHED)
    reader = JournalReader(folder, store)
    store.num_failures = 1
    with pytest.raises(LedgerError):
        reader.collect()
    reader.collect()
    assert len(store.records) == 1


def test_full_logs_are_deleted_once_they_are_in_the_ledger(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "MAX_LOG_BYTES", 1000)
    journal, store = UsageJournal(folder, 4), Store()
    for _ in range(20):
        begin(journal).end(Outcome.FINISHED)
    assert list_files(folder).count(".log") > 3
    JournalReader(folder, store).collect()
    assert len(store.records) == 20 and list_files(folder) == [".log", ".running"]


def test_a_front_that_ends_in_order_leaves_no_file_behind(folder: Path) -> None:
    journal, store = UsageJournal(folder, 4), Store()
    begin(journal).end(Outcome.FINISHED)
    journal.close()
    JournalReader(folder, store).collect()
    assert len(store.records) == 1 and list_files(folder) == []


def test_a_slot_is_used_again_and_a_full_journal_says_so(folder: Path) -> None:
    journal, store = UsageJournal(folder, 2), Store()
    for number in range(10):
        entry = begin(journal)
        count(entry, number)
        entry.end(Outcome.FINISHED)
    first, _ = begin(journal), begin(journal)
    with pytest.raises(JournalFull):
        begin(journal)
    first.end(Outcome.FINISHED)
    begin(journal)
    JournalReader(folder, store).collect()
    assert len(store.records) == 11


def test_names_of_any_script_fit_and_absurd_ones_are_refused(folder: Path) -> None:
    journal, store = UsageJournal(folder, 2), Store()
    begin(journal, model="模" * 256, request_id="i" * 128, team="t" * 63).end(Outcome.FINISHED)
    with pytest.raises(JournalFull):
        begin(journal, model="m" * 3000)
    JournalReader(folder, store).collect()
    assert [record.model for record in store.records.values()] == ["模" * 256]


@pytest.mark.parametrize("num_written", [0, 10, None], ids=["nothing", "half a line", "an error"])
def test_a_full_disk_loses_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, num_written: int | None) -> None:
    journal, store, write = UsageJournal(folder, 3), Store(), os.write

    def fail(descriptor: int, data: bytes) -> int:
        if num_written is None:
            raise OSError(errno.ENOSPC, "full")
        return write(descriptor, data[:num_written])

    with monkeypatch.context() as full:
        full.setattr(os, "write", fail)
        for number in range(3):
            entry = begin(journal)
            count(entry, number)
            entry.end(Outcome.FINISHED)
        with pytest.raises(JournalFull):
            begin(journal)
    last = begin(journal)  # there is room again: what waited is logged
    last.end(Outcome.FINISHED)
    JournalReader(folder, store).collect()
    assert store.list_tokens() == [("finished", 3, 0), ("finished", 3, 0), ("finished", 3, 1), ("finished", 3, 2)]


_DYING = """
import os, signal, sys
from pathlib import Path
from router.tenancy.journal import UsageJournal
from router.tenancy.usage import Outcome
journal = UsageJournal(Path(sys.argv[1]), 8)
entries = [journal.begin(request_id="r", team="red", key_id="k", model="m", tokens_in=3) for _ in range(3)]
for number, entry in enumerate(entries):
    entry.set_counters(tokens_cached=0, tokens_out=number, router_us=0, expert_us=0)
entries[2].end(Outcome.FINISHED)
if sys.argv[2] == "full":
    os.write = lambda *_: 0
    entries[1].end(Outcome.FINISHED)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("disk", "expected"),
    [
        ("sound", [("cut_off", 3, 0), ("cut_off", 3, 1), ("finished", 3, 2)]),
        ("full", [("cut_off", 3, 0), ("finished", 3, 1), ("finished", 3, 2)]),
    ],
)
def test_a_killed_front_leaves_everything_behind(folder: Path, disk: str, expected: list[tuple[str, int, int]]) -> None:
    process = subprocess.run([sys.executable, "-c", _DYING, folder, disk], cwd=REPOSITORY, timeout=30, check=False)
    assert process.returncode == -signal.SIGKILL
    store = Store()
    store.num_failures = 1
    with pytest.raises(LedgerError):
        JournalReader(folder, store).collect()
    JournalReader(folder, store).collect()
    assert store.list_tokens() == expected and list_files(folder) == []


def test_lines_and_slots_that_are_damaged_are_left_out_and_the_rest_counts(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal, store = UsageJournal(folder, 2), Store()
    begin(journal).end(Outcome.FINISHED)
    (log,) = folder.glob("*.log")
    with log.open("ab") as damaged:
        damaged.write(b'{"id": 1}\n\xff\xfe\n[]\n')
    begin(journal).end(Outcome.FINISHED)
    JournalReader(folder, store).collect()
    assert len(store.records) == 2 and caplog.text.count("cannot be read") == 3


def test_a_folder_that_cannot_be_written_is_named() -> None:
    with pytest.raises(LedgerError, match="cannot write the usage journal in /proc/nowhere"):
        UsageJournal(Path("/proc/nowhere"), 1)


def test_what_is_left_is_collected_at_once_when_a_cluster_stops(folder: Path, tmp_path: Path) -> None:
    journal, url = UsageJournal(folder, 2), f"sqlite:///{tmp_path / 'ledger.db'}"
    begin(journal).end(Outcome.FINISHED)
    begin(journal)  # and one that was running
    journal.close()
    assert collect_once(folder, url) == 2 and list_files(folder) == []
    ledger = Ledger(url)
    assert ledger.summarise([])[0].num_requests == 2
    ledger.close()
