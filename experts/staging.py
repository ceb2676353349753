"""Host memory that weights pass through between the disk and where they are packed.

For a card it is pinned, so that copies run beside the reading, and there are two buffers: the disk fills one while the
card takes the other. No process ever holds more of its weights in host memory than that.
"""

from __future__ import annotations

import numpy as np
import torch

# Every tensor starts on a cache line, so that it can be viewed as any dtype.
ALIGNMENT = 64


class Staging:
    """Use: take(), fill, queue copies on the current stream, release(). Not thread-safe."""

    def __init__(self, device: torch.device, size_bytes: int) -> None:
        """size_bytes: of the largest content, see compute_offsets."""
        self._is_pinned = device.type == "cuda"
        self._device = device
        self._buffers = [
            torch.empty(size_bytes, dtype=torch.uint8, pin_memory=self._is_pinned)
            for _ in range(2 if self._is_pinned else 1)
        ]
        self._released: list[torch.cuda.Event | None] = [None] * len(self._buffers)
        self._current = 0

    @property
    def size_bytes(self) -> int:
        """Of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def take(self) -> np.ndarray:
        """Return a buffer, uint8 [size_bytes], once no copy reads it any more. Its old content is lost."""
        self._current = (self._current + 1) % len(self._buffers)
        released = self._released[self._current]
        if released is not None:
            released.synchronize()
        return self._buffers[self._current].numpy()

    def release(self) -> None:
        """The copies out of the buffer taken last are queued, or done."""
        if self._is_pinned:
            done = torch.cuda.Event(blocking=True)
            done.record(torch.cuda.current_stream(self._device))
            self._released[self._current] = done


def compute_offsets(sizes: list[int]) -> list[int]:
    """Where tensors of these sizes (bytes) start in one buffer, then the length of the whole."""
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
    return offsets
