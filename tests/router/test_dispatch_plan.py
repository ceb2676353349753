"""Which rows go to which group: exact comparisons, adversarial routing included."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.dispatch_plan import GroupFrame, plan_frames

# Experts 0-1 in group 0, 2-3 in group 1, 4-5 in group 2.
EXPERT_GROUPS = np.array([[0, 0, 1, 1, 2, 2]], dtype=np.int64)


def plan(topk_ids: list[list[int]], topk_weights: list[list[float]] | None = None) -> list[GroupFrame]:
    ids = np.array(topk_ids, dtype=np.int64)
    if topk_weights is None:
        weights = (np.arange(1, ids.size + 1).reshape(ids.shape) / 10).astype(np.float32)
    else:
        weights = np.array(topk_weights, dtype=np.float32)
    return plan_frames(ids, weights, EXPERT_GROUPS)


def pairs(frame: GroupFrame) -> list[tuple[int, int, float]]:
    """(row of the batch, expert, weight rounded), in the frame's order."""
    return [
        (int(frame.row_ids[row]), int(expert), round(float(weight), 4))
        for row, expert, weight in zip(frame.pair_rows, frame.pair_experts, frame.pair_weights, strict=True)
    ]


def test_worked_example_of_the_module() -> None:
    first, second = plan([[1, 0], [3, 2], [0, 3]], [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])

    assert (first.group_index, second.group_index) == (0, 1)
    assert first.row_ids.tolist() == [0, 2]
    assert pairs(first) == [(0, 0, 0.2), (0, 1, 0.1), (2, 0, 0.5)]
    assert second.row_ids.tolist() == [1, 2]
    assert pairs(second) == [(1, 2, 0.4), (1, 3, 0.3), (2, 3, 0.6)]
    # Slot: row * num_experts_per_tok + rank of the expert among the row's, ascending by id.
    assert first.pair_slots.tolist() == [0, 1, 4]
    assert second.pair_slots.tolist() == [2, 3, 5]


def test_all_tokens_to_one_expert_make_one_frame() -> None:
    (frame,) = plan([[4]] * 50)

    assert frame.group_index == 2
    assert frame.row_ids.tolist() == list(range(50))
    assert set(frame.pair_experts.tolist()) == {4}


def test_a_group_that_no_row_chose_gets_no_frame() -> None:
    frames = plan([[0, 5], [1, 4]])

    assert [frame.group_index for frame in frames] == [0, 2]


def test_an_empty_batch_makes_no_frame() -> None:
    assert plan_frames(np.empty((0, 2), np.int64), np.empty((0, 2), np.float32), EXPERT_GROUPS) == []


def test_a_negative_id_is_no_choice() -> None:
    (frame,) = plan([[-1, 2], [-1, -1]])

    assert pairs(frame) == [(0, 2, 0.2)]


def test_no_choice_at_all_makes_no_frame() -> None:
    assert plan([[-1, -1], [-1, -1]]) == []


def test_a_repeated_expert_keeps_both_pairs_and_one_row() -> None:
    (frame,) = plan([[3, 3]])

    assert frame.row_ids.tolist() == [0]
    assert pairs(frame) == [(0, 3, 0.1), (0, 3, 0.2)]


def test_an_unserved_expert_is_named() -> None:
    groups = EXPERT_GROUPS.copy()
    groups[0, 3] = -1

    with pytest.raises(LookupError, match="expert 3"):
        plan_frames(np.array([[0, 3]]), np.ones((1, 2), np.float32), groups)


def test_dtypes_are_those_of_the_wire() -> None:
    (frame,) = plan([[0, 1]])

    assert (frame.row_ids.dtype, frame.pair_rows.dtype, frame.pair_experts.dtype, frame.pair_weights.dtype) == (
        np.int64, np.int32, np.int32, np.float32,
    )  # fmt: skip


@st.composite
def routings(draw: st.DrawFn) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(topk_ids, expert_groups): any skew, ids -1 and repeated ids included."""
    num_experts = draw(st.integers(1, 12))
    num_tokens = draw(st.integers(0, 9))
    num_experts_per_tok = draw(st.integers(1, 4))
    ids = draw(
        st.lists(
            st.lists(st.integers(-1, num_experts - 1), min_size=num_experts_per_tok, max_size=num_experts_per_tok),
            min_size=num_tokens,
            max_size=num_tokens,
        )
    )
    groups = draw(st.lists(st.integers(0, 3), min_size=num_experts, max_size=num_experts))
    shape = (num_tokens, num_experts_per_tok)
    return np.array(ids, dtype=np.int64).reshape(shape), np.array(groups, dtype=np.int64)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(routings())
def test_every_choice_is_planned_once_and_in_order(
    routing: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]],
) -> None:
    topk_ids, expert_groups = routing
    num_experts_per_tok = topk_ids.shape[1]
    weights = np.arange(1, topk_ids.size + 1, dtype=np.float32).reshape(topk_ids.shape)

    frames = plan_frames(topk_ids, weights, expert_groups[None])

    chosen = {
        (row, int(expert), float(weights[row, column]))
        for row in range(topk_ids.shape[0])
        for column, expert in enumerate(topk_ids[row])
        if expert >= 0
    }
    planned = [pair for frame in frames for pair in pairs(frame)]
    assert len(planned) == len(chosen)
    assert set(planned) == chosen
    assert [frame.group_index for frame in frames] == sorted({int(expert_groups[e]) for _, e, _ in chosen})
    slots: list[int] = []
    for frame in frames:
        in_frame = pairs(frame)
        assert [(row, expert) for row, expert, _ in in_frame] == sorted((row, expert) for row, expert, _ in in_frame)
        assert frame.row_ids.tolist() == sorted({row for row, _, _ in in_frame})
        assert all(int(expert_groups[expert]) == frame.group_index for _, expert, _ in in_frame)
        assert [slot // num_experts_per_tok for slot in frame.pair_slots] == [row for row, _, _ in in_frame]
        slots.extend(int(slot) for slot in frame.pair_slots)
    assert len(set(slots)) == len(slots)
    # In slot order the pairs of a row ascend by expert: the order of --combine exact.
    by_slot = sorted(zip(slots, planned, strict=True))
    assert [(row, expert) for _, (row, expert, _) in by_slot] == sorted((row, expert) for row, expert, _ in planned)


@pytest.mark.parametrize("num_tokens", [1, 2, 4])
def test_a_plan_of_few_rows_is_the_plan_of_many(num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain Python plans few pairs, numpy many."""
    generator = np.random.default_rng(num_tokens)
    for _ in range(50):
        topk_ids = np.stack([generator.permutation(12)[:6] for _ in range(num_tokens)]).astype(np.int64)
        topk_ids[generator.random(topk_ids.shape) < 0.2] = -1
        topk_weights = generator.random(topk_ids.shape).astype(np.float32)
        expert_groups = generator.integers(0, 4, (generator.choice([1, 16]), 12))
        few = plan_frames(topk_ids, topk_weights, expert_groups)
        with monkeypatch.context() as patched:
            patched.setattr("router.dispatch_plan._FEW_PAIRS", 0)
            many = plan_frames(topk_ids, topk_weights, expert_groups)
        assert len(few) == len(many)
        for found, expected in zip(few, many, strict=True):
            assert found.group_index == expected.group_index
            for name, ours, theirs in zip(found._fields[1:], found[1:], expected[1:], strict=True):
                assert ours.dtype == theirs.dtype, name
                np.testing.assert_array_equal(ours, theirs, err_msg=name)


def test_rows_take_turns_with_the_hosts_of_an_expert_and_each_row_always_the_same() -> None:
    generator = np.random.default_rng(3)
    # As a gate makes them: all rows have the same sum, and here all weights the same exponent, too.
    weights = (0.6 + 0.05 * generator.random((600, 4))).astype(np.float32)
    weights *= 2.5 / weights.sum(axis=1, keepdims=True)
    topk_ids = np.tile(np.arange(4), (600, 1))
    # Expert 0 is hosted by groups 0, 1 and 2, the others by group 3.
    expert_groups = np.array([[turn % 3, 3, 3, 3] for turn in range(16)])
    frames = plan_frames(topk_ids, weights, expert_groups)
    rows = [set(frame.row_ids.tolist()) for frame in frames[:3]]
    assert sum(map(len, rows)) == 600 and min(map(len, rows)) > 150
    for row in range(0, 600, 50):
        (alone, _) = plan_frames(topk_ids[row : row + 1], weights[row : row + 1], expert_groups)
        assert row in rows[alone.group_index]
