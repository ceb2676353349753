import numpy as np
import numpy.typing as npt

from cluster.expert_placement import build_matrix
from cluster.rebalance_view import Proposal, build_proposal, plan_moves, render_rebalance, sum_pairs
from cluster.spec import build_groups
from experts.model_config import ModelConfig
from experts.v1 import experts_pb2
from tests.random_checkpoint import build_config

CONFIG = ModelConfig.from_dict(build_config())
FIRST_LAYER = CONFIG.moe_layer_ids[0]


def make_answer(layer_id: int, pairs: list[int]) -> experts_pb2.LoadResponse:
    return experts_pb2.LoadResponse(layers=[experts_pb2.LayerPairs(layer_id=layer_id, pairs=pairs)])


def propose(load: npt.NDArray[np.int64], extra_share: float) -> Proposal:
    groups = build_groups(CONFIG, 2, 1)
    hosted = {group.name: group.hosted for group in groups}
    return build_proposal(CONFIG, groups, hosted, {"g0": 5.0, "g1": 5.0}, load, extra_share)


def test_pairs_of_all_replicas_add_up_and_what_is_unknown_is_left_out():
    load = sum_pairs(
        [make_answer(FIRST_LAYER, [1, 2]), make_answer(FIRST_LAYER, [0, 3]), make_answer(999, [7])], CONFIG
    )
    assert load.shape == (len(CONFIG.moe_layer_ids), CONFIG.n_routed_experts)
    assert load[0, :3].tolist() == [1, 5, 0]
    assert load.sum() == 6


def test_the_gain_of_copying_the_hot_experts_is_told():
    load = np.full((len(CONFIG.moe_layer_ids), CONFIG.n_routed_experts), 10, dtype=np.int64)
    load[:, 0] = 10 * CONFIG.n_routed_experts
    view = propose(load, 0.5).view
    assert view["after"]["imbalance"] < view["before"]["imbalance"]
    assert view["after"]["rows_max_over_mean"] <= 1.15
    assert view["loaded_copies"] > 0
    assert "to load" in render_rebalance(view)


def test_nothing_counted_is_nothing_to_go_by():
    load = np.zeros((len(CONFIG.moe_layer_ids), CONFIG.n_routed_experts), dtype=np.int64)
    proposal = propose(load, 0.12)
    view = proposal.view
    assert proposal.is_idle and view["loaded_copies"] == 0
    assert "nothing to go by" in render_rebalance(view)


def test_moves_lead_to_the_proposed_placement_and_end_there():
    load = np.full((len(CONFIG.moe_layer_ids), CONFIG.n_routed_experts), 10, dtype=np.int64)
    load[:, 0] = 10 * CONFIG.n_routed_experts
    proposal = propose(load, 0.1)
    held = {group.name: group.hosted for group in build_groups(CONFIG, 2, 1)}
    for _ in range(50):
        placements = plan_moves(proposal, held)
        if placements is None:
            break
        held = placements
    assert plan_moves(proposal, held) is None
    assert (
        build_matrix(list(held.values()), CONFIG.moe_layer_ids, CONFIG.n_routed_experts) == proposal.placement
    ).all()
