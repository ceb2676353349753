import numpy as np
import pytest

from cluster.expert_placement import build_matrix, build_ranges
from experts.expert_range import ExpertRange

LAYER_IDS = (1, 2, 3, 6)


def test_a_rectangle_stays_one():
    hosted = ((ExpertRange(1, 7, 2, 5),),)
    matrix = build_matrix(hosted, LAYER_IDS, 8)
    assert matrix[0].sum() == 4 * 3
    assert build_ranges(matrix[0], LAYER_IDS) == hosted[0]


def test_an_expert_more_in_one_layer_splits_only_where_it_must():
    matrix = build_matrix([[ExpertRange(1, 7, 2, 5)]], LAYER_IDS, 8)
    matrix[0, 1, 7] = True
    assert build_ranges(matrix[0], LAYER_IDS) == (ExpertRange(1, 7, 2, 5), ExpertRange(2, 3, 7, 8))


def test_nothing_hosted_is_no_rectangle():
    assert build_ranges(np.zeros((4, 8), dtype=bool), LAYER_IDS) == ()


@pytest.mark.parametrize("seed", range(20))
def test_any_placement_survives_the_way_there_and_back(seed: int):
    random = np.random.default_rng(seed)
    matrix = random.random((3, 4, 16)) < random.random()
    ranges = [build_ranges(group, LAYER_IDS) for group in matrix]
    assert (build_matrix(ranges, LAYER_IDS, 16) == matrix).all()
