"""What glibc's malloc does with memory that is freed: kept by processes of activations, given back by the HTTP front.

glibc maps a large buffer anew each time and gives it back when it is freed; touching it again then costs a page fault
per 4 KB, which took 25-40 % of a round of 64 rows, and half of sampling 16 rows.

A process that serves strangers rather stays small. Left alone, glibc has an arena for each thread, and takes the size
of the largest buffer that was ever freed as what to keep at the end of each: 20,000 requests of `make fuzz` left 50 MB
of free memory in the front.
"""

from __future__ import annotations

import ctypes

# malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
# More than any frame.
_KEPT_BYTES = 1 << 30
# glibc's own values, which it no longer changes by itself once they are set.
_RETURNED_BYTES = 128 * 1024


def keep_large_buffers() -> None:
    """To be called once, early, by a process that sends or receives activations. Another libc than glibc ignores it."""
    _set({_M_MMAP_THRESHOLD: _KEPT_BYTES, _M_TRIM_THRESHOLD: _KEPT_BYTES})


def return_freed_memory() -> None:
    """To be called once, early, by a process that serves HTTP. Another libc than glibc ignores it."""
    _set({_M_MMAP_THRESHOLD: _RETURNED_BYTES, _M_TRIM_THRESHOLD: _RETURNED_BYTES, _M_ARENA_MAX: 1})


def _set(parameters: dict[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in parameters.items():
            mallopt(parameter, value)
