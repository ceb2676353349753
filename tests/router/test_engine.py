"""The engine's loop over a real trunk, with experts reached by a plain call."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from experts.checkpoint import Checkpoint
from router.engine import Engine
from router.errors import BadRequest, ExpertsUnavailable, NotReady
from router.sampler import SamplingParams
from router.scheduler import SchedulerLimits
from router.sequence import FinishReason
from tests.router.in_process import DEADLINE_S, LocalDispatcher, build_engine, collect, load_groups, request, token_ids
from tests.router.scripted_drafter import ScriptedDrafter
from tests.tolerances import LOGPROB_BY_DTYPE

PROMPTS = [[0, 5, 9, 200], [0, 17], [0, *range(30, 60)], [0, 250, 251, 252, 253, 254]]


@contextlib.asynccontextmanager
async def running(folder: Path, **options: object) -> AsyncIterator[tuple[Engine, LocalDispatcher]]:
    dispatcher = LocalDispatcher(load_groups(folder, 2))
    engine = build_engine(folder, dispatcher, **options)  # pyright: ignore[reportArgumentType]
    task = asyncio.create_task(engine.run())
    try:
        yield engine, dispatcher
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_requests_together_get_the_tokens_they_get_alone(tiny_checkpoint: Path) -> None:
    async with running(tiny_checkpoint) as (engine, _):
        alone = [token_ids(await collect(engine.submit(request(prompt, 12)))) for prompt in PROMPTS]
        sequences = [engine.submit(request(prompt, 12)) for prompt in PROMPTS]
        together = [token_ids(await collect(sequence)) for sequence in sequences]
    assert together == alone
    assert len({tuple(tokens) for tokens in alone}) == len(PROMPTS)  # the prompts matter


async def test_a_prompt_in_chunks_gives_what_it_gives_whole(tiny_checkpoint: Path) -> None:
    asked = request(PROMPTS[2], 6, prompt_logprobs=2, logprobs=2)
    async with running(tiny_checkpoint) as (engine, _):
        whole = await collect(engine.submit(asked))
    limits = SchedulerLimits(max_num_seqs=4, max_batched_tokens=7, num_blocks=32, max_waiting=4)
    async with running(tiny_checkpoint, limits=limits) as (engine, _):
        chunked = await collect(engine.submit(asked))
    assert token_ids(chunked) == token_ids(whole)
    assert [t.token_id for t in chunked.prompt_tokens] == [t.token_id for t in whole.prompt_tokens] == PROMPTS[2]
    for found, expected in zip(chunked.prompt_tokens[1:], whole.prompt_tokens[1:], strict=True):
        assert found.logprobs is not None and expected.logprobs is not None
        assert found.logprobs.logprob == pytest.approx(expected.logprobs.logprob, abs=LOGPROB_BY_DTYPE["float32"])
        assert found.logprobs.top_token_ids == expected.logprobs.top_token_ids
    assert whole.prompt_tokens[0].logprobs is None


async def test_the_last_layer_has_experts_for_the_rows_that_are_read(tiny_checkpoint: Path) -> None:
    """A chunk that does not end the prompt asks them nothing, the last one asks for its last token."""
    prompt = PROMPTS[2]
    limits = SchedulerLimits(max_num_seqs=4, max_batched_tokens=20, num_blocks=32, max_waiting=4)
    async with running(tiny_checkpoint, limits=limits) as (engine, dispatcher):
        await collect(engine.submit(request(prompt, 1)))
        rows = dispatcher.num_rows
        assert list(rows.values()) == [len(prompt)] * (len(rows) - 1) + [1]
        rows.clear()
        await collect(engine.submit(request(prompt, 1, prompt_logprobs=0, cache_salt="computed anew")))
        assert list(rows.values()) == [len(prompt)] * len(rows)


async def test_prompt_logprobs_agree_with_the_logprobs_of_generated_tokens(tiny_checkpoint: Path) -> None:
    """Feed back what was generated: prefill must judge it as decode did."""
    async with running(tiny_checkpoint) as (engine, _):
        first = await collect(engine.submit(request(PROMPTS[0], 10, logprobs=0)))
        again = await collect(engine.submit(request(PROMPTS[0] + token_ids(first), 0, prompt_logprobs=0)))
    assert again.finish_reason is FinishReason.LENGTH
    assert again.tokens == ()
    for decoded, judged in zip(first.tokens, again.prompt_tokens[len(PROMPTS[0]) :], strict=True):
        assert decoded.token_id == judged.token_id
        assert decoded.logprobs is not None and judged.logprobs is not None
        assert decoded.logprobs.logprob == pytest.approx(judged.logprobs.logprob, abs=LOGPROB_BY_DTYPE["float32"])


async def test_the_loop_turns_while_prompt_logprobs_are_computed(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks the router for its status must not wait for a whole prompt."""
    monkeypatch.setattr("router.engine.LOGITS_ROWS", 1)
    num_turns = 0

    async def count_turns() -> None:
        nonlocal num_turns
        while True:
            num_turns += 1
            await asyncio.sleep(0)

    async with running(tiny_checkpoint) as (engine, _):
        counting = asyncio.create_task(count_turns())
        judged = await collect(engine.submit(request([0] * 100, 0, prompt_logprobs=0)))
        counting.cancel()
        assert engine.progress().num_steps == 1
    assert len(judged.prompt_tokens) == 100 and num_turns >= 99


async def test_a_request_joins_while_another_runs_and_a_cancelled_one_leaves(tiny_checkpoint: Path) -> None:
    async with running(tiny_checkpoint) as (engine, _):
        long = engine.submit(request(PROMPTS[0], 200))
        await asyncio.wait_for(long.outputs.get(), DEADLINE_S)
        short = await collect(engine.submit(request(PROMPTS[1], 3)))
        assert len(short.tokens) == 3
        assert engine.progress().num_running == 1  # the long one still runs
        engine.cancel(long)
        assert engine.progress().num_running == 0
        after = await collect(engine.submit(request(PROMPTS[1], 3)))
        assert token_ids(after) == token_ids(short)


async def test_stop_ids_end_a_sequence_and_min_tokens_forbids_them_first(tiny_checkpoint: Path) -> None:
    async with running(tiny_checkpoint) as (engine, _):
        free = token_ids(await collect(engine.submit(request(PROMPTS[3], 8))))
        stop = free[3]
        first = free.index(stop)
        ended = await collect(engine.submit(request(PROMPTS[3], 8, stop_token_ids=frozenset({stop}))))
        assert (ended.finish_reason, ended.stop_token_id) == (FinishReason.STOP, stop)
        assert token_ids(ended) == free[: first + 1]
        forced = await collect(engine.submit(request(PROMPTS[3], 8, stop_token_ids=frozenset({stop}), min_tokens=6)))
        assert stop not in token_ids(forced)[:6]


async def test_end_of_sequence_ends_unless_ignored(tiny_checkpoint: Path) -> None:
    """Sampled hot, a vocabulary of 320 meets its end-of-sequence id soon."""
    hot = SamplingParams(temperature=100.0, top_k=0, top_p=1.0, min_p=0.0, seed=11)
    async with running(tiny_checkpoint, max_model_len=512) as (engine, _):
        ended = [
            await collect(engine.submit(request([0, number], 150, sampling=hot, ignore_eos=False)))
            for number in (5, 6, 7, 8, 9, 10)
        ]
        stopped = [output for output in ended if output.finish_reason is FinishReason.STOP]
        assert stopped and all(token_ids(output)[-1] == 1 and 1 not in token_ids(output)[:-1] for output in stopped)
        number = 5 + ended.index(stopped[0])
        ignored = await collect(engine.submit(request([0, number], 150, sampling=hot)))
        assert len(ignored.tokens) == 150 and 1 in token_ids(ignored)


async def test_the_same_seed_gives_the_same_tokens_and_continues_anywhere(tiny_checkpoint: Path) -> None:
    warm = SamplingParams(temperature=1.0, top_k=0, top_p=0.95, min_p=0.0, seed=2**63 + 5)
    async with running(tiny_checkpoint) as (engine, _):
        whole = token_ids(await collect(engine.submit(request(PROMPTS[0], 12, sampling=warm))))
        again = token_ids(await collect(engine.submit(request(PROMPTS[0], 12, sampling=warm))))
        continued = token_ids(await collect(engine.submit(request(PROMPTS[0] + whole[:5], 7, sampling=warm))))
    assert again == whole
    assert continued == whole[5:]


async def test_bad_requests_are_refused_with_the_numbers(tiny_checkpoint: Path) -> None:
    async with running(tiny_checkpoint) as (engine, _):
        with pytest.raises(BadRequest, match=r"prompt has 250 tokens and max_tokens is 10: .*context of 256"):
            engine.submit(request([0] * 250, 10))
        with pytest.raises(BadRequest, match="token id 320 is outside the vocabulary of 320"):
            engine.submit(request([0, 320]))
        with pytest.raises(BadRequest, match="stop token id 320 is outside"):
            # With min_tokens it would be masked in the logits, and fail the step of everybody.
            engine.submit(request([0], stop_token_ids=frozenset({320}), min_tokens=1))
        with pytest.raises(BadRequest, match="no tokens"):
            engine.submit(request([]))
        engine.start_drain()
        with pytest.raises(NotReady, match="draining"):
            engine.submit(request([0]))


@pytest.mark.parametrize("error", [ExpertsUnavailable("no replica"), ValueError("a bug")])
async def test_a_failed_step_ends_its_sequences_and_not_the_engine(tiny_checkpoint: Path, error: Exception) -> None:
    async with running(tiny_checkpoint) as (engine, dispatcher):
        dispatcher.error = error
        with pytest.raises(type(error)):
            await collect(engine.submit(request(PROMPTS[0])))
        dispatcher.error = None
        assert len((await collect(engine.submit(request(PROMPTS[0])))).tokens) == 8
        assert engine.progress().num_running == 0


async def test_an_outage_ends_who_waits_and_sheds_who_comes(tiny_checkpoint: Path) -> None:
    outage: list[str] = []
    limits = SchedulerLimits(max_num_seqs=1, max_batched_tokens=64, num_blocks=32, max_waiting=8)
    find_outage = lambda: outage[0] if outage else None  # noqa: E731
    async with running(tiny_checkpoint, limits=limits, find_outage=find_outage) as (engine, dispatcher):
        dispatcher.gate.clear()
        dispatcher.error = ExpertsUnavailable("no replica of expert group g1")
        sequences = [engine.submit(request(prompt)) for prompt in PROMPTS]
        outage.append("g1 is away")
        dispatcher.gate.set()
        with pytest.raises(ExpertsUnavailable, match="no replica"):
            await collect(sequences[0])
        for waiting in sequences[1:]:
            with pytest.raises(ExpertsUnavailable, match="g1 is away"):
                await collect(waiting)
        with pytest.raises(ExpertsUnavailable, match="g1 is away"):
            engine.submit(request(PROMPTS[0]))
        outage.clear()
        dispatcher.error = None
        assert len((await collect(engine.submit(request(PROMPTS[0])))).tokens) == 8
        assert engine.progress().num_steps == 9


async def test_progress_shows_a_step_that_does_not_end(tiny_checkpoint: Path) -> None:
    async with running(tiny_checkpoint) as (engine, dispatcher):
        dispatcher.gate.clear()
        sequence = engine.submit(request(PROMPTS[0]))
        async with asyncio.timeout(DEADLINE_S):
            while engine.progress().current_step_ms == 0:
                await asyncio.sleep(0)
        assert engine.progress().num_steps == 0
        dispatcher.gate.set()
        await collect(sequence)
        assert engine.progress().num_steps == 8


# Room for one long sequence, or two short ones.
SMALL = SchedulerLimits(max_num_seqs=8, max_batched_tokens=64, num_blocks=5, max_waiting=32)


async def test_preempted_sequences_get_what_they_get_alone_and_nothing_twice(tiny_checkpoint: Path) -> None:
    asked = [request(prompt, 60, logprobs=1, prompt_logprobs=1) for prompt in PROMPTS]
    async with running(tiny_checkpoint) as (engine, _):
        alone = [await collect(engine.submit(each)) for each in asked]
    async with running(tiny_checkpoint, limits=SMALL) as (engine, _):
        sequences = [engine.submit(each) for each in asked]
        together = [await collect(sequence) for sequence in sequences]
        assert engine.progress().num_preemptions > 0
        engine.check_integrity()
        assert engine.progress().num_blocks_held == 0
    assert [token_ids(output) for output in together] == [token_ids(output) for output in alone]
    for found, expected in zip(together, alone, strict=True):
        assert [token.token_id for token in found.prompt_tokens] == [token.token_id for token in expected.prompt_tokens]
        for a, b in zip(
            found.tokens + found.prompt_tokens[1:], expected.tokens + expected.prompt_tokens[1:], strict=True
        ):
            assert a.logprobs is not None and b.logprobs is not None
            assert a.logprobs.logprob == pytest.approx(b.logprobs.logprob, abs=LOGPROB_BY_DTYPE["float32"])


async def test_a_request_that_could_never_run_is_refused(tiny_checkpoint: Path) -> None:
    async with running(tiny_checkpoint, limits=SMALL) as (engine, _):
        with pytest.raises(BadRequest, match="needs 161 tokens of KV cache, this router holds 160"):
            engine.submit(request([0] * 100, 61))
        assert len((await collect(engine.submit(request([0] * 100, 60)))).tokens) == 60


async def test_a_known_prefix_is_reused_and_changes_nothing(tiny_checkpoint: Path) -> None:
    prompt = [0, *range(20, 120)]
    async with running(tiny_checkpoint) as (engine, _):
        first, again = engine.submit(request(prompt, 10)), None
        expected = token_ids(await collect(first))
        again = engine.submit(request(prompt, 10))
        assert token_ids(await collect(again)) == expected
        other = engine.submit(request(prompt, 10, cache_salt="another tenant"))
        assert token_ids(await collect(other)) == expected
        judged = engine.submit(request(prompt, 0, prompt_logprobs=0))
        assert len((await collect(judged)).prompt_tokens) == len(prompt)
        assert [s.num_cached_tokens for s in (first, again, other, judged)] == [0, 96, 0, 0]
        assert engine.progress().num_cached_tokens == 96
        engine.check_integrity()


async def test_cancelled_sequences_leave_no_block_behind(tiny_checkpoint: Path) -> None:
    async with running(tiny_checkpoint, limits=SMALL) as (engine, _):
        sequences = [engine.submit(request(prompt, 60)) for prompt in PROMPTS]
        for sequence in sequences[::2]:
            await asyncio.wait_for(sequence.outputs.get(), DEADLINE_S)
            engine.cancel(sequence)
            engine.check_integrity()
        for sequence in sequences[1::2]:
            assert len((await collect(sequence)).tokens) == 60
        engine.check_integrity()
        assert engine.progress().num_blocks_held == 0


@pytest.mark.parametrize("depth", [1, 3])
async def test_drafts_change_the_number_of_steps_and_nothing_else(tiny_checkpoint: Path, depth: int) -> None:
    warm = SamplingParams(temperature=1.0, top_k=0, top_p=0.95, min_p=0.0, seed=7)
    asked = [request(prompt, 40, logprobs=1, sampling=warm) for prompt in PROMPTS]
    async with running(tiny_checkpoint) as (engine, _):
        alone = [await collect(engine.submit(each)) for each in asked]
    drafter = ScriptedDrafter(depth)
    drafter.answers = {each.prompt_token_ids: token_ids(output) for each, output in zip(asked, alone, strict=True)}
    async with running(tiny_checkpoint, drafter=drafter) as (engine, _):
        sequences = [engine.submit(each) for each in asked]
        together = [await collect(sequence) for sequence in sequences]
        engine.check_integrity()
        assert engine.progress().num_steps < 40
    assert 0 < drafter.num_accepted < drafter.num_drafts
    assert [token_ids(output) for output in together] == [token_ids(output) for output in alone]
    for found, expected in zip(together, alone, strict=True):
        assert found.finish_reason is FinishReason.LENGTH
        for a, b in zip(found.tokens, expected.tokens, strict=True):
            assert a.logprobs is not None and b.logprobs is not None
            assert a.logprobs.logprob == pytest.approx(b.logprobs.logprob, abs=LOGPROB_BY_DTYPE["float32"])


async def test_a_stop_id_among_accepted_drafts_ends_the_sequence_there(tiny_checkpoint: Path) -> None:
    async with running(tiny_checkpoint) as (engine, _):
        free = token_ids(await collect(engine.submit(request(PROMPTS[3], 12))))
    drafter = ScriptedDrafter(3)
    drafter.answers = {tuple(PROMPTS[3]): free}
    stop = free[6]
    async with running(tiny_checkpoint, drafter=drafter) as (engine, _):
        ended = await collect(engine.submit(request(PROMPTS[3], 12, stop_token_ids=frozenset({stop}))))
        assert engine.progress().num_blocks_held == 0
    assert (ended.finish_reason, ended.stop_token_id) == (FinishReason.STOP, stop)
    assert token_ids(ended) == free[: free.index(stop) + 1]


async def test_a_sequence_that_did_without_experts_says_so_and_others_do_not(tiny_checkpoint: Path) -> None:
    async with running(tiny_checkpoint) as (engine, dispatcher):
        before = engine.submit(request(PROMPTS[1], 2))
        await collect(before)
        dispatcher.num_left_out = 1
        during = engine.submit(request(PROMPTS[0], 2))
        await collect(during)
        dispatcher.num_left_out = 0
        after = engine.submit(request(PROMPTS[1], 2))
        await collect(after)
    num_layers = len([layer for layer in Checkpoint(tiny_checkpoint).config.moe_layer_ids if layer < 3])
    # The rows of the prompt, and of the first token.
    assert during.num_left_out == num_layers * (len(PROMPTS[0]) + 1)
    assert (before.num_left_out, after.num_left_out) == (0, 0)
