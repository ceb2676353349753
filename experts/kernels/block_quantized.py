"""FP8 matrices as they stay on a card: bytes as stored, float32 scales per block, for one matrix or a layer's experts.

No arithmetic and no Triton here: what the kernels of triton_gemm.py read, checked once. Filling is in place and one
tensor at a time, so that loading never holds a second copy of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from experts.quantization import scale_shape

Block = tuple[int, int]
# Offsets within one matrix are 32-bit in the kernels.
_MAX_MATRIX_BYTES = 2**31 - 1


@dataclass(frozen=True, slots=True)
class BlockScaledMatrix:
    """weight: uint8 [rows, columns], the bits of e4m3. scale_inv: float32 [ceil(rows / block[0]), ceil(columns /
    block[1])]. Contiguous, on one device. Raises ValueError for anything else."""

    weight: torch.Tensor
    scale_inv: torch.Tensor
    block: Block

    def __post_init__(self) -> None:
        check_block(self.block)
        rows, columns = self.weight.shape
        _check(self.weight, torch.uint8, (rows, columns), "weight")
        _check(self.scale_inv, torch.float32, scale_shape((rows, columns), self.block), "scale_inv")
        if rows * columns > _MAX_MATRIX_BYTES:
            raise ValueError(f"weight: at most {_MAX_MATRIX_BYTES} bytes in one matrix, got {rows} x {columns}")

    @classmethod
    def from_fp8(
        cls, weight: torch.Tensor, scale_inv: torch.Tensor, block: Block, device: torch.device | str
    ) -> BlockScaledMatrix:
        """Bring a checkpoint's float8_e4m3fn matrix and its scales to a device."""
        return cls(
            weight.contiguous().view(torch.uint8).to(device),
            scale_inv.to(device=device, dtype=torch.float32).contiguous(),
            block,
        )

    @property
    def size_bytes(self) -> int:
        return self.weight.nbytes + self.scale_inv.nbytes


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """One layer's experts of one group, in ascending expert id, with sizes hidden (h) and inner (i).

    gate_up: uint8 [num_experts, 2 * i, h], gate first. gate_up_scale: float32 [num_experts, 2 * ceil(i / block[0]),
    ceil(h / block[1])]: up starts a block row of its own, also where i is no multiple of block[0]. down: uint8
    [num_experts, h, i]; down_scale: float32 [num_experts, ceil(h / block[0]), ceil(i / block[1])].
    """

    expert_ids: np.ndarray
    gate_up: torch.Tensor
    gate_up_scale: torch.Tensor
    down: torch.Tensor
    down_scale: torch.Tensor
    block: Block

    @classmethod
    def allocate(
        cls, expert_ids: np.ndarray, hidden_size: int, inner_size: int, block: Block, device: torch.device | str
    ) -> ExpertStack:
        """Reserve memory for these experts; every one is to be filled with put_ before use.

        Raises ValueError for a block that the kernels cannot take, or expert ids that do not ascend.
        """
        check_block(block)
        if len(expert_ids) == 0 or (np.diff(expert_ids) <= 0).any():
            raise ValueError(f"expert_ids: at least one, ascending, each once; got {expert_ids}")
        if 2 * inner_size * hidden_size > _MAX_MATRIX_BYTES:
            raise ValueError(f"an expert of {inner_size} x {hidden_size} is too large for 32-bit offsets")
        num_experts = len(expert_ids)
        inner_rows, hidden_blocks = scale_shape((inner_size, hidden_size), block)
        hidden_rows, inner_blocks = scale_shape((hidden_size, inner_size), block)

        def reserve(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            np.asarray(expert_ids, dtype=np.int64),
            reserve(num_experts, 2 * inner_size, hidden_size, dtype=torch.uint8),
            reserve(num_experts, 2 * inner_rows, hidden_blocks, dtype=torch.float32),
            reserve(num_experts, hidden_size, inner_size, dtype=torch.uint8),
            reserve(num_experts, hidden_rows, inner_blocks, dtype=torch.float32),
            block,
        )

    def put_(self, expert_id: int, projection: str, weight: torch.Tensor, scale_inv: torch.Tensor) -> None:
        """Copy one projection, as the checkpoint has it, into its place.

        projection: "gate_proj", "up_proj" or "down_proj". weight: float8_e4m3fn; scale_inv: its scales, any float.
        Raises ValueError for an expert that is not of this stack or for shapes that are not the stack's.
        """
        index = int(np.searchsorted(self.expert_ids, expert_id))
        if index == len(self.expert_ids) or self.expert_ids[index] != expert_id:
            raise ValueError(f"expert {expert_id} is not one of this stack's")
        weight_place, scale_place = self._places(projection)
        _check(weight, torch.float8_e4m3fn, tuple(weight_place.shape[1:]), f"{projection} of expert {expert_id}")
        expected = tuple(scale_place.shape[1:])
        if tuple(scale_inv.shape) != expected:
            raise ValueError(f"{projection} scales of expert {expert_id}: expected {expected}, got {scale_inv.shape}")
        # From pinned memory the copies are queued and this returns; the caller keeps that memory until they are done.
        weight_place[index].copy_(weight.view(torch.uint8), non_blocking=True)
        scale_place[index].copy_(scale_inv, non_blocking=True)

    def copy_(self, index: int, source: ExpertStack, source_index: int) -> None:
        """Copy one expert, all its projections, from a stack of the same sizes."""
        for own, other in (
            (self.gate_up, source.gate_up),
            (self.gate_up_scale, source.gate_up_scale),
            (self.down, source.down),
            (self.down_scale, source.down_scale),
        ):
            own[index].copy_(other[source_index], non_blocking=True)

    def take(self, first: int, expert_ids: np.ndarray) -> ExpertStack:
        """The experts from position `first` on, under ids of their own, in the same memory.

        So that one allocation holds every layer of a group. Raises ValueError beyond the stack's end.
        """
        part = slice(first, first + len(expert_ids))
        if not 0 <= first < part.stop <= self.num_experts:
            raise ValueError(f"experts {first}:{part.stop} of a stack of {self.num_experts}")
        return ExpertStack(
            np.asarray(expert_ids, dtype=np.int64),
            self.gate_up[part],
            self.gate_up_scale[part],
            self.down[part],
            self.down_scale[part],
            self.block,
        )

    def _places(self, projection: str) -> tuple[torch.Tensor, torch.Tensor]:
        inner, scale_rows = self.inner_size, self.num_inner_scale_rows
        if projection == "gate_proj":
            return self.gate_up[:, :inner], self.gate_up_scale[:, :scale_rows]
        if projection == "up_proj":
            return self.gate_up[:, inner:], self.gate_up_scale[:, scale_rows:]
        if projection == "down_proj":
            return self.down, self.down_scale
        raise ValueError(f"projection: expected gate_proj, up_proj or down_proj, got {projection}")

    @property
    def num_experts(self) -> int:
        return self.gate_up.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.gate_up.shape[2]

    @property
    def inner_size(self) -> int:
        return self.down.shape[2]

    @property
    def num_inner_scale_rows(self) -> int:
        """Block rows of gate alone, and of up alone."""
        return self.gate_up_scale.shape[1] // 2

    @property
    def device(self) -> torch.device:
        return self.gate_up.device

    @property
    def size_bytes(self) -> int:
        return sum(part.nbytes for part in (self.gate_up, self.gate_up_scale, self.down, self.down_scale))


def check_block(block: Block) -> None:
    """Raise ValueError unless the kernels can take a scale block of this shape (128 x 128 as published).

    A step over K is one scale block, and a matrix instruction wants a power of two, at least 32 of e4m3.
    """
    rows, columns = block
    if rows < 1 or columns not in (32, 64, 128):
        raise ValueError(f"scale blocks of {rows} x {columns}: the GPU kernels take 32, 64 or 128 columns")


def _check(tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], name: str) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected contiguous {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
            f"{'' if tensor.is_contiguous() else ', not contiguous'}"
        )
