"""Processes that a benchmark measures against: started by script name, asked over pipes, ended with the block.

Not a benchmark itself. A worker prints one JSON line when it is ready and one for every line it is asked, and ends
when its standard input does.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.data_plane_env import DATA_PLANE_ENV
from experts.allocator import keep_large_buffers
from tests.benchmarks.report import REPOSITORY

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 20.0


class Worker:
    """One child process. ready: what it printed first."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=REPOSITORY,
            env={**os.environ, **DATA_PLANE_ENV},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ready: dict[str, Any] = {}

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self) -> None:
        self.ready = self._read_line()

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._read_line()

    def close(self) -> None:
        """Ask it to end."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def wait(self) -> None:
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read_line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], START_TIMEOUT_S)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            raise SystemExit(f"a worker process ended or did not answer: {self._process.args}")
        return json.loads(line)


@contextlib.contextmanager
def run_workers(arguments: Sequence[Sequence[str]], memory: PeakMemory | None = None) -> Iterator[list[Worker]]:
    """Start one process for each list of arguments and wait until all are ready. memory watches them from the start."""
    workers = [Worker(one) for one in arguments]
    if memory is not None:
        memory.watch([worker.pid for worker in workers])
    try:
        for worker in workers:
            worker.wait_ready()
        yield workers
    finally:
        for worker in workers:
            worker.close()
        for worker in workers:
            worker.wait()


def answer_questions(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The worker's side: one JSON line for each on standard input, until it ends."""
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def restart_with_data_plane_env() -> None:
    """Give this process the environment and the allocator of the cluster's own; a variable is read at start, so a set
    one stays as it is."""
    if any(os.environ.get(name) != value for name, value in DATA_PLANE_ENV.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **DATA_PLANE_ENV})
    keep_large_buffers()


class PeakMemory:
    """The largest sum of the proportional set sizes of some processes while the block runs, in bytes."""

    def __init__(self, *, every_s: float = 0.1) -> None:
        self.peak_bytes = 0
        self._pids: list[int] = []
        self._every_s = every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def watch(self, pids: Sequence[int]) -> None:
        self._pids = list(pids)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self._every_s):
            self.peak_bytes = max(self.peak_bytes, sum(map(read_pss_bytes, self._pids)))


def read_pss_bytes(pid: int) -> int:
    """0 for a process that has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))
