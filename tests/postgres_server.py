"""A PostgreSQL server of the tests' own: a fresh one on a free port, as a user without rights, gone afterwards."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg

START_TIMEOUT_S = 60.0
# Where Debian puts them, if they are not on the path.
_FOLDERS = "/usr/lib/postgresql/*/bin"


class PostgresServer:
    """A running server. Anybody may connect from this machine, as the user `shoal`."""

    def __init__(self, port: int) -> None:
        self.port = port

    def create_database(self) -> str:
        """The URL of a new, empty database."""
        name = f"shoal_{uuid.uuid4().hex[:12]}"
        with psycopg.connect(self._describe("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return f"postgresql://shoal@127.0.0.1:{self.port}/{name}"

    def _describe(self, database: str) -> str:
        return f"host=127.0.0.1 port={self.port} user=shoal dbname={database} connect_timeout=5"


def find_postgres() -> Path | None:
    """The folder with the server's programs; None: it is not installed."""
    for program in (shutil.which("postgres"), *sorted(map(str, Path("/").glob(f"{_FOLDERS[1:]}/postgres")))):
        if program is not None and (found := Path(program).resolve().parent / "initdb").exists():
            return found.parent
    return None


@contextlib.contextmanager
def postgres_server(programs: Path) -> Iterator[PostgresServer]:
    user = _choose_user()
    # Not below pytest's folder, which only its owner may enter.
    with tempfile.TemporaryDirectory(prefix="shoal-postgres-") as name:
        folder, data = Path(name), Path(name) / "data"
        if "user" in user:
            os.chown(folder, pwd.getpwnam(user["user"]).pw_uid, -1)
        quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "cwd": "/", **user}
        with (folder / "log").open("w") as log:
            subprocess.run(
                [programs / "initdb", "-D", data, "-A", "trust", "-U", "shoal", "--no-sync", "-E", "UTF8"],
                check=True, timeout=START_TIMEOUT_S, stderr=log, **quiet,
            )  # fmt: skip
            port = _find_port()
            settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": str(folder), "fsync": "off"}
            options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
            process = subprocess.Popen(
                [programs / "postgres", "-D", data, "-p", str(port), *options], stderr=log, **quiet
            )
        try:
            server = PostgresServer(port)
            deadline = time.monotonic() + START_TIMEOUT_S
            while True:
                try:
                    psycopg.connect(server._describe("postgres")).close()  # pyright: ignore[reportPrivateUsage]
                    break
                except psycopg.OperationalError:
                    assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                    time.sleep(0.05)
            yield server
        finally:
            process.send_signal(signal.SIGINT)  # SIGTERM would wait for clients
            process.wait(START_TIMEOUT_S)


def _choose_user() -> dict[str, str]:
    """The server refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    names = {entry.pw_name for entry in pwd.getpwall()}
    return {"user": "postgres" if "postgres" in names else "nobody"}


def _find_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]
