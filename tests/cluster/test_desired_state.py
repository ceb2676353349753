import pytest

from cluster.desired_state import (
    DesiredState,
    advance_rollout,
    begin,
    desired_from_json,
    rehost,
    replace_member,
    scale,
    start_rollout,
)
from cluster.errors import BadRecord, ChangeRefused
from experts.expert_range import ExpertRange
from tests.cluster.fakes import make_spec

TWO = begin(make_spec(num_replicas=2))
TAKEN = {"g0-0", "g0-1", "g1-0", "g1-1"}


def get_members(desired: DesiredState, name: str = "g0") -> tuple[str, ...]:
    return desired.get_group(name).member_ids


def test_scaling_up_takes_free_ids_and_leaves_other_groups_alone():
    desired = scale(TWO, {"g0": 4}, force=False, taken_ids={*TAKEN, "g0-2"}, serving_ids=TAKEN)
    assert get_members(desired) == ("g0-0", "g0-1", "g0-3", "g0-4")
    assert desired.groups[1] is TWO.groups[1]
    assert desired.version == TWO.version + 1


def test_scaling_down_drops_what_does_not_serve_then_the_highest_numbers():
    assert get_members(scale(TWO, {"g0": 1}, force=False, taken_ids=TAKEN, serving_ids=TAKEN)) == ("g0-0",)
    assert get_members(scale(TWO, {"g0": 1}, force=False, taken_ids=TAKEN, serving_ids={"g0-1"})) == ("g0-1",)


def test_the_same_numbers_change_nothing():
    assert scale(TWO, {"g0": 2, "g1": 2}, force=False, taken_ids=TAKEN, serving_ids=TAKEN) is TWO


@pytest.mark.parametrize(("name", "count"), [("g9", 1), ("g0", 0), ("g0", -1), ("g0", 65)])
def test_impossible_numbers_are_refused(name: str, count: int):
    with pytest.raises(ChangeRefused):
        scale(TWO, {name: count}, force=False, taken_ids=TAKEN, serving_ids=TAKEN)


def test_zero_is_possible_by_force():
    assert get_members(scale(TWO, {"g0": 0}, force=True, taken_ids=TAKEN, serving_ids=TAKEN)) == ()


def test_a_member_is_replaced_in_its_place_under_another_id():
    desired = replace_member(TWO, "g0-0", TAKEN)
    assert get_members(desired) == ("g0-2", "g0-1")
    with pytest.raises(ChangeRefused, match="no replica 'g0-0'"):
        replace_member(desired, "g0-0", TAKEN)
    # Once it is gone, its id is free again.
    assert get_members(replace_member(desired, "g0-1", {"g0-1", "g0-2"})) == ("g0-2", "g0-0")


def test_a_rollout_replaces_one_member_at_a_time_and_skips_what_left():
    desired = start_rollout(TWO, ["g0"])
    assert desired.rollout == ("g0-0", "g0-1")
    desired = advance_rollout(desired, TAKEN)
    assert get_members(desired) == ("g0-2", "g0-1")
    assert desired.rollout == ("g0-1",)
    desired = scale(desired, {"g0": 1}, force=False, taken_ids={*TAKEN, "g0-2"}, serving_ids={"g0-2"})
    desired = advance_rollout(desired, {"g0-2"})
    assert get_members(desired) == ("g0-2",)
    assert desired.rollout == ()


def test_a_rollout_of_nothing_named_is_one_of_everything():
    assert start_rollout(TWO, []).rollout == ("g0-0", "g0-1", "g1-0", "g1-1")
    with pytest.raises(ChangeRefused):
        start_rollout(TWO, ["g9"])


def test_it_survives_the_store():
    desired = start_rollout(scale(TWO, {"g1": 3}, force=False, taken_ids=TAKEN, serving_ids=TAKEN), ["g1"])
    assert desired_from_json(desired.to_json()) == desired
    for junk in (b"", b"[]", b"{}", b'{"version": 1, "groups": [1], "rollout": []}'):
        with pytest.raises(BadRecord):
            desired_from_json(junk)


def test_groups_can_be_given_other_experts_and_keep_their_members():
    hosted = (ExpertRange(1, 4, 0, 3), ExpertRange(1, 4, 3, 5))
    desired = rehost(TWO, {"g0": hosted})
    assert desired.get_group("g0").hosted == (ExpertRange(1, 4, 0, 5),)
    assert get_members(desired) == get_members(TWO) and desired.groups[1] == TWO.groups[1]
    assert rehost(desired, {"g0": hosted[::-1]}) is desired
    assert desired_from_json(desired.to_json()) == desired
