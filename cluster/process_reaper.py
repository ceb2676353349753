"""Finds and ends every process that a local cluster started, whoever its parent is by now.

Ray's DashboardAgent and RuntimeEnvAgent can outlive the raylet that started them and ignore SIGTERM, and then belong to
init. So a process is known by what it inherited, our mark in its environment (which Ray's workers overwrite with their
titles), or by an open file in the folder of the Ray session; the caller adds those that descend from it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from typing import NamedTuple

import psutil

SESSION_VARIABLE = "SHOAL_SESSION"
_KILL_S = 5.0


class Session(NamedTuple):
    """mark: value of SESSION_VARIABLE in its processes. folder: of the Ray session; None until Ray has started."""

    mark: str
    folder: str | None


def list_processes(session: Session) -> set[psutil.Process]:
    """Every process of the session that is still there, except this one."""
    return {process for process in psutil.process_iter() if process.pid != os.getpid() and _belongs(process, session)}


def reap(session: Session, *, wait_s: float, term_s: float = 1.0, known: Collection[psutil.Process] = ()) -> list[int]:
    """Give the processes wait_s to end, then SIGTERM, after term_s SIGKILL. Returns the ids of those that needed it.

    known: processes seen earlier, which may have lost what they are known by: zombies, and orphans that ended.
    """
    alive = _wait_gone({*known, *list_processes(session)}, wait_s)
    if not alive:
        return []
    forced = [process.pid for process in alive]
    for process in alive:
        _send(process, "terminate")
    alive = _wait_gone(alive, term_s)
    deadline = time.monotonic() + _KILL_S
    # Looked for again: a process may have been starting while the others were listed.
    while (alive := [*alive, *list_processes(session)]) and time.monotonic() < deadline:
        for process in alive:
            _send(process, "kill")
        alive = _wait_gone(alive, 1.0)
    return forced


def _belongs(process: psutil.Process, session: Session) -> bool:
    try:
        if process.environ().get(SESSION_VARIABLE) == session.mark:
            return True
        if session.folder is None:
            return False
        return any(file.path.startswith(session.folder + os.sep) for file in process.open_files())
    except (psutil.Error, OSError):
        # Ended meanwhile, or another user's.
        return False


def _wait_gone(processes: Collection[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    return [process for process in alive if _is_running(process)]


def _is_running(process: psutil.Process) -> bool:
    """A zombie whose parent has not looked yet is no longer running."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _send(process: psutil.Process, method: str) -> None:
    try:
        getattr(process, method)()
    except psutil.NoSuchProcess:
        return
