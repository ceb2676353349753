"""What a process uses of its machine, for whoever asks its Status."""

from __future__ import annotations

import psutil

from router.v1 import router_pb2 as pb


def read_process_figures() -> pb.ProcessFigures:
    """Of this process; some hundred microseconds."""
    process = psutil.Process()
    with process.oneshot():
        times = process.cpu_times()
        return pb.ProcessFigures(
            cpu_ms=int((times.user + times.system) * 1000),
            resident_bytes=process.memory_info().rss,
            num_threads=process.num_threads(),
            num_open_files=process.num_fds(),
            started_ms=int(process.create_time() * 1000),
        )
