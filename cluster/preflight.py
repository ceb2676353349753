"""What is looked at before anything is started: checkpoint headers, ports, memory. Seconds at most, and no Ray.

A problem found here is one clear line; the same problem found by five restarting actors is a mess.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.errors import PreflightError
from cluster.settings import ServeSettings
from experts.check import CheckReport, check_checkpoint

# Interpreter, torch and gRPC of one actor, measured with the demo checkpoint.
PROCESS_BYTES = 350 * 2**20
# Ray's own processes and the HTTP front.
RAY_BYTES = 1200 * 2**20

_DEMO_FOLDER = Path(__file__).resolve().parent.parent / "deploy" / "demo" / "checkpoint"
DEMO_MODEL_NAME = "shoal-demo"


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes on one machine that runs the whole cluster; available_bytes before anything is started."""

    weights_bytes: int
    processes_bytes: int
    available_bytes: int

    @property
    def is_met(self) -> bool:
        return self.weights_bytes + self.processes_bytes <= self.available_bytes

    def __str__(self) -> str:
        total = self.weights_bytes + self.processes_bytes
        return (
            f"needs about {total / 1e9:.1f} GB ({self.weights_bytes / 1e9:.1f} GB of weights, "
            f"{self.processes_bytes / 1e9:.1f} GB for processes), {self.available_bytes / 1e9:.1f} GB available"
        )


def resolve_checkpoint(settings: ServeSettings) -> tuple[Path, str]:
    """The absolute folder to serve, and the model's name in the API. Raises PreflightError if there is none."""
    if settings.checkpoint is None:
        if not (_DEMO_FOLDER / "config.json").is_file():
            raise PreflightError(
                "the demo checkpoint is not there (it belongs to a checkout of the repository, in "
                "deploy/demo/checkpoint): name a checkpoint folder, shoal serve CHECKPOINT"
            )
        return _DEMO_FOLDER, settings.model_name or DEMO_MODEL_NAME
    folder = settings.checkpoint.expanduser().resolve()
    if not folder.is_dir():
        raise PreflightError(f"{folder} is not a folder: name a Hugging Face checkpoint folder (nothing is downloaded)")
    return folder, settings.model_name or folder.name


def check_headers(folder: Path, num_groups: int) -> CheckReport:
    """Everything about a checkpoint but its values. Raises PreflightError naming the first problem."""
    report = check_checkpoint(folder, num_groups, read_values=False)
    if report.problems:
        more = len(report.problems) - 1
        hint = f" (and {more} more; `shoal check {folder}` lists all)" if more else ""
        raise PreflightError(f"checkpoint {folder}: {report.problems[0]}{hint}")
    return report


def check_port(host: str, port: int, flag: str) -> None:
    """Raises PreflightError if nothing can listen there. flag: the option that changes it."""
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise PreflightError(f"{host} is no address to listen on: {error.strerror}") from None
    family, kind, protocol, _, address = info[0]
    with contextlib.closing(socket.socket(family, kind, protocol)) as probe:
        # As the servers do, so that connections of an earlier run in TIME_WAIT do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise PreflightError(
                f"cannot listen on {host}:{port}: {(error.strerror or str(error)).lower()} "
                f"(stop what uses it, or choose another with {flag})"
            ) from None


def measure_memory(settings: ServeSettings, report: CheckReport) -> MemoryNeed:
    """What one machine needs for everything. On cards each process looks for itself whether its weights fit."""
    factor = 0 if settings.device == "cuda" else 2 if settings.dtype == "float32" else 1
    groups_bytes = sum(part.bf16_bytes for part in report.groups) * settings.replicas
    trunk_bytes = report.trunk.bf16_bytes * settings.routers if report.trunk is not None else 0
    num_processes = settings.groups * settings.replicas + settings.routers
    return MemoryNeed(
        weights_bytes=factor * (groups_bytes + trunk_bytes),
        processes_bytes=num_processes * PROCESS_BYTES + RAY_BYTES,
        available_bytes=psutil.virtual_memory().available,
    )


def check_memory(need: MemoryNeed) -> None:
    """Raises PreflightError with the numbers if the model does not fit."""
    if not need.is_met:
        raise PreflightError(
            f"too little memory: {need} (use fewer replicas, --dtype bfloat16, or more machines with --address)"
        )
