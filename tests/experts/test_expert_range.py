"""Cutting the experts of a model into groups."""

from __future__ import annotations

import pytest

from experts.errors import ConfigError
from experts.expert_range import ExpertRange, covers, list_hosted_pairs, merge_ranges, split_experts
from experts.model_config import ModelConfig
from tests.random_checkpoint import build_config

CONFIG = ModelConfig.from_dict(build_config(num_hidden_layers=3, first_k_dense_replace=1, num_nextn_predict_layers=1))


@pytest.mark.parametrize("num_groups", [1, 2, 3, 4, 5, 7, 16])
def test_every_expert_of_every_moe_layer_is_in_exactly_one_group(num_groups: int) -> None:
    groups = split_experts(CONFIG, num_groups)
    pairs = [pair for group in groups for pair in list_hosted_pairs(CONFIG, group)]
    assert sorted(pairs) == [(layer, expert) for layer in (1, 2, 3) for expert in range(16)]
    sizes = [len(list(list_hosted_pairs(CONFIG, group))) // 3 for group in groups]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("num_groups", [0, 17])
def test_refuses_a_number_of_groups_that_cannot_be(num_groups: int) -> None:
    with pytest.raises(ConfigError, match=f"16 routed experts into {num_groups}"):
        split_experts(CONFIG, num_groups)


def test_overlapping_ranges_list_a_pair_once() -> None:
    hosted = (ExpertRange(1, 3, 0, 2), ExpertRange(2, 4, 1, 3))
    assert list(list_hosted_pairs(CONFIG, hosted)) == [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 1), (3, 2)]


@pytest.mark.parametrize(
    ("hosted", "message"),
    [
        (ExpertRange(1, 5, 0, 1), "reaches outside the model"),
        (ExpertRange(1, 2, 0, 17), "reaches outside the model"),
        (ExpertRange(0, 1, 0, 1), "covers no layer with routed experts"),
    ],
)
def test_refuses_a_range_that_the_model_does_not_have(hosted: ExpertRange, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(list_hosted_pairs(CONFIG, (hosted,)))


@pytest.mark.parametrize("bounds", [(1, 1, 0, 1), (2, 1, 0, 1), (0, 1, 3, 3), (-1, 1, 0, 1)])
def test_refuses_an_empty_rectangle(bounds: tuple[int, int, int, int]) -> None:
    with pytest.raises(ConfigError):
        ExpertRange(*bounds)


def test_merged_ranges_are_the_same_for_the_same_pairs() -> None:
    whole = (ExpertRange(1, 4, 0, 4),)
    pieces = (ExpertRange(1, 2, 0, 4), ExpertRange(2, 4, 2, 4), ExpertRange(2, 4, 0, 3))
    assert merge_ranges(pieces) == merge_ranges(whole, pieces) == whole
    assert merge_ranges(whole, (ExpertRange(2, 3, 6, 8), ExpertRange(6, 7, 0, 1))) == (
        ExpertRange(1, 4, 0, 4),
        ExpertRange(2, 3, 6, 8),
        ExpertRange(6, 7, 0, 1),
    )
    assert merge_ranges(()) == ()


def test_covering_is_about_pairs_not_rectangles() -> None:
    pieces = (ExpertRange(1, 2, 0, 2), ExpertRange(1, 2, 2, 4))
    assert covers(pieces, (ExpertRange(1, 2, 1, 3),))
    assert not covers(pieces, (ExpertRange(1, 3, 1, 3),))
    assert covers(pieces, ())
