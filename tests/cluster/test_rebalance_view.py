import numpy as np

from cluster.rebalance_view import build_rebalance_view, render_rebalance, sum_pairs
from cluster.spec import build_groups
from experts.model_config import ModelConfig
from experts.v1 import experts_pb2
from tests.random_checkpoint import build_config

CONFIG = ModelConfig.from_dict(build_config())
FIRST_LAYER = CONFIG.moe_layer_ids[0]


def make_answer(layer_id: int, pairs: list[int]) -> experts_pb2.LoadResponse:
    return experts_pb2.LoadResponse(layers=[experts_pb2.LayerPairs(layer_id=layer_id, pairs=pairs)])


def test_pairs_of_all_replicas_add_up_and_what_is_unknown_is_left_out():
    load = sum_pairs(
        [make_answer(FIRST_LAYER, [1, 2]), make_answer(FIRST_LAYER, [0, 3]), make_answer(999, [7])], CONFIG
    )
    assert load.shape == (len(CONFIG.moe_layer_ids), CONFIG.n_routed_experts)
    assert load[0, :3].tolist() == [1, 5, 0]
    assert load.sum() == 6


def test_the_gain_of_copying_the_hot_experts_is_told():
    groups = build_groups(CONFIG, 2, 1)
    load = np.full((len(CONFIG.moe_layer_ids), CONFIG.n_routed_experts), 10, dtype=np.int64)
    load[:, 0] = 10 * CONFIG.n_routed_experts
    view = build_rebalance_view(CONFIG, groups, {"g0": 5.0, "g1": 5.0}, load, 0.5)
    assert view["after"]["imbalance"] < view["before"]["imbalance"]
    assert view["after"]["rows_max_over_mean"] <= 1.15
    assert view["loaded_copies"] > 0
    assert "to load" in render_rebalance(view)


def test_nothing_counted_is_nothing_to_go_by():
    load = np.zeros((len(CONFIG.moe_layer_ids), CONFIG.n_routed_experts), dtype=np.int64)
    view = build_rebalance_view(CONFIG, build_groups(CONFIG, 2, 1), {"g0": 1.0, "g1": 1.0}, load, 0.12)
    assert view["loaded_copies"] == 0
    assert "nothing to go by" in render_rebalance(view)
