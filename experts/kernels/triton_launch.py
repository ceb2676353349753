"""Starting a Triton kernel: the one untyped call, so that its callers can be checked."""

from __future__ import annotations

from typing import Any


def launch(kernel: Any, grid: tuple[int, ...], *arguments: object, **constants: object) -> None:
    """Queue a kernel on the current CUDA device and stream; the tensors among the arguments must be on that device.

    kernel: a @triton.jit function, which pyright takes for a plain one whose constants would have to be constexpr.
    constants: its constexpr parameters and num_warps, num_stages.
    """
    kernel[grid](*arguments, **constants)


def count_blocks(length: int, block: int) -> int:
    """Blocks that cover a length, the last one perhaps in part."""
    return -(-length // block)
