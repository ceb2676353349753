"""One layer's experts as a CUDA graph: the launches of triton_ffn.py recorded once at fixed sizes, then replayed.

Why: a decode frame of few rows takes less time on the card than Python needs to launch five Triton kernels. A graph
is captured for the most rows and pairs it will serve; a smaller frame leaves the rest of the grid without work. The
plan is made on the host and copied in, so nothing waits for the device. Results have the bits of triton_ffn.expert_ffn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from experts.kernels.block_quantized import ExpertStack
from experts.kernels.row_plan import PlanLayout, compute_max_tiles, plan_rows
from experts.kernels.tile_table import KernelChoice
from experts.kernels.triton_ffn import launch_ffn, view_plan


class CapturedFfn:
    """Owns the graph and its input and output memory. Not thread-safe: callers take turns."""

    def __init__(
        self,
        stack: ExpertStack,
        choice: KernelChoice,
        *,
        max_rows: int,
        max_pairs: int,
        dtype: torch.dtype,
        exact: bool,
        share_memory_with: CapturedFfn | None = None,
    ) -> None:
        """Compile and capture. stack must stay in memory, filled.

        dtype: of the hidden states. share_memory_with: a graph captured before, such as the last layer's, whose input,
        result and scratch memory this one uses too, as they never run at once; None for memory of its own.
        Raises ValueError if the sizes of the two differ.
        """
        self._stack = stack
        self._exact = exact
        line = choice.choose_tiles(max_pairs / min(stack.num_experts, max_pairs))
        self._block_rows = line.block_rows
        max_tiles = compute_max_tiles(max_pairs, stack.num_experts, line.block_rows)
        self._layout = PlanLayout(max_rows, max_pairs, max_tiles)
        if share_memory_with is None:
            self._memory = _GraphMemory.allocate(self._layout, stack, dtype, exact=exact)
            pool = None
        else:
            self._memory = share_memory_with._memory
            pool = share_memory_with._graph.pool()
            shared = (share_memory_with._layout, share_memory_with._exact, self._memory.hidden_states.dtype)
            if shared != (self._layout, exact, dtype):
                raise ValueError(f"memory for {shared} cannot be shared by a graph for {(self._layout, exact, dtype)}")
        # All zero is a plan without rows: what compiling and capturing run on.
        self._memory.packed.zero_()
        plan = view_plan(self._layout, self._memory.packed)
        arguments = (self._memory.hidden_states, plan, stack, choice, line, self._memory.result)
        stream = torch.cuda.Stream(stack.device)
        stream.wait_stream(torch.cuda.current_stream(stack.device))
        with torch.cuda.stream(stream):
            # Compilation is not allowed while a stream is captured.
            launch_ffn(*arguments, exact=exact)
        torch.cuda.current_stream(stack.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            launch_ffn(*arguments, exact=exact)

    def fits(self, num_rows: int, num_pairs: int) -> bool:
        """Whether a frame of these sizes can be computed here."""
        return num_rows <= self._layout.num_rows and num_pairs <= self._layout.num_pairs

    def compute(
        self,
        hidden_states: torch.Tensor,
        pair_rows: np.ndarray,
        pair_experts: np.ndarray,
        pair_weights: np.ndarray,
    ) -> torch.Tensor:
        """Compute a frame as triton_ffn.expert_ffn does.

        hidden_states: [num_rows, hidden], on the device or in host memory (pinned: the copy overlaps).
        Returns a view of the graph's own result, float32 [num_pairs if exact else num_rows, hidden]: the next call
        of this graph, or of one that shares its memory, overwrites it. Raises ValueError for a frame that does not fit.
        """
        num_rows, num_pairs = hidden_states.shape[0], len(pair_rows)
        if not self.fits(num_rows, num_pairs):
            raise ValueError(
                f"captured for {self._layout.num_rows} rows and {self._layout.num_pairs} pairs, "
                f"got {num_rows} and {num_pairs}"
            )
        local_experts = np.searchsorted(self._stack.expert_ids, pair_experts)
        plan = plan_rows(pair_rows, local_experts, num_rows, self._block_rows)
        self._memory.packed.copy_(torch.from_numpy(self._layout.pack(plan, pair_weights)), non_blocking=True)
        self._memory.hidden_states[:num_rows].copy_(hidden_states, non_blocking=True)
        self._graph.replay()
        return self._memory.result[: num_pairs if self._exact else num_rows]


@dataclass(frozen=True, slots=True)
class _GraphMemory:
    """Where a graph reads its frame and leaves its result: addresses that stay."""

    hidden_states: torch.Tensor  # [max_rows, hidden]
    packed: torch.Tensor  # int32, see PlanLayout
    result: torch.Tensor  # float32 [max_pairs if exact else max_rows, hidden]

    @classmethod
    def allocate(cls, layout: PlanLayout, stack: ExpertStack, dtype: torch.dtype, *, exact: bool) -> _GraphMemory:
        num_results = layout.num_pairs if exact else layout.num_rows
        return cls(
            torch.zeros(layout.num_rows, stack.hidden_size, dtype=dtype, device=stack.device),
            torch.zeros(layout.offsets[-1], dtype=torch.int32, device=stack.device),
            torch.zeros(num_results, stack.hidden_size, dtype=torch.float32, device=stack.device),
        )
