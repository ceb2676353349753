"""One decoder layer: attention, then its dense MLP or its experts. The trunk stacks them; an MTP module holds one.

Routed experts are asked for through a dispatcher, which is passed in; the layer knows neither transport nor expert
table.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import perf_counter_ns
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from experts.model_config import ModelConfig
from router.latent_cache import LatentCache
from router.layer_front import LayerRun, build_front
from router.layer_order import LayerOrder
from router.step_batch import StepBatch, take_output_rows
from router.step_times import PartTimes
from router.weights import LayerWeights


class PendingExperts(Protocol):
    """Frames on their way."""

    async def gather(self) -> Tensor:
        """[num_tokens, hidden_size] float32: the weighted sum of each row's routed experts."""
        ...

    @property
    def num_left_out(self) -> npt.NDArray[np.int32] | None:
        """[num_tokens]: experts that the gathered sum does without; None: of no row."""
        ...


class ExpertDispatcher(Protocol):
    """Sends the rows of one layer to the expert groups."""

    async def scatter(
        self, layer_id: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> PendingExperts:
        """Start the calls and return while they are on their way. Raises ExpertsUnavailable."""
        ...


class DecoderLayer:
    """Safe to run for several disjoint batches at once on one event loop."""

    def __init__(
        self,
        config: ModelConfig,
        layer_id: int,
        weights: LayerWeights,
        dispatcher: ExpertDispatcher,
        cache: LatentCache,
        rotations: Tensor,
        times: PartTimes | None = None,
        *,
        deterministic: bool,
        gives_turn: bool = False,
    ) -> None:
        """rotations: [max_model_len, qk_rope_head_dim / 2] complex64. layer_id: an MTP layer's counts on from the
        main layers'. times: added to; None, nobody asks. gives_turn: the event loop has work to do while the experts
        compute."""
        self._layer_id = layer_id
        self._weights = weights
        self._dispatcher = dispatcher
        self._gives_turn = gives_turn
        self._times = times = times or PartTimes()
        self.front = build_front(config, weights, cache.layer(layer_id), rotations, times, deterministic=deterministic)

    async def forward(self, hidden_states: Tensor, batch: StepBatch) -> Tensor:
        """hidden_states: [num_tokens, hidden_size]. Returns the same, and leaves the rows' latents in the cache."""
        return await run_layers([self], hidden_states, batch)

    def fill_cache(self, hidden_states: Tensor, batch: StepBatch) -> None:
        """Leave the rows' latents in the cache, and nothing else. hidden_states: [num_tokens, hidden_size]."""
        self.front.fill_cache(self.front.start(hidden_states, batch))

    async def run(self, run: LayerRun, batch: StepBatch) -> None:
        """The layer's share of a walk. Attention is done before anything is awaited: router/layer_order.py counts on
        it."""
        self.front.attend(run)
        weights = self._weights
        if weights.gate is None:
            assert weights.mlp is not None
            started = perf_counter_ns()
            run.add(weights.mlp(run.normed), None)
            self._times.shared_ns += perf_counter_ns() - started
        else:
            await self._run_experts(run, batch)

    async def _run_experts(self, run: LayerRun, batch: StepBatch) -> None:
        times = self._times
        started = perf_counter_ns()
        pending = await self._dispatcher.scatter(self._layer_id, run.normed, run.topk_ids, run.topk_weights)
        sent = perf_counter_ns()
        shared = None if self._weights.shared_experts is None else self._weights.shared_experts(run.normed)
        computed = perf_counter_ns()
        if self._gives_turn:
            await asyncio.sleep(0)
        routed = await pending.gather()
        if pending.num_left_out is not None:
            np.add(batch.num_left_out, pending.num_left_out, out=batch.num_left_out)
        gathered = perf_counter_ns()
        # Summed in float32, rounded once.
        run.add(*((routed, None) if shared is None else (shared, routed)))
        times.scatter_ns += sent - started
        times.shared_ns += computed - sent + perf_counter_ns() - gathered
        times.wait_ns += gathered - computed


async def run_layers(
    layers: Sequence[DecoderLayer], hidden_states: Tensor, batch: StepBatch, order: LayerOrder | None = None
) -> Tensor:
    """Run the rows through the layers, one after the other. Returns [num_tokens, hidden_size], of which only
    batch.output_rows mean anything. hidden_states stays as it is. order: None, the batch waits for no other."""
    run: LayerRun | None = None
    front = None
    for index, layer in enumerate(layers):
        if order is not None:
            await order.enter(index)
        if run is None or type(layer.front) is not type(front):
            hidden_states = hidden_states if run is None else run.hidden_states
            front = layer.front
            run = front.start(hidden_states, batch)
        if index == len(layers) - 1 and batch.output_rows is not None:
            return await _run_last(layer, run, batch, batch.output_rows)
        await layer.run(run, batch)
    return hidden_states if run is None else run.hidden_states


async def _run_last(layer: DecoderLayer, run: LayerRun, batch: StepBatch, output_rows: Tensor) -> Tensor:
    """The last layer of a walk: a twelfth of the work of a prompt, in a model of twelve layers, is for nobody."""
    layer.front.fill_cache(run)
    hidden_states = run.hidden_states
    if not len(output_rows):
        return hidden_states
    rest = take_output_rows(batch)
    rows = output_rows.to(hidden_states.device)
    run = layer.front.start(hidden_states[rows], rest)
    await layer.run(run, rest)
    batch.num_left_out[output_rows.numpy()] += rest.num_left_out
    return hidden_states.index_copy(0, rows, run.hidden_states)
