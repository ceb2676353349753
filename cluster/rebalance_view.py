"""What a rebalancing would gain on the running cluster: from the replicas' counts to the object of
`shoal rebalance --json`, and its picture for people. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.expert_placement import build_matrix
from cluster.rebalancer import Balance, GroupCapacity, compute_balance, rebalance
from cluster.spec import GroupSpec
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


def build_rebalance_view(
    config: ModelConfig,
    groups: Sequence[GroupSpec],
    speeds: Mapping[str, float],
    load: npt.NDArray[np.int64],
    extra_share: float,
) -> dict[str, Any]:
    """The expected gain. speeds: pairs per second of each group, all its replicas together. extra_share: memory that
    each group may use beyond what it has, and copies beyond one per expert, as parts."""
    placement = build_matrix([group.hosted for group in groups], config.moe_layer_ids, config.n_routed_experts)
    copies = placement.sum(axis=(1, 2))
    capacities = [
        GroupCapacity(group.name, speeds[group.name], int(count * (1 + extra_share)))
        for group, count in zip(groups, copies, strict=True)
    ]
    result = rebalance(load, capacities, placement, n_group=config.n_group, extra_share=extra_share)
    # With every group taken as equally fast: the figure that a count of rows per group shows.
    equal = np.ones(len(groups))
    after = result.placement.sum(axis=(1, 2))
    return {
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


def _describe_balance(balance: Balance, rows: Balance) -> dict[str, float | int]:
    return {
        "imbalance": round(balance.imbalance, 4),
        "max_over_mean": round(balance.max_over_mean, 4),
        "rows_max_over_mean": round(rows.max_over_mean, 4),
        "copies": balance.copies,
    }
