"""What a rebalancing would gain on the running cluster, and the steps to it: from the replicas' counts to the object
of `shoal rebalance --json`, and its picture for people. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.expert_placement import build_matrix, build_ranges
from cluster.rebalancer import Balance, GroupCapacity, compute_balance, plan_round, rebalance
from cluster.spec import GroupSpec
from experts.expert_range import ExpertRange
from experts.model_config import ModelConfig
from experts.v1 import experts_pb2


def sum_pairs(answers: Sequence[experts_pb2.LoadResponse], config: ModelConfig) -> npt.NDArray[np.int64]:
    """[num_moe_layers, n_routed_experts]: pairs of all replicas together. Other layers and experts are left out."""
    rows = {layer_id: row for row, layer_id in enumerate(config.moe_layer_ids)}
    load = np.zeros((len(rows), config.n_routed_experts), dtype=np.int64)
    for answer in answers:
        for layer in answer.layers:
            row = rows.get(layer.layer_id)
            if row is not None:
                pairs = np.array(layer.pairs[: config.n_routed_experts], dtype=np.int64)
                load[row, : len(pairs)] += pairs
    return load


@dataclass(frozen=True, slots=True)
class Proposal:
    """Where experts should go. view: what that gains, see build_proposal. placement: [num_groups, num_layers,
    n_routed_experts], True where hosted. max_copies: that each group may hold, moving included."""

    view: Mapping[str, Any]
    group_names: tuple[str, ...]
    layer_ids: tuple[int, ...]
    placement: npt.NDArray[np.bool_]
    max_copies: tuple[int, ...]

    @property
    def is_idle(self) -> bool:
        return not (self.view["loaded_copies"] or self.view["released_copies"])


def build_proposal(
    config: ModelConfig,
    groups: Sequence[GroupSpec],
    hosted: Mapping[str, Sequence[ExpertRange]],
    speeds: Mapping[str, float],
    load: npt.NDArray[np.int64],
    extra_share: float,
) -> Proposal:
    """groups: as the cluster began. hosted: what each of them holds now. speeds: pairs per second of each group, all
    its replicas together. extra_share: memory that each group may use beyond what it began with, and copies beyond one
    per expert, as parts."""
    sizes = config.moe_layer_ids, config.n_routed_experts
    placement = build_matrix([hosted[group.name] for group in groups], *sizes)
    began_with = build_matrix([group.hosted for group in groups], *sizes).sum(axis=(1, 2))
    copies = placement.sum(axis=(1, 2))
    max_copies = tuple(
        max(int(now), int(count * (1 + extra_share))) for now, count in zip(copies, began_with, strict=True)
    )
    capacities = [
        GroupCapacity(group.name, speeds[group.name], most) for group, most in zip(groups, max_copies, strict=True)
    ]
    result = rebalance(load, capacities, placement, n_group=config.n_group, extra_share=extra_share)
    # With every group taken as equally fast: the figure that a count of rows per group shows.
    equal = np.ones(len(groups))
    after = result.placement.sum(axis=(1, 2))
    view = {
        "num_pairs": int(load.sum()),
        "before": _describe_balance(result.before, compute_balance(load, equal, placement)),
        "after": _describe_balance(result.after, compute_balance(load, equal, result.placement)),
        "loaded_copies": result.loaded,
        "released_copies": result.released,
        "groups": [
            {"name": group.name, "copies_before": int(before), "copies_after": int(now)}
            for group, before, now in zip(groups, copies, after, strict=True)
        ],
    }
    return Proposal(view, tuple(group.name for group in groups), sizes[0], result.placement, max_copies)


def plan_moves(
    proposal: Proposal, published: Mapping[str, Sequence[ExpertRange]]
) -> dict[str, tuple[ExpertRange, ...]] | None:
    """What groups should hold next, from what they hold; None once that is what was proposed. See plan_round."""
    num_experts = proposal.placement.shape[2]
    current = build_matrix([published[name] for name in proposal.group_names], proposal.layer_ids, num_experts)
    placement = plan_round(current, proposal.placement, proposal.max_copies)
    if placement is None:
        return None
    return {name: build_ranges(placement[index], proposal.layer_ids) for index, name in enumerate(proposal.group_names)}


def render_rebalance(view: Mapping[str, Any]) -> str:
    if not view["num_pairs"]:
        return "no expert has been asked for yet: there is nothing to go by"
    before, after = view["before"], view["after"]
    lines = [
        f"counted: {view['num_pairs']} (row, expert) pairs",
        f"slowest group over the mean, layer by layer: {before['imbalance']:.2f} now, "
        f"{after['imbalance']:.2f} expected",
        f"rows per group, max over mean:               {before['rows_max_over_mean']:.2f} now, "
        f"{after['rows_max_over_mean']:.2f} expected",
        f"copies of experts: {view['loaded_copies']} to load, {view['released_copies']} to release, "
        f"{after['copies']} in all ({after['copies'] / before['copies'] - 1:+.1%})",
    ]
    lines.extend(
        f"  {group['name']}: {group['copies_before']} -> {group['copies_after']} copies" for group in view["groups"]
    )
    return "\n".join(lines)


def render_measured(measured: Mapping[str, Any]) -> str:
    before, after = measured["before"], measured["after"]
    if before["rows_max_over_mean"] is None or after["rows_max_over_mean"] is None:
        return "measured: nothing, as there was no load before or after"
    return (
        f"rows per group, max over mean:               {before['rows_max_over_mean']:.2f} before, "
        f"{after['rows_max_over_mean']:.2f} measured now\n"
        f"(row, expert) pairs per second:              {before['pairs_per_s']:.0f} before, "
        f"{after['pairs_per_s']:.0f} measured now"
    )


def _describe_balance(balance: Balance, rows: Balance) -> dict[str, float | int]:
    return {
        "imbalance": round(balance.imbalance, 4),
        "max_over_mean": round(balance.max_over_mean, 4),
        "rows_max_over_mean": round(rows.max_over_mean, 4),
        "copies": balance.copies,
    }
