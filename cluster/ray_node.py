"""A Ray node in this container that offers nothing: what a process needs to be a driver of a Ray cluster elsewhere."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading

from cluster.errors import StartError

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
_STOP_S = 10.0
_UP_MARK = "Ray runtime started"
# The least that Ray accepts, rounded up: no tensor goes through its object store.
_OBJECT_STORE_BYTES = 100 * 2**20
# Names that KubeRay gives its own pods: with them, Ray's autoscaler would take this node for one of its own.
_NOT_OURS = ("RAY_CLOUD_INSTANCE_ID", "RAY_NODE_TYPE_NAME")


class RayNode:
    """Owns the process of `ray start --block`, whose children end with it."""

    def __init__(self, address: str, node_ip: str | None) -> None:
        """address: of the cluster's GCS. node_ip: where other nodes reach this one; None: Ray finds out."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={address}"]
        command += ["--num-cpus=0", "--num-gpus=0", f"--object-store-memory={_OBJECT_STORE_BYTES}"]
        command += ["--disable-usage-stats", "--log-style=record"]
        if node_ip is not None:
            command.append(f"--node-ip-address={node_ip}")
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_OURS}
        self._is_up = threading.Event()
        self._lines: list[str] = []
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        threading.Thread(target=self._read, name="ray node", daemon=True).start()

    def wait_up(self) -> None:
        """Raises StartError."""
        if not self._is_up.wait(START_TIMEOUT_S) or self._process.poll() is not None:
            raise StartError(f"no Ray node was started here: {' '.join(self._lines[-5:])[-500:]}")

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def _read(self) -> None:
        """For as long as it runs: nobody else empties the pipe."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not self._is_up.is_set():
                self._lines.append(line.strip())
            if _UP_MARK in line:
                self._is_up.set()
        # It has ended: whoever waits finds that out.
        self._is_up.set()
