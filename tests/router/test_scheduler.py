"""Who runs in the next step. No torch, no clock: sequences are stand-ins with lengths."""

import pytest

from router.errors import BadRequest, QueueFull
from router.scheduler import Scheduler, SchedulerLimits
from router.sequence import Sequence
from tests.router.in_process import request

LIMITS = SchedulerLimits(max_num_seqs=3, max_batched_tokens=10, num_blocks=3, max_waiting=4)


def sequence(num_prompt: int, max_tokens: int = 5) -> Sequence:
    return Sequence(request=request(list(range(num_prompt)), max_tokens), token_ids=list(range(num_prompt)))


def run_step(scheduler: Scheduler) -> list[tuple[Sequence, int]]:
    """What an engine does to lengths: compute the chunk, and add a token where everything known is computed."""
    chunks = scheduler.schedule()
    for chunk in chunks:
        chunk.sequence.num_computed += chunk.num_new
        if chunk.sequence.num_computed == len(chunk.sequence.token_ids):
            chunk.sequence.token_ids.append(0)
    return [(chunk.sequence, chunk.num_new) for chunk in chunks]


def test_a_long_prompt_is_cut_into_chunks_of_the_step_budget() -> None:
    scheduler = Scheduler(LIMITS)
    long = sequence(25)
    scheduler.add(long)
    assert [run_step(scheduler) for _ in range(4)] == [[(long, 10)], [(long, 10)], [(long, 5)], [(long, 1)]]


def test_decode_goes_before_prefill_in_every_step() -> None:
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


def test_a_sequence_waits_until_its_whole_length_fits() -> None:
    scheduler = Scheduler(LIMITS)
    big, other = sequence(10, 60), sequence(10, 40)
    scheduler.add(big)
    scheduler.add(other)
    run_step(scheduler)
    assert scheduler.running == [big]
    scheduler.remove(big)
    run_step(scheduler)
    assert scheduler.running == [other]


def test_what_never_fits_and_what_finds_a_full_queue_is_refused_at_once() -> None:
    scheduler = Scheduler(LIMITS)
    with pytest.raises(BadRequest, match="needs 97 tokens of KV cache, this router holds 96"):
        scheduler.add(sequence(96, 1))
    for _ in range(4):
        scheduler.add(sequence(2))
    with pytest.raises(QueueFull, match="4 requests are waiting"):
        scheduler.add(sequence(2))


def test_removing_a_waiting_sequence_or_one_twice_leaves_the_accounts_right() -> None:
    scheduler = Scheduler(LIMITS)
    waiting = sequence(2)
    scheduler.add(waiting)
    scheduler.remove(waiting)
    scheduler.remove(waiting)
    assert scheduler.schedule() == []
    full = sequence(50, 46)
    scheduler.add(full)
    assert run_step(scheduler) == [(full, 10)]
