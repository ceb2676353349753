"""How fast this machine reads memory: the limit that expert_kernel.py is held against.

    python tests/benchmarks/memory_bandwidth.py [--json] [--full] [--threads N]

Each thread reads its own part of one buffer (2 MB pages where the kernel gives them) forward, with 64-byte loads, in a
few ways of prefetching; the best way of each run counts, the median of the runs is reported. The buffer is 64 MB, with
--full 1.5 GB: only that is larger than the caches of a server.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from experts.kernels.cpu_build import CompilerMissing, compile_library
from experts.kernels.cpu_ffn import WeightArena
from tests.benchmarks.report import Figure, add_json_option, print_report, summarize

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-pthread")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    parser.add_argument("--full", action="store_true", help="read 1.5 GB instead of 64 MB")
    parser.add_argument("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))), help="most threads")
    arguments = parser.parse_args()
    size_bytes = 1_500_000_000 if arguments.full else 64 << 20
    memory = WeightArena(size_bytes).allocate(size_bytes)
    memory.fill_(1)
    figures: list[Figure] = []
    for threads in range(1, arguments.threads + 1):
        rates = [size_bytes / read_once(memory, threads) / 1e9 for _ in range(7)]
        figures.append(summarize("memory read", rates, "GB/s", threads=threads))
    print_report(
        "memory_bandwidth",
        sizes={"bytes": size_bytes},
        limit=figures,
        figures=figures,
        bars=[],
        as_line=arguments.json,
    )


def read_once(memory: torch.Tensor, threads: int) -> float:
    """Seconds to read all of a contiguous uint8 tensor once, in the best of the ways."""
    library = _load_reader()
    return min(
        library.read_seconds(memory.data_ptr(), memory.nbytes, threads, reader)
        for reader in range(library.num_readers())
    )


@functools.cache
def _load_reader() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory_bandwidth.so"
        try:
            compile_library(_SOURCE, _FLAGS, path)
        except CompilerMissing as error:
            sys.exit(f"error: {error}")
        library = ctypes.CDLL(str(path))
    library.read_seconds.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int, ctypes.c_int)
    library.read_seconds.restype = ctypes.c_double
    return library


if __name__ == "__main__":
    main()
