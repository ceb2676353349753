"""The Triton kernels as an expert group sees them: experts packed as they are stored, a layer's call, its CUDA graphs.

All layers of a group lie in one allocation, so that loading fills the card to the byte that was asked for. Nothing
here needs a card: under Triton's interpreter the same code runs on the CPU.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from experts.kernels.block_quantized import ExpertStack
from experts.kernels.captured_ffn import CapturedFfn
from experts.kernels.cpu_ffn import ScaledWeight
from experts.kernels.row_plan import PlanLayout
from experts.kernels.tile_table import KernelChoice, WeightPath, compute_packed_bytes
from experts.kernels.triton_ffn import MAX_PAIRS_PER_LAUNCH, expert_ffn, launch_ffn, view_plan

# Counts changes of arithmetic: two versions may differ in the last bits.
ARITHMETIC_VERSION = 1
# Frames of decoding are replayed from a graph: below about 16 rows per expert launching costs more than computing.
GRAPH_ROWS = 64
GRAPH_ROWS_PER_EXPERT = 16
# Compiled kernels, captured graphs and what the allocator cannot use, beside weights and scratch.
_OVERHEAD_BYTES = 256 * 2**20


class TritonKernel:
    """FP8 experts with scale blocks that check_block admits; see kernels.expert_kernel.ExpertKernel."""

    def __init__(
        self,
        device: torch.device,
        choice: KernelChoice,
        dtype: torch.dtype,
        block: tuple[int, int],
        *,
        use_graphs: bool,
    ) -> None:
        """dtype: of the hidden states that come. use_graphs: capture each layer when it is built, for a CUDA card."""
        self.device = device
        self._choice = choice
        self._dtype = dtype
        self._block = block
        self._use_graphs = use_graphs
        self._graphs: dict[int, CapturedFfn] = {}  # the first one for each number of experts

    @property
    def numerics_id(self) -> str:
        """Card and weight path decide the order within a product; graphs, tiles and batches change no bit."""
        name = str(self._dtype).removeprefix("torch.")
        version = importlib.metadata.version("triton")
        return f"cuda-{self._choice.describe()}/{name}/triton-{version}/v{ARITHMETIC_VERSION}"

    def count_bytes(self, num_experts: int, hidden_size: int, inner: int, weight_dtype: torch.dtype) -> int:
        gate = compute_packed_bytes((inner, hidden_size), self._block)
        return num_experts * (2 * gate + compute_packed_bytes((hidden_size, inner), self._block))

    def count_working_bytes(self, hidden_size: int, inner: int) -> int:
        """Of the largest launch: per pair its row quantised, its fp32 inner row, that quantised, its fp32 result."""
        wide = 1 if self._choice.path is WeightPath.W8A8 else 2
        scales = 4 * -(-(hidden_size + inner) // self._block[1])
        per_pair = hidden_size * (4 + wide) + inner * (4 + wide) + scales
        return MAX_PAIRS_PER_LAUNCH * per_pair + _OVERHEAD_BYTES

    def reserve(self, num_experts: int, hidden_size: int, inner: int, weight_dtype: torch.dtype) -> StackRoom:
        stack = ExpertStack.allocate(np.arange(num_experts), hidden_size, inner, self._block, self.device)
        return StackRoom(stack)

    def pack_expert(self, gate: ScaledWeight, up: ScaledWeight, down: ScaledWeight, room: StackRoom) -> PlacedExpert:
        index = room.num_filled
        for projection, part in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            if part.scale_inv is None:
                raise ValueError(f"{projection}: the Triton kernels take FP8 weights with their scales")
            room.stack.put_(index, projection, part.weight, part.scale_inv)
        room.num_filled += 1
        return PlacedExpert(room.stack, index)

    @property
    def needs_whole_layers(self) -> bool:
        return True

    def adopt_expert(self, packed: PlacedExpert, room: StackRoom) -> PlacedExpert:
        index = room.num_filled
        room.stack.copy_(index, packed.stack, packed.index)
        room.num_filled += 1
        return PlacedExpert(room.stack, index)

    def build_layer(self, experts: Mapping[int, PlacedExpert], *, is_serving: bool = False) -> TritonLayer:
        """experts: by ascending id, packed one after the other. is_serving: without a graph, since nothing else may
        use the card while one is captured."""
        expert_ids = np.array(list(experts))
        first = next(iter(experts.values()))
        if [placed.index for placed in experts.values()] != list(range(first.index, first.index + len(experts))):
            raise ValueError("a layer's experts must be packed one after the other, by ascending id")
        stack = first.stack.take(first.index, expert_ids)
        return TritonLayer(stack, self._capture(stack) if self._use_graphs and not is_serving else None)

    def expert_ffn(
        self,
        hidden_states: torch.Tensor,
        pair_rows: np.ndarray,
        pair_experts: np.ndarray,
        pair_weights: np.ndarray,
        layer: TritonLayer,
        *,
        exact: bool,
    ) -> torch.Tensor:
        """The result may be a graph's own memory, which the next call overwrites."""
        graph = layer.graph
        if graph is not None and not exact and graph.fits(len(hidden_states), len(pair_rows)):
            return graph.compute(hidden_states, pair_rows, pair_experts, pair_weights)
        return expert_ffn(hidden_states, pair_rows, pair_experts, pair_weights, layer.stack, self._choice, exact=exact)

    def _capture(self, stack: ExpertStack) -> CapturedFfn:
        """Layers of one size share the first one's memory: a group computes one frame at a time."""
        # Exact frames are rare (hedges, --combine exact) and are launched kernel by kernel.
        with _on(self.device):
            if not self._graphs:
                compile_lines(stack, self._choice, self._dtype)
            graph = CapturedFfn(
                stack,
                self._choice,
                max_rows=GRAPH_ROWS,
                max_pairs=GRAPH_ROWS_PER_EXPERT * min(stack.num_experts, GRAPH_ROWS),
                dtype=self._dtype,
                exact=False,
                share_memory_with=self._graphs.get(stack.num_experts),
            )
        self._graphs.setdefault(stack.num_experts, graph)
        return graph


def compile_lines(stack: ExpertStack, choice: KernelChoice, dtype: torch.dtype) -> None:
    """Compile the tiles of every line, so that no frame waits for it: seconds each, unless Triton has them cached.

    dtype: of the hidden states. Computes a plan without rows.
    """
    layout = PlanLayout(num_rows=1, num_pairs=1, num_tiles=1)
    hidden_states = torch.zeros(1, stack.hidden_size, dtype=dtype, device=stack.device)
    packed = torch.zeros(layout.offsets[-1], dtype=torch.int32, device=stack.device)
    out = torch.empty(1, stack.hidden_size, dtype=torch.float32, device=stack.device)
    for line in choice.lines:
        launch_ffn(hidden_states, view_plan(layout, packed), stack, choice, line, out, exact=False)


@dataclass(slots=True)
class StackRoom:
    """Memory for a group's experts and how many of them are filled."""

    stack: ExpertStack
    num_filled: int = 0


class PlacedExpert(NamedTuple):
    """One expert's place in a stack."""

    stack: ExpertStack
    index: int


class TritonLayer(Mapping[int, PlacedExpert]):
    """A layer's experts by id. graph: None to launch every call kernel by kernel."""

    def __init__(self, stack: ExpertStack, graph: CapturedFfn | None) -> None:
        self.stack = stack
        self.graph = graph
        self._index_of = {expert_id: index for index, expert_id in enumerate(stack.expert_ids.tolist())}

    def __getitem__(self, expert_id: int) -> PlacedExpert:
        return PlacedExpert(self.stack, self._index_of[expert_id])

    def __iter__(self) -> Iterator[int]:
        return iter(self._index_of)

    def __len__(self) -> int:
        return len(self._index_of)


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
