"""Placements as arrays, for the rebalancer, and as rectangles, for specs and the expert table. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from experts.expert_range import ExpertRange


def build_matrix(
    hosted: Sequence[Sequence[ExpertRange]], layer_ids: Sequence[int], n_routed_experts: int
) -> npt.NDArray[np.bool_]:
    """[num_groups, num_layers, n_routed_experts], True where hosted. layer_ids: ascending; what lies outside of them
    is left out."""
    matrix = np.zeros((len(hosted), len(layer_ids), n_routed_experts), dtype=bool)
    layers = np.asarray(layer_ids)
    for group, ranges in enumerate(hosted):
        for block in ranges:
            first, last = np.searchsorted(layers, [block.layer_start, block.layer_end])
            matrix[group, first:last, block.expert_start : block.expert_end] = True
    return matrix


def build_ranges(hosted: npt.NDArray[np.bool_], layer_ids: Sequence[int]) -> tuple[ExpertRange, ...]:
    """One group's [num_layers, n_routed_experts] as few rectangles: runs of experts, joined over consecutive layers
    while they are the same. The rectangles do not overlap and are in ascending order."""
    done: list[ExpertRange] = []
    open_runs: dict[tuple[int, int], int] = {}  # run of experts -> layer in which its rectangle begins
    previous_id: int | None = None
    for row, layer_id in enumerate(layer_ids):
        padded = np.concatenate(([False], hosted[row], [False]))
        edges = np.flatnonzero(padded[1:] != padded[:-1])
        runs = {(int(start), int(end)) for start, end in edges.reshape(-1, 2)}
        # A rectangle may span layers that are none of layer_ids: they hold no experts.
        for run in sorted(open_runs.keys() - runs):
            done.append(ExpertRange(open_runs.pop(run), _get_end(previous_id), *run))
        for run in runs:
            open_runs.setdefault(run, layer_id)
        previous_id = layer_id
    done.extend(ExpertRange(layer_start, _get_end(previous_id), *run) for run, layer_start in open_runs.items())
    return tuple(sorted(done))


def _get_end(layer_id: int | None) -> int:
    assert layer_id is not None  # a run was opened in an earlier layer
    return layer_id + 1
