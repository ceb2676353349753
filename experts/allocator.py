"""Memory of large buffers stays with the process.

glibc maps a large buffer anew each time and gives it back when it is freed; touching it again then costs a page fault
per 4 KB, which took 25-40 % of a round of 64 rows, and half of sampling 16 rows.
"""

from __future__ import annotations

import ctypes

# malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# More than any frame.
_KEPT_BYTES = 1 << 30


def keep_large_buffers() -> None:
    """To be called once, early, by a process that sends or receives activations. Another libc than glibc ignores it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            mallopt(parameter, _KEPT_BYTES)
