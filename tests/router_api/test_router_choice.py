"""Which router gets a prompt, by the policy alone."""

import pytest

from router.api.router_choice import (
    MAX_PROMPT_BLOCKS,
    PREFIX_BLOCK,
    Candidate,
    PrefixDirectory,
    choose_router,
    compute_blocks,
)

A, B, C = "10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1"
PROMPT = list(range(5 * PREFIX_BLOCK))


def idle(*endpoints: str) -> list[Candidate]:
    return [Candidate(endpoint, 0, 0.0) for endpoint in endpoints]


def test_blocks_stand_for_everything_before_them() -> None:
    blocks = compute_blocks(PROMPT)
    assert len(blocks) == 5
    assert compute_blocks(PROMPT[:-1]) == blocks[:4]
    other = compute_blocks([PROMPT[0] + 1, *PROMPT[1:]])
    assert not set(other) & set(blocks)
    assert compute_blocks(PROMPT[: PREFIX_BLOCK - 1]) == []
    assert len(compute_blocks([1] * (2 * MAX_PROMPT_BLOCKS * PREFIX_BLOCK))) == MAX_PROMPT_BLOCKS


def test_the_longest_held_prefix_wins() -> None:
    blocks = compute_blocks(PROMPT)
    directory = PrefixDirectory()
    directory.note(blocks[:1], A)
    directory.note(blocks[:3], B)
    held = directory.count_held(blocks)
    assert held == {A: 1, B: 3}
    assert choose_router(idle(A, B, C), blocks, held) == B


def test_a_router_that_is_loaded_beyond_the_bound_is_passed_over_for_the_least_loaded() -> None:
    blocks = compute_blocks(PROMPT)
    held = {A: 5}
    others = [Candidate(B, 3, 0.0), Candidate(C, 2, 0.0)]
    assert choose_router([Candidate(A, 6, 0.0), *others], blocks, held, max_excess=4) == A
    assert choose_router([Candidate(A, 7, 0.0), *others], blocks, held, max_excess=4) == C


def test_without_a_prefix_the_least_loaded_is_chosen() -> None:
    assert choose_router([Candidate(A, 2, 0.0), Candidate(B, 1, 9.0)], compute_blocks(PROMPT), {}) == B


def test_new_prompts_spread_and_every_front_chooses_alike() -> None:
    prompts = [compute_blocks([index] * PREFIX_BLOCK) for index in range(300)]
    chosen = [choose_router(idle(A, B, C), blocks, {}) for blocks in prompts]
    assert all(70 <= chosen.count(endpoint) <= 130 for endpoint in (A, B, C))
    assert [choose_router(idle(C, A, B), blocks, {}) for blocks in prompts] == chosen
    # A router less moves only its own prompts.
    without_c = [choose_router(idle(A, B), blocks, {}) for blocks in prompts]
    assert all(new == old for new, old in zip(without_c, chosen, strict=True) if old != C)


def test_short_prompts_take_turns() -> None:
    assert choose_router([Candidate(A, 0, 2.0), Candidate(B, 0, 1.0)], [], {}) == B


def test_a_prefix_in_great_demand_gets_a_second_router_and_stays_with_both() -> None:
    blocks = compute_blocks(PROMPT)
    directory = PrefixDirectory()
    running = {A: 0, B: 0}
    for _ in range(20):
        candidates = [Candidate(endpoint, count, 0.0) for endpoint, count in running.items()]
        endpoint = choose_router(candidates, blocks, directory.count_held(blocks), max_excess=4)
        directory.note(blocks, endpoint)
        running[endpoint] += 1
    assert running == {A: 10, B: 10}
    assert directory.count_held(blocks) == {A: 5, B: 5}


def test_a_lost_router_is_forgotten() -> None:
    blocks = compute_blocks(PROMPT)
    directory = PrefixDirectory()
    directory.note(blocks, A)
    directory.note(blocks[:2], B)
    directory.forget(A)
    assert directory.count_held(blocks) == {B: 2}
    assert len(directory) == 2


def test_the_directory_is_bounded_and_drops_what_was_not_used_from_its_end() -> None:
    directory = PrefixDirectory(max_blocks=8)
    old, new = compute_blocks(PROMPT), compute_blocks([token + 1 for token in PROMPT])
    directory.note(old, A)
    directory.note(new, B)
    assert len(directory) == 8
    assert directory.count_held(new) == {B: 5}
    assert directory.count_held(old) == {A: 3}


def test_no_router_is_an_error() -> None:
    with pytest.raises(ValueError):
        choose_router([], [], {})
