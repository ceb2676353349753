"""Where the trunk's tensors cross between host memory and a card: into a step, out to the experts, and back.

Copies go through pinned memory, those to the host on a stream of their own, so the card goes on with what is queued
behind them. While a copy is awaited the event loop runs on: replies are read and another micro-batch is queued.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from router.decoder_layer import ExpertDispatcher, PendingExperts
from router.step_batch import StepBatch


class DeviceCopies:
    """Copies of one card, for one event loop."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._fetch_stream = torch.cuda.Stream(device)

    def send(self, tensor: Tensor) -> Tensor:
        """Queue a copy to the card on the current stream. The tensor may be changed as soon as this returns."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor)
        return host.to(self._device, non_blocking=True)

    def send_batch(self, batch: StepBatch) -> StepBatch:
        """All but the token ids, which are looked up in host memory."""
        return replace(
            batch,
            positions=self.send(batch.positions),
            slot_mapping=self.send(batch.slot_mapping),
            block_tables=self.send(batch.block_tables),
        )

    async def fetch(self, *tensors: Tensor) -> list[Tensor]:
        """Copy to host memory what the current stream has computed by now, and let the event loop run until then."""
        self._fetch_stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._fetch_stream):
            copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
            for tensor, host in zip(tensors, copies, strict=True):
                host.copy_(tensor, non_blocking=True)
                tensor.record_stream(self._fetch_stream)
            done = torch.cuda.Event()
            done.record()
        while not done.query():
            await asyncio.sleep(0)
        return copies


class DeviceDispatcher:
    """decoder_layer.ExpertDispatcher for a trunk on a card, by way of one for host memory."""

    def __init__(self, dispatcher: ExpertDispatcher, copies: DeviceCopies) -> None:
        self._dispatcher = dispatcher
        self._copies = copies

    async def scatter(
        self, layer_id: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> PendingExperts:
        rows, ids, weights = await self._copies.fetch(hidden_states, topk_ids, topk_weights)
        return _DevicePending(await self._dispatcher.scatter(layer_id, rows, ids, weights), self._copies)


class _DevicePending:
    def __init__(self, pending: PendingExperts, copies: DeviceCopies) -> None:
        self._pending = pending
        self._copies = copies

    @property
    def num_left_out(self) -> npt.NDArray[np.int32] | None:
        return self._pending.num_left_out

    async def gather(self) -> Tensor:
        return self._copies.send(await self._pending.gather())
