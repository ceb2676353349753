"""Which experts of which layers: rectangles, and how to cut a model into expert groups."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from experts.errors import ConfigError
from experts.model_config import ModelConfig


@dataclass(frozen=True, slots=True, order=True)
class ExpertRange:
    """A rectangle of (layer, expert) pairs; both ends are half-open, as in experts.proto.

    It may span layers without experts (dense ones): those count for nothing.
    """

    layer_start: int
    layer_end: int
    expert_start: int
    expert_end: int

    def __post_init__(self) -> None:
        if not (0 <= self.layer_start < self.layer_end and 0 <= self.expert_start < self.expert_end):
            raise ConfigError(f"expert range {self} is empty or negative")

    @property
    def expert_ids(self) -> range:
        return range(self.expert_start, self.expert_end)

    def __str__(self) -> str:
        return f"layers {self.layer_start}:{self.layer_end}, experts {self.expert_start}:{self.expert_end}"


def split_experts(config: ModelConfig, num_groups: int) -> list[tuple[ExpertRange, ...]]:
    """Cut the routed experts into num_groups contiguous ranges whose sizes differ by at most one.

    Every group serves its experts in all MoE layers, MTP layers included. Raises ConfigError if there are fewer
    experts than groups, or no MoE layer.
    """
    if not 1 <= num_groups <= config.n_routed_experts:
        raise ConfigError(f"cannot cut {config.n_routed_experts} routed experts into {num_groups} expert groups")
    layer_ids = config.moe_layer_ids
    if not layer_ids:
        raise ConfigError("the model has no layer with routed experts: first_k_dense_replace covers all of them")
    bounds = [group * config.n_routed_experts // num_groups for group in range(num_groups + 1)]
    return [(ExpertRange(layer_ids[0], layer_ids[-1] + 1, start, end),) for start, end in pairwise(bounds)]


@functools.lru_cache(maxsize=256)
def merge_ranges(*parts: tuple[ExpertRange, ...]) -> tuple[ExpertRange, ...]:
    """What any of the parts covers, as disjoint rectangles in ascending order; the same for the same pairs.

    Runs of experts are as long as can be, and joined over consecutive layers while they are the same.
    """
    ranges = [block for part in parts for block in part]
    bounds = sorted({bound for block in ranges for bound in (block.layer_start, block.layer_end)})
    merged: list[ExpertRange] = []
    open_runs: dict[tuple[int, int], int] = {}  # run of experts -> layer in which its rectangle begins
    for start, end in pairwise([*bounds, bounds[-1] + 1] if bounds else []):
        covering = [(b.expert_start, b.expert_end) for b in ranges if b.layer_start <= start and end <= b.layer_end]
        runs = set(_join_runs(covering))
        for run in open_runs.keys() - runs:
            merged.append(ExpertRange(open_runs.pop(run), start, *run))
        for run in runs:
            open_runs.setdefault(run, start)
    return tuple(sorted(merged))


def covers(outer: tuple[ExpertRange, ...], inner: tuple[ExpertRange, ...]) -> bool:
    """Whether every (layer, expert) pair of inner is in outer too."""
    return merge_ranges(outer, inner) == merge_ranges(outer)


def _join_runs(runs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Half-open runs that touch or overlap, as one each."""
    current: tuple[int, int] | None = None
    for start, end in sorted(runs):
        if current is None or start > current[1]:
            if current is not None:
                yield current
            current = start, end
        else:
            current = current[0], max(current[1], end)
    if current is not None:
        yield current


def list_hosted_pairs(config: ModelConfig, hosted: tuple[ExpertRange, ...]) -> Iterator[tuple[int, int]]:
    """Yield each hosted (layer, expert) pair of an MoE layer once, ascending.

    Raises ConfigError if a range reaches outside the model or covers no MoE layer.
    """
    for block in hosted:
        if block.layer_end > config.num_layers_total or block.expert_end > config.n_routed_experts:
            raise ConfigError(
                f"{block} reaches outside the model, which has layers 0:{config.num_layers_total} "
                f"and experts 0:{config.n_routed_experts}"
            )
        if not any(config.is_moe_layer(layer_id) for layer_id in range(block.layer_start, block.layer_end)):
            raise ConfigError(f"{block} covers no layer with routed experts; those are {config.moe_layer_ids}")
    for layer_id in config.moe_layer_ids:
        experts = {e for block in hosted if block.layer_start <= layer_id < block.layer_end for e in block.expert_ids}
        for expert_id in sorted(experts):
            yield layer_id, expert_id
