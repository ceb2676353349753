"""Which experts are asked for, by layer: the object of the admin API's /load, for heatmap and metrics. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.rebalance_view import sum_pairs
from experts.model_config import ModelConfig
from experts.v1 import experts_pb2


def build_expert_load(answers: Sequence[experts_pb2.LoadResponse], config: ModelConfig) -> dict[str, Any]:
    """pairs: by expert id, of all replicas together, within the last window_s seconds. Layers without any are left
    out."""
    counts = sum_pairs(answers, config)
    return {
        "window_s": max((answer.count_window_s for answer in answers), default=0.0),
        "num_experts": config.n_routed_experts,
        "layers": [
            {"layer": layer_id, "pairs": row.tolist()}
            for layer_id, row in zip(config.moe_layer_ids, counts, strict=True)
            if row.any()
        ],
    }
