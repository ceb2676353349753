"""Two Ray nodes on one machine: real raylets, as `ray start` makes them.

The head is at the machine's own address, which Ray takes for any loopback one, the other node at 127.0.0.2.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil

from tests.free_ports import find_free_ports

# `ray start --head` takes the machine's own address for any loopback one.
HEAD_HOST = "127.0.0.1"
WORKER_HOST = "127.0.0.2"
_ARGUMENTS = ("--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats", "--log-style=record")


class RayNodes:
    """Starts the head at once; close it. Needs RAY_AUTH_MODE=disabled in the environment.

    Each node is a process of its own in the foreground (`ray start --block`).
    """

    def __init__(self, folder: Path, head_resources: Mapping[str, float] | None = None) -> None:
        port, client_port = find_free_ports(2, HEAD_HOST)
        self.address = f"{HEAD_HOST}:{port}"
        self._environment = os.environ | {
            "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
            # Workers at their usual niceness would starve beside other work on the machine.
            "RAY_worker_niceness": "0",
        }
        self._logs = folder
        # Its usual port may be another cluster's, and a node ends when one of its processes does.
        arguments = ["--head", f"--port={port}", f"--ray-client-server-port={client_port}", "--include-dashboard=false"]
        self.head = self._start("head", *arguments, host=HEAD_HOST, resources=head_resources)
        self.worker: psutil.Process | None = None

    def add_worker(self) -> None:
        self.worker = self.start_worker("worker", WORKER_HOST)

    def start_worker(self, name: str, host: str, resources: Mapping[str, float] | None = None) -> psutil.Process:
        """Whoever calls this ends it with kill_node."""
        return self._start(name, f"--address={self.address}", host=host, resources=resources)

    def is_up(self, name: str) -> bool:
        """Whether `head` or `worker` belongs to the cluster by now."""
        return "Ray runtime started" in (self._logs / f"{name}.log").read_text()

    def kill_worker(self) -> None:
        """The whole node at once: raylet, agents and every actor on it."""
        assert self.worker is not None
        kill_node(self.worker)

    def close(self) -> None:
        for process in (self.worker, self.head):
            if process is not None:
                kill_node(process)

    def _start(
        self, name: str, *arguments: str, host: str, resources: Mapping[str, float] | None = None
    ) -> psutil.Process:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={host}"]
        command += ["--min-worker-port=0", "--max-worker-port=0", *arguments, *_ARGUMENTS]
        command.append(f"--dashboard-agent-listen-port={find_free_ports(1, host)[0]}")
        if resources:
            command.append(f"--resources={json.dumps(dict(resources))}")
        with (self._logs / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=self._environment, start_new_session=True
            )
        return psutil.Process(process.pid)


def kill_node(process: psutil.Process) -> None:
    """SIGKILL to the process and all that descends from it, stopped first so that none makes another."""
    try:
        processes = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for each in processes:
        try:
            each.suspend()
            processes.extend(child for child in each.children() if child not in processes)
        except psutil.NoSuchProcess:
            continue
    for each in processes:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=10)
