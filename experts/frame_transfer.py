"""A frame's rows on their way to the device that computes, and its result on the way back.

On a CPU that is a change of dtype. For a card, rows go through pinned memory on a stream of their own, products run on
a second and results return on a third: while one frame computes, the next one's rows are under way and the one before
it returns. Whoever waits for a result waits for that result alone.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from experts.activation_quantization import BLOCK_COLUMNS
from experts.wire import ComputeFrame


class PendingResult(Protocol):
    """A result that may still be computed or copied."""

    def wait(self) -> torch.Tensor:
        """Block until it is in host memory of its own, then return it."""
        ...


class FrameTransfer(Protocol):
    """Everything but computing() is called within it."""

    def computing(self) -> AbstractContextManager[object]:
        """Work queued inside is of this device and in order."""
        ...

    def send(self, frame: ComputeFrame, dtype: torch.dtype) -> torch.Tensor:
        """The frame's rows in dtype, [num_rows, hidden_size], on the device, in memory of their own."""
        ...

    def fetch(self, result: torch.Tensor, dtype: torch.dtype) -> PendingResult:
        """Start bringing a result back in dtype. The result's memory may be overwritten by what is queued next."""
        ...


def make_frame_transfer(device: torch.device) -> FrameTransfer:
    return CudaTransfer(device) if device.type == "cuda" else HostTransfer()


class HostTransfer:
    """The device is the CPU: a result is there when computing it returns."""

    def computing(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    def send(self, frame: ComputeFrame, dtype: torch.dtype) -> torch.Tensor:
        # The wire's memory is aligned to nothing, and products may depend on alignment: always into memory of our own.
        return frame.load_hidden_states(dtype)

    def fetch(self, result: torch.Tensor, dtype: torch.dtype) -> PendingResult:
        return _ReadyResult(result.to(dtype))


class CudaTransfer:
    """One card. Calls come one at a time, from any thread; results may be waited for at any time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._compute_stream = torch.cuda.Stream(device)
        self._send_stream = torch.cuda.Stream(device)
        self._fetch_stream = torch.cuda.Stream(device)

    @contextlib.contextmanager
    def computing(self):
        with torch.cuda.device(self._device), torch.cuda.stream(self._compute_stream):
            yield

    def send(self, frame: ComputeFrame, dtype: torch.dtype) -> torch.Tensor:
        rows = self._send(frame.hidden_states)
        if frame.scales is not None:
            return scale_rows(rows, self._send(frame.scales)).to(dtype)
        return rows.to(dtype)

    def fetch(self, result: torch.Tensor, dtype: torch.dtype) -> PendingResult:
        # A copy in any case: a CUDA graph's own result is overwritten by the next frame.
        rounded = result.to(dtype, copy=True)
        self._fetch_stream.wait_stream(self._compute_stream)
        with torch.cuda.stream(self._fetch_stream):
            host = torch.empty(rounded.shape, dtype=dtype, pin_memory=True)
            host.copy_(rounded, non_blocking=True)
            # blocking: the waiting thread sleeps, since a host may have more expert groups than cores.
            done = torch.cuda.Event(blocking=True)
            done.record()
        rounded.record_stream(self._fetch_stream)
        return _CopiedResult(host, done)

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        """Through pinned memory, which torch's allocator gives out again only after the copy has ended."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor)
        with torch.cuda.stream(self._send_stream):
            sent = host.to(self._device, non_blocking=True)
        self._compute_stream.wait_stream(self._send_stream)
        sent.record_stream(self._compute_stream)
        return sent


def scale_rows(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """activation_quantization.dequantize_rows on any device, to the bit.

    values: float8_e4m3fn [num_rows, num_columns]; scales: float32 [num_rows, num_blocks]. Returns float32.
    """
    return values.to(torch.float32).mul_(scales.repeat_interleave(BLOCK_COLUMNS, dim=1)[:, : values.shape[1]])


class _ReadyResult:
    def __init__(self, result: torch.Tensor) -> None:
        self._result = result

    def wait(self) -> torch.Tensor:
        return self._result


class _CopiedResult:
    def __init__(self, host: torch.Tensor, done: torch.cuda.Event) -> None:
        self._host = host
        self._done = done

    def wait(self) -> torch.Tensor:
        self._done.synchronize()
        return self._host
