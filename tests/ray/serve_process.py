"""A real `shoal serve` process of the tests, on free ports, in a session of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.free_ports import find_free_ports

START_TIMEOUT_S = 90.0
ADMIN_TOKEN = "token of the tests"
# One for all requests, as each client would read the certificates of the system anew, 24 ms of processor. The
# connections are not shared: httpcore may close one that it has just given to another thread.
TLS_CONTEXT = httpx.create_ssl_context(trust_env=False)


class ServeProcess:
    """Starts at once; wait_ready, then talk to url. Always close it."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        port, admin_port = find_free_ports(2)
        self.url = f"http://127.0.0.1:{port}"
        self.admin_url = f"http://127.0.0.1:{admin_port}"
        self._out = folder / "stdout"
        self._err = folder / "stderr"
        self.environment = os.environ | {"SHOAL_STATE_DIR": str(folder / "state"), "SHOAL_ADMIN_TOKEN": ADMIN_TOKEN}
        command = [sys.executable, "-m", "cluster.cli", "serve", *arguments]
        command += ["--port", str(port), "--admin-port", str(admin_port)]
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=err, env=self.environment, start_new_session=True
            )
        self._seen: dict[int, psutil.Process] = {}

    @property
    def stdout(self) -> str:
        return self._out.read_text()

    @property
    def stderr(self) -> str:
        return self._err.read_text()

    def wait_ready(self) -> None:
        wait_for(lambda: "ready on" in self.stdout or self.process.poll() is not None, START_TIMEOUT_S)
        assert self.process.poll() is None, self.stderr
        self.remember_processes()

    def remember_processes(self) -> None:
        """Note every process of this cluster, so that a later look finds those that stayed behind."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            self._seen[process.pid] = process

    def list_left_behind(self) -> list[str]:
        """Processes of this cluster that still run, orphans included; zombies nobody has collected do not count."""
        left = [process for process in self._seen.values() if _is_running(process)]
        marked = _read_session_ids(self._seen.values())
        for process in psutil.process_iter():
            if process.pid != os.getpid() and marked & _read_session_ids([process]):
                left.append(process)
        return [f"{process.pid} {' '.join(process.cmdline())[:120]}" for process in left if _is_running(process)]

    def fetch_status(self) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        response = httpx.get(
            f"{self.admin_url}/status", headers=headers, timeout=10, verify=TLS_CONTEXT, trust_env=False
        )
        response.raise_for_status()
        return response.json()

    def run_command(self, *arguments: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Another `shoal` command, as a user of the same machine would give it."""
        command = [sys.executable, "-m", "cluster.cli", *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout_s)

    def close(self) -> None:
        """End it, by force if need be."""
        if self.process.poll() is None:
            self.remember_processes()
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
        for process in self._seen.values():
            if _is_running(process):
                process.kill()


def get_replica(status: dict[str, Any], group_name: str) -> dict[str, Any]:
    """The first replica of a group in a status object."""
    return next(group for group in status["groups"] if group["name"] == group_name)["replicas"][0]


def stream_chat(url: str, max_tokens: int, timeout_s: float = 60.0) -> Iterator[str]:
    """Pieces of a greedy answer of exactly max_tokens tokens, as they come."""
    body = {
        "model": _fetch_model_id(url),
        "messages": [{"role": "user", "content": "def read_lines(path):"}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    is_done = False
    options = {"timeout": timeout_s, "verify": TLS_CONTEXT, "trust_env": False}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, **options) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line == "data: [DONE]":
                is_done = True
            elif line.startswith("data: "):
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                for choice in chunk["choices"]:
                    if content := choice["delta"].get("content"):
                        yield content
    assert is_done


def _fetch_model_id(url: str) -> str:
    response = httpx.get(f"{url}/v1/models", timeout=10, verify=TLS_CONTEXT, trust_env=False)
    return response.json()["data"][0]["id"]


def wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s"
        time.sleep(0.05)


def _read_session_ids(processes: Any) -> set[str]:
    found: set[str] = set()
    for process in processes:
        try:
            if session_id := process.environ().get("SHOAL_SESSION"):
                found.add(session_id)
        except (psutil.Error, OSError):
            continue
    return found


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
