"""Environment of every process that sends or receives activations; it must be set before the process starts.

glibc reads the malloc thresholds at start, gRPC its experiments when it loads. A local cluster therefore inherits
them from `shoal serve`; in a Ray cluster that already runs, they go with the actors' runtime_env (which costs about
a second per worker at start, measured with 5 actors on 2 cores).
"""

from __future__ import annotations

DATA_PLANE_ENV: dict[str, str] = {
    # The older I/O engine takes 20-25 % less time per scatter/gather round (DESIGN.md, section 5).
    "GRPC_EXPERIMENTS": "-event_engine_client,-event_engine_listener",
    # Keep the memory of large frames mapped: 25-40 % less per round at 64 rows. 1 GiB: more than any frame.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}
