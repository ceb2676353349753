import numpy as np
import pytest

from experts.expert_range import ExpertRange
from router.expert_table import EMPTY_TABLE, NUM_TURNS, ExpertTable, GroupEntry


def make_table(*hosted: tuple[ExpertRange, ...]) -> ExpertTable:
    return ExpertTable(1, tuple(GroupEntry(f"g{index}", ranges, ()) for index, ranges in enumerate(hosted)))


def test_each_expert_is_asked_of_its_host():
    table = make_table((ExpertRange(1, 3, 0, 2),), (ExpertRange(1, 3, 2, 4), ExpertRange(2, 3, 4, 5)))
    assert table.expert_groups(1, 6).tolist() == [0, 0, 1, 1, -1, -1]
    assert table.expert_groups(2, 6).tolist() == [0, 0, 1, 1, 1, -1]
    assert table.expert_groups(3, 6).tolist() == [-1] * 6
    assert table.missing([2], 6) == [(2, 5)]


def test_an_expert_of_several_groups_is_asked_of_each_in_turn():
    table = make_table((ExpertRange(1, 2, 0, 4),), (ExpertRange(1, 2, 1, 3),), (ExpertRange(1, 2, 2, 3),))
    turns = np.array([table.expert_groups(1, 4, turn) for turn in range(6)])
    assert turns[:, 0].tolist() == [0] * 6
    assert turns[:, 1].tolist() == [1, 0, 1, 0, 1, 0]
    assert sorted(turns[:3, 2].tolist()) == [0, 1, 2]
    assert (table.expert_groups(1, 4) == turns[0]).all()


def test_there_is_one_turn_unless_an_expert_has_several_hosts():
    table = make_table((ExpertRange(1, 3, 0, 2),), (ExpertRange(1, 2, 2, 4), ExpertRange(2, 3, 1, 4)))
    assert table.expert_turns(1, 4).tolist() == [[0, 0, 1, 1]]
    turns = table.expert_turns(2, 4)
    assert turns.shape == (NUM_TURNS, 4)
    assert turns[:, 1].tolist() == [1, 0] * (NUM_TURNS // 2)


@pytest.mark.parametrize("turn", range(4))
def test_many_small_rectangles_are_as_good_as_few_large_ones(turn: int):
    large = make_table((ExpertRange(1, 4, 0, 8),), (ExpertRange(1, 4, 4, 8),))
    small = make_table(
        tuple(ExpertRange(layer, layer + 1, e, e + 1) for layer in range(1, 4) for e in range(8)),
        tuple(ExpertRange(layer, layer + 1, e, e + 1) for layer in range(1, 4) for e in range(4, 8)),
    )
    for layer_id in range(5):
        assert (large.expert_groups(layer_id, 8, turn) == small.expert_groups(layer_id, 8, turn)).all()


def test_an_empty_table_hosts_nothing():
    assert EMPTY_TABLE.expert_groups(1, 3).tolist() == [-1, -1, -1]
