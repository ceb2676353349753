"""What malloc gives back, in a process of its own: its settings are for good."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Buffers below malloc's mmap threshold, after one that raises the threshold to its own size where nobody has set it.
_PROGRAM = """
import ctypes, sys
from experts.allocator import return_freed_memory

if sys.argv[1] == "set":
    return_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def resident_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6

def allocate(size):
    address = libc.malloc(size)
    libc.memset(address, 1, size)
    return address

libc.free(allocate(30_000_000))
before = resident_mb()
for address in reversed([allocate(100_000) for _ in range(400)]):
    libc.free(address)
print(resident_mb() - before)
"""


def measure_kept_mb(setting: str) -> float:
    command = [sys.executable, "-c", _PROGRAM, setting]
    return float(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_front_gives_freed_memory_back() -> None:
    assert measure_kept_mb("left") > 30  # else there is nothing to be seen here
    assert measure_kept_mb("set") < 5
