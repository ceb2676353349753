"""Where a running `shoal serve` can be found: one small file per API port, readable by its user only.

It lies in SHOAL_STATE_DIR, or in shoal/ under XDG_STATE_HOME (~/.local/state). It holds the admin token, hence mode
0600; it goes when the cluster stops, and a file whose process is gone counts as none.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from cluster.errors import NotRunning


@dataclass(frozen=True, slots=True)
class ClusterState:
    """pid: of `shoal serve`. session_mark and session_folder: what its processes are known by, see process_reaper."""

    url: str
    admin_url: str
    token: str
    pid: int
    session_mark: str
    session_folder: str | None
    # Of the certificates that the admin API is served with; None: http.
    tls_dir: str | None = None
    # For `shoal usage`. ledger_url: None: it is off, and may hold a password.
    ledger_url: str | None = None
    gpu_hour_price: float | None = None


def get_state_dir(environ: Mapping[str, str] | None = None) -> Path:
    environ = os.environ if environ is None else environ
    if chosen := environ.get("SHOAL_STATE_DIR"):
        return Path(chosen)
    base = environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "shoal"


def write_state(folder: Path, state: ClusterState) -> Path:
    """Write the file for the state's API port in one step. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = _get_path(folder, _get_port(state.url))
    # mkstemp makes the file with mode 0600: the token is never readable by others, not even for a moment.
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=path.name)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(asdict(state), file)
    os.replace(temporary, path)
    return path


def remove_state(folder: Path, state: ClusterState) -> None:
    """Remove the file unless another process has replaced it."""
    path = _get_path(folder, _get_port(state.url))
    if _read(path) == state:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def list_running(folder: Path) -> list[ClusterState]:
    """Of this user and machine, by port."""
    states = [_read(path) for path in sorted(folder.glob("*.json"))]
    return [state for state in states if state is not None and psutil.pid_exists(state.pid)]


def find_state(folder: Path, url: str) -> ClusterState:
    """The running cluster whose API or admin API has this url. Raises NotRunning."""
    wanted = urlsplit(url if "//" in url else f"http://{url}")
    for state in list_running(folder):
        for known in (state.url, state.admin_url):
            parts = urlsplit(known)
            if parts.port == (wanted.port or 80) and _same_host(parts.hostname, wanted.hostname):
                return state
    raise NotRunning(
        f"no running cluster is known for {url} on this machine: start one with `shoal serve`, or, for a remote one, "
        "give the admin API's --url and its token in SHOAL_ADMIN_TOKEN"
    )


def read_stale(folder: Path, url: str) -> ClusterState | None:
    """What an earlier `shoal serve` on this API port left when it was killed, or None."""
    state = _read(_get_path(folder, _get_port(url)))
    return None if state is None or psutil.pid_exists(state.pid) else state


def _read(path: Path) -> ClusterState | None:
    try:
        return ClusterState(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _get_path(folder: Path, port: int) -> Path:
    return folder / f"{port}.json"


def _get_port(url: str) -> int:
    return urlsplit(url).port or 80


def _same_host(first: str | None, second: str | None) -> bool:
    loopback = {"localhost", "127.0.0.1", "::1"}
    return first == second or (first in loopback and second in loopback)
