"""Host memory that weights pass through between the disk and where they are packed.

There are a few buffers: the disk fills some while another is packed. For a card they are pinned, so that copies run
beside the reading. No process ever holds more of its weights in host memory than that.
"""

from __future__ import annotations

import numpy as np
import torch

# Every tensor starts on a cache line, so that it can be viewed as any dtype.
ALIGNMENT = 64
# One that is packed or copied from, and what keeps a disk busy meanwhile.
NUM_BUFFERS = 3


class Staging:
    """Use: take(), fill, queue copies on the current stream, release(). As many as NUM_BUFFERS can be taken before the
    first is released; they are released in the order in which they were taken. Called by one thread."""

    def __init__(self, device: torch.device, size_bytes: int) -> None:
        """size_bytes: of the largest content, see compute_offsets."""
        self._is_pinned = device.type == "cuda"
        self._device = device
        self._buffers = [
            torch.empty(size_bytes, dtype=torch.uint8, pin_memory=self._is_pinned) for _ in range(NUM_BUFFERS)
        ]
        self._released: list[torch.cuda.Event | None] = [None] * len(self._buffers)
        self._num_taken = 0
        self._num_released = 0

    @property
    def size_bytes(self) -> int:
        """Of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def take(self) -> np.ndarray:
        """Return a buffer, uint8 [size_bytes], once no copy reads it any more. Its old content is lost."""
        index = self._num_taken % NUM_BUFFERS
        self._num_taken += 1
        released = self._released[index]
        if released is not None:
            released.synchronize()
        return self._buffers[index].numpy()

    def release(self) -> None:
        """The copies out of the buffer that was taken first of those not released are queued, or done."""
        index = self._num_released % NUM_BUFFERS
        self._num_released += 1
        if self._is_pinned:
            done = torch.cuda.Event(blocking=True)
            done.record(torch.cuda.current_stream(self._device))
            self._released[index] = done


def compute_offsets(sizes: list[int]) -> list[int]:
    """Where tensors of these sizes (bytes) start in one buffer, then the length of the whole."""
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
    return offsets
