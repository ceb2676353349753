"""Who runs in the next step, and with which blocks. No torch: the engine is played by a few lines."""

import itertools
import random
import subprocess
import sys
from typing import Any

import pytest

from router.block_pool import BLOCK_SIZE
from router.errors import BadRequest, QueueFull
from router.fair_queue import FairQueue
from router.queue_policy import FirstComeFirstServed
from router.scheduler import Scheduler, SchedulerLimits
from router.sequence import Sequence
from tests.router.in_process import request

LIMITS = SchedulerLimits(max_num_seqs=3, max_batched_tokens=10, num_blocks=12, max_waiting=4)


def sequence(num_prompt: int, max_tokens: int = 5, *, first_token: int = 0, **overrides: Any) -> Sequence:
    prompt = list(range(first_token, first_token + num_prompt))
    return Sequence(request=request(prompt, max_tokens, **overrides), token_ids=prompt)


def run_step(scheduler: Scheduler, num_accepted: int = 0) -> list[tuple[Sequence, int]]:
    """What an engine does to lengths: compute the chunk, and add a token where everything known is computed, and as
    many more as drafts hold."""
    chunks = scheduler.schedule()
    scheduler.check_integrity()
    for chunk in chunks:
        each = chunk.sequence
        computed = each.num_computed + chunk.num_new - chunk.num_drafts
        if computed == len(each.token_ids):
            accepted = each.draft_token_ids[: min(num_accepted, chunk.num_drafts)]
            each.draft_token_ids = []
            for token_id in [*accepted, len(each.token_ids) + 1000]:
                each.append(token_id)
            computed = len(each.token_ids) - 1
        scheduler.advance(each, computed)
        if each.num_generated >= each.request.max_tokens:
            scheduler.remove(each)
    scheduler.check_integrity()
    return [(chunk.sequence, chunk.num_new) for chunk in chunks]


def run_to_end(scheduler: Scheduler, max_steps: int = 10_000) -> int:
    for num_steps in range(max_steps):
        if not run_step(scheduler):
            assert not scheduler.waiting and not scheduler.running
            return num_steps
    raise AssertionError(f"{len(scheduler.waiting)} wait and {len(scheduler.running)} run after {max_steps} steps")


def test_it_needs_no_torch() -> None:
    script = "import sys, router.scheduler; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_long_prompt_is_cut_into_chunks_of_the_step_budget() -> None:
    scheduler = Scheduler(LIMITS)
    long = sequence(25)
    scheduler.add(long)
    assert [run_step(scheduler) for _ in range(4)] == [[(long, 10)], [(long, 10)], [(long, 5)], [(long, 1)]]


def test_decode_goes_before_prefill_in_every_step_and_the_prompt_gets_the_rest() -> None:
    scheduler = Scheduler(LIMITS)
    first, long = sequence(2), sequence(25)
    scheduler.add(first)
    run_step(scheduler)
    scheduler.add(long)
    assert run_step(scheduler) == [(first, 1), (long, 9)]
    assert run_step(scheduler) == [(first, 1), (long, 9)]


def test_no_more_run_than_allowed_and_the_next_joins_when_one_leaves() -> None:
    scheduler = Scheduler(LIMITS)
    sequences = [sequence(2) for _ in range(4)]
    for each in sequences:
        scheduler.add(each)
    run_step(scheduler)
    assert scheduler.running == sequences[:3]
    scheduler.remove(sequences[1])
    run_step(scheduler)
    assert scheduler.running == [sequences[0], sequences[2], sequences[3]]
    assert not scheduler.waiting


def test_blocks_are_taken_as_a_sequence_grows() -> None:
    scheduler = Scheduler(LIMITS)
    growing = sequence(10, 100)
    scheduler.add(growing)
    run_step(scheduler)
    assert len(growing.block_ids) == 1
    while growing.num_computed < BLOCK_SIZE:
        assert len(growing.block_ids) == 1
        run_step(scheduler)
    run_step(scheduler)
    assert len(growing.block_ids) == 2


def test_a_sequence_waits_until_its_prompt_has_room_and_nobody_overtakes_it() -> None:
    scheduler = Scheduler(LIMITS)
    first, big, small = sequence(6 * BLOCK_SIZE), sequence(7 * BLOCK_SIZE, first_token=500), sequence(5)
    for each in (first, big, small):
        scheduler.add(each)
    run_step(scheduler)
    assert scheduler.running == [first] and scheduler.waiting == [big, small]
    scheduler.remove(first)
    while scheduler.waiting:
        run_step(scheduler)
        assert scheduler.running[0] is big
    assert scheduler.running == [big, small]


def test_lower_priority_values_go_first_and_then_who_came_first() -> None:
    scheduler = Scheduler(SchedulerLimits(max_num_seqs=1, max_batched_tokens=10, num_blocks=12, max_waiting=9))
    ranks = (1, 0, -1, 0, 1)
    sequences = [sequence(2, 1, priority=priority) for priority in ranks]
    for each in sequences:
        scheduler.add(each)
    order = [step[0][0] for _ in sequences if (step := run_step(scheduler))]
    assert order == [sequences[index] for index in (2, 1, 3, 0, 4)]


def test_what_another_router_had_begun_goes_first_and_finds_no_queue_too_long() -> None:
    scheduler = Scheduler(LIMITS)
    new = [sequence(2, first_token=10 * number) for number in range(LIMITS.max_waiting)]
    urgent = sequence(2, first_token=90, priority=-1, num_answer_tokens=1)
    begun = sequence(3, first_token=80, num_answer_tokens=2)
    for each in new:
        scheduler.add(each)
    with pytest.raises(QueueFull):
        scheduler.add(sequence(2))
    for each in (begun, urgent):
        scheduler.add(each)
    assert scheduler.waiting == [urgent, begun, *new]


def test_a_policy_ranks_by_what_it_likes() -> None:
    class ShortestFirst(FirstComeFirstServed):
        def peek(self) -> Sequence | None:
            return min(self.list_waiting(), key=lambda each: each.num_prompt_tokens, default=None)

    scheduler = Scheduler(LIMITS, ShortestFirst())
    long, short = sequence(30), sequence(3)
    scheduler.add(long)
    scheduler.add(short)
    assert run_step(scheduler) == [(short, 3), (long, 7)]


def test_the_youngest_gives_way_when_blocks_run_out_and_is_computed_anew() -> None:
    limits = SchedulerLimits(max_num_seqs=3, max_batched_tokens=200, num_blocks=4, max_waiting=4)
    scheduler = Scheduler(limits)
    old, young = sequence(BLOCK_SIZE - 2, 70), sequence(BLOCK_SIZE - 2, 70, first_token=500)
    scheduler.add(old)
    run_step(scheduler)
    scheduler.add(young)
    while scheduler.counters.num_preemptions == 0:
        run_step(scheduler)
    assert scheduler.running == [old] and scheduler.waiting == [young]
    assert young.block_ids == [] and young.num_computed == 0 and young.num_generated > 0
    run_to_end(scheduler)
    assert old.num_generated == young.num_generated == 70
    assert scheduler.pool.num_free == 4


def test_a_more_urgent_one_that_came_later_is_not_the_one_to_give_way() -> None:
    limits = SchedulerLimits(max_num_seqs=3, max_batched_tokens=200, num_blocks=4, max_waiting=4)
    scheduler = Scheduler(limits)
    patient, urgent = sequence(BLOCK_SIZE - 2, 70), sequence(BLOCK_SIZE - 2, 70, first_token=500, priority=-1)
    scheduler.add(patient)
    run_step(scheduler)
    scheduler.add(urgent)
    while scheduler.counters.num_preemptions == 0:
        run_step(scheduler)
    assert scheduler.running == [urgent]
    run_to_end(scheduler)


def test_what_never_fits_and_what_finds_a_full_queue_is_refused_at_once() -> None:
    scheduler = Scheduler(LIMITS)
    with pytest.raises(BadRequest, match="needs 385 tokens of KV cache, this router holds 384"):
        scheduler.add(sequence(384, 1))
    for _ in range(4):
        scheduler.add(sequence(2))
    with pytest.raises(QueueFull, match="4 requests are waiting"):
        scheduler.add(sequence(2))


def test_a_sequence_that_needs_every_block_runs_to_its_end() -> None:
    scheduler = Scheduler(LIMITS)
    whole = sequence(12 * BLOCK_SIZE - 20, 20)
    scheduler.add(sequence(40, 30, first_token=900))
    scheduler.add(whole)
    run_to_end(scheduler)
    assert whole.num_generated == 20


def test_removing_a_waiting_sequence_or_one_twice_leaves_the_accounts_right() -> None:
    scheduler = Scheduler(LIMITS)
    waiting = sequence(2)
    scheduler.add(waiting)
    scheduler.remove(waiting)
    scheduler.remove(waiting)
    assert scheduler.schedule() == []
    running = sequence(50, 46)
    scheduler.add(running)
    run_step(scheduler)
    scheduler.remove(running)
    scheduler.remove(running)
    scheduler.check_integrity()
    assert scheduler.pool.num_free == 12


def test_a_known_prefix_is_not_computed_again() -> None:
    scheduler = Scheduler(LIMITS)
    first = sequence(3 * BLOCK_SIZE + 5, 1)
    scheduler.add(first)
    run_to_end(scheduler)
    assert first.num_cached_tokens == 0
    same, longer = sequence(3 * BLOCK_SIZE + 5, 1), sequence(3 * BLOCK_SIZE + 7, 1)
    scheduler.add(same)
    scheduler.add(longer)
    assert run_step(scheduler) == [(same, 5), (longer, 5)]
    assert same.block_ids == [] and longer.block_ids[:3] != []
    assert same.num_cached_tokens == longer.num_cached_tokens == 3 * BLOCK_SIZE
    assert scheduler.counters.num_cached_tokens == 6 * BLOCK_SIZE


@pytest.mark.parametrize(
    ("overrides", "num_prompt", "num_cached"),
    [
        ({}, 3 * BLOCK_SIZE, 2 * BLOCK_SIZE),  # at least one token is computed, and blocks are used as a whole
        ({"cache_salt": "another tenant"}, 3 * BLOCK_SIZE + 5, 0),
        ({"prompt_logprobs": 0}, 3 * BLOCK_SIZE + 5, 0),  # needs the logits of every row
    ],
    ids=["whole blocks", "salt", "prompt logprobs"],
)
def test_what_is_not_reused(overrides: dict[str, Any], num_prompt: int, num_cached: int) -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.add(sequence(3 * BLOCK_SIZE + 5, 1))
    run_to_end(scheduler)
    again = sequence(num_prompt, 1, **overrides)
    scheduler.add(again)
    run_step(scheduler)
    assert again.num_cached_tokens == num_cached


def test_the_answer_is_found_again_as_part_of_the_next_prompt() -> None:
    scheduler = Scheduler(LIMITS)
    first = sequence(20, 50)
    scheduler.add(first)
    run_to_end(scheduler)
    turn = Sequence(request=request([*first.token_ids, 7, 8], 1), token_ids=[*first.token_ids, 7, 8])
    scheduler.add(turn)
    run_step(scheduler)
    assert turn.num_cached_tokens == 2 * BLOCK_SIZE


def test_drafts_are_verified_with_what_the_step_has_left_and_rejected_ones_cost_no_block() -> None:
    scheduler = Scheduler(LIMITS)
    drafting = sequence(BLOCK_SIZE - 2, 50)
    scheduler.add(drafting)
    while drafting.num_generated == 0:
        run_step(scheduler)
    assert scheduler.reserve_drafts(drafting, 4) == 4
    assert len(drafting.block_ids) == 2
    drafting.draft_token_ids = [1, 2, 3, 4]
    assert run_step(scheduler, num_accepted=0) == [(drafting, 5)]
    assert drafting.num_generated == 2 and len(drafting.block_ids) == 1
    scheduler.reserve_drafts(drafting, 4)
    drafting.draft_token_ids = [1, 2, 3, 4]
    assert run_step(scheduler, num_accepted=3) == [(drafting, 5)]
    assert drafting.token_ids[-4:-1] == [1, 2, 3] and drafting.num_uncomputed == 1
    scheduler.reserve_drafts(drafting, 4)
    drafting.draft_token_ids = [1, 2, 3, 4]
    scheduler.add(sequence(40, 1, first_token=500))
    assert [num_new for _, num_new in run_step(scheduler)] == [1, 9]  # the prompt goes before guesses


def test_no_more_drafts_than_tokens_that_may_still_come() -> None:
    scheduler = Scheduler(LIMITS)
    drafting = sequence(4, 3)
    scheduler.add(drafting)
    run_step(scheduler)
    assert scheduler.reserve_drafts(drafting, 4) == 1  # one draft and the token behind it end the sequence


def test_drafts_take_no_block_that_a_running_sequence_needs() -> None:
    limits = SchedulerLimits(max_num_seqs=3, max_batched_tokens=200, num_blocks=2, max_waiting=4)
    scheduler = Scheduler(limits)
    drafting = sequence(BLOCK_SIZE - 1, 30)
    scheduler.add(drafting)
    run_step(scheduler)
    assert scheduler.reserve_drafts(drafting, 4) == 0


@pytest.mark.parametrize("seed", range(16))
def test_random_schedules_end_and_leave_the_pool_whole(seed: int) -> None:
    """Shared prefixes, drafts, priorities, teams, cancellations and far too few blocks."""
    rng = random.Random(seed)
    num_blocks = rng.choice([8, 12, 30])
    limits = SchedulerLimits(
        max_num_seqs=rng.choice([3, 8]), max_batched_tokens=rng.choice([9, 40, 300]), num_blocks=num_blocks,
        max_waiting=1000,
    )  # fmt: skip
    clock = itertools.count()
    queue = FairQueue(lambda: next(clock) / 4, ageing_s=200.0)
    scheduler = Scheduler(limits, FirstComeFirstServed() if seed % 2 else queue)
    longest = num_blocks * BLOCK_SIZE
    pending: list[Sequence] = []
    for _ in range(40):
        shared = rng.randrange(0, longest // 2)
        own = rng.randrange(1, longest // 3)
        prompt = [*range(shared), *(rng.randrange(1000) for _ in range(own))]
        asked = request(
            prompt, rng.randrange(1, longest - len(prompt)), priority=rng.choice([0, 0, 1]),
            cache_salt=rng.choice(["", "", "b"]), fairness_key=rng.choice("abc"), fairness_weight=rng.choice([1, 3]),
        )  # fmt: skip
        pending.append(Sequence(request=asked, token_ids=list(prompt)))
    every = list(pending)
    for _ in range(60_000):
        if pending and rng.random() < 0.3:
            scheduler.add(pending.pop())
        if scheduler.running and rng.random() < 0.01:
            cancelled = rng.choice([*scheduler.running, *scheduler.waiting])
            cancelled.cancelled = True
            scheduler.remove(cancelled)
        steps = run_step(scheduler, num_accepted=rng.randrange(4))
        assert sum(num_new for _, num_new in steps) <= limits.max_batched_tokens
        assert steps or not (scheduler.running or scheduler.waiting)
        for each in scheduler.running:
            if each.num_uncomputed == 1 and (room := scheduler.reserve_drafts(each, rng.randrange(4))) > 0:
                each.draft_token_ids = [rng.randrange(1000) for _ in range(room)]
        scheduler.check_integrity()
        if not (pending or scheduler.running or scheduler.waiting):
            break
    assert not (pending or scheduler.running or scheduler.waiting)
    assert all(each.cancelled or each.num_generated == each.request.max_tokens for each in every)
    assert scheduler.pool.num_free == num_blocks
    for account in queue.list_service():
        assert not account.is_backlogged


def test_what_a_sequence_computed_without_some_experts_is_found_by_nobody() -> None:
    scheduler = Scheduler(SchedulerLimits(max_num_seqs=3, max_batched_tokens=200, num_blocks=12, max_waiting=4))
    whole, degraded = sequence(BLOCK_SIZE + 2), sequence(BLOCK_SIZE + 2, first_token=500)
    degraded.num_left_out = 1
    for each in (whole, degraded):
        scheduler.add(each)
    run_to_end(scheduler)
    again = [sequence(BLOCK_SIZE + 2), sequence(BLOCK_SIZE + 2, first_token=500)]
    for each in again:
        scheduler.add(each)
    run_to_end(scheduler)
    assert [each.num_cached_tokens for each in again] == [BLOCK_SIZE, 0]
