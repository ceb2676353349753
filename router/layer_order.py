"""Keeps micro-batches in order, layer by layer, where one reads cache rows that another one writes."""

from __future__ import annotations

import asyncio
import collections


class LayerOrder:
    """A micro-batch's place in the order: it enters every layer only after the one before it has.

    That is enough for the cache, since a layer attends before it first lets another task run.
    """

    def __init__(self, before: LayerOrder | None) -> None:
        """before: None for the first, which never waits."""
        self._before = before
        self._entered = collections.defaultdict[int, asyncio.Event](asyncio.Event)

    async def enter(self, layer_id: int) -> None:
        if self._before is not None:
            await self._before._entered[layer_id].wait()
        self._entered[layer_id].set()
