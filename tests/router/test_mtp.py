"""Speculative decoding with a real MTP layer: the same output at any depth, whatever else happens to a sequence."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from experts.checkpoint import Checkpoint
from experts.kernels.cpu_ffn import load_cpu_kernel
from router.decoder_layer import PendingExperts
from router.draft_policy import Acceptance, DraftPolicy
from router.drafter import DraftInput
from router.engine import Engine
from router.errors import ExpertsUnavailable, GrammarFailed
from router.grammar import Grammar, GrammarState
from router.latent_cache import LatentCache
from router.llguidance_grammars import LlguidanceCompiler
from router.mtp import MtpModule
from router.mtp_drafter import MAX_KEPT_ROWS, MtpDrafter
from router.penalties import LogitBias, Penalties
from router.sampler import SamplingParams
from router.scheduler import SchedulerLimits
from router.sequence import FinishReason, GenerationRequest, SequenceOutput
from router.step_batch import StepBatch
from router.trunk import Trunk
from router.weights import load_trunk_weights
from tests.random_checkpoint import write_random_checkpoint
from tests.router.in_process import (
    DEADLINE_S,
    GREEDY,
    LocalDispatcher,
    collect,
    load_groups,
    request,
    running_engine,
    token_ids,
)
from tests.tolerances import LOGPROB_BY_DTYPE

PROMPTS = [[0, 5, 9, 200], [0, 17], [0, *range(30, 130)], [0, 250, 251, 252], list(range(40, 57))]
WIDE = SchedulerLimits(max_num_seqs=16, max_batched_tokens=512, num_blocks=128, max_waiting=32)
WARM = SamplingParams(temperature=0.7, top_k=0, top_p=0.95, min_p=0.0, seed=11)
MTP_LAYER_ID = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers and an MTP layer without copies of embedding and head."""
    folder = tmp_path_factory.mktemp("mtp")
    write_random_checkpoint(folder, seed=9, fp8=True, num_nextn_predict_layers=1, mtp_copies=False)
    return folder


class FixedDepth(DraftPolicy):
    """Drafts the same number in every step, or in turn what is given."""

    def __init__(self, *depths: int) -> None:
        super().__init__(max(1, *depths))
        self._depths = depths
        self._num_choices = 0

    def choose(self, acceptances: Sequence[Acceptance]) -> list[int]:
        self._num_choices += 1
        return [self._depths[self._num_choices % len(self._depths)]] * len(acceptances)


class ForgetfulDispatcher(LocalDispatcher):
    """Counts the MTP layer's rounds, and fails them on demand."""

    num_module_passes = 0
    num_mtp_rounds = 0
    fails_mtp = False

    async def scatter(
        self, layer_id: int, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> PendingExperts:
        if layer_id == MTP_LAYER_ID:
            self.num_mtp_rounds += 1
            if self.fails_mtp:
                raise ExpertsUnavailable("no replica")
        return await super().scatter(layer_id, hidden_states, topk_ids, topk_weights)


class CountedModule(MtpModule):
    counts: ForgetfulDispatcher

    async def forward(
        self, hidden_states: torch.Tensor, batch: StepBatch, context: StepBatch | None = None
    ) -> torch.Tensor:
        self.counts.num_module_passes += 1
        return await super().forward(hidden_states, batch, context)

    def fill_cache(self, hidden_states: torch.Tensor, batch: StepBatch) -> None:
        self.counts.num_module_passes += 1
        super().fill_cache(hidden_states, batch)


Guesses = dict[int, list[int]]
Answers = dict[tuple[int, ...], list[int]]


class TestDrafter(MtpDrafter):
    """Records the module's drafts. An untrained module guesses badly, so with `answers` most drafts become what is
    known to come, and each fifth is left as it is."""

    __test__ = False
    guesses: Guesses | None = None
    answers: Answers | None = None

    async def draft(self, hidden_states: torch.Tensor, inputs: Sequence[DraftInput]) -> list[list[int]]:
        found = await super().draft(hidden_states, inputs)
        if self.guesses is not None:
            self.guesses.update((item.sequence.num_generated, guess) for item, guess in zip(inputs, found, strict=True))
        if self.answers is not None:
            for item, guess in zip(inputs, found, strict=True):
                start = item.sequence.num_generated
                answer = self.answers[item.sequence.request.prompt_token_ids][start : start + len(guess)]
                for index, token_id in enumerate(answer):
                    guess[index] = guess[index] if (start + index) % 5 == 3 else token_id
        return found


@contextlib.asynccontextmanager
async def serving(
    folder: Path,
    policy: DraftPolicy | None,
    *,
    dtype: torch.dtype = torch.float32,
    limits: SchedulerLimits = WIDE,
    guesses: Guesses | None = None,
    answers: Answers | None = None,
) -> AsyncIterator[tuple[Engine, ForgetfulDispatcher]]:
    """A deterministic engine. policy: None: without drafting. guesses: gets the drafts of a lone sequence, by the
    number of tokens before them. answers: as TestDrafter has them."""
    model = Checkpoint(folder)
    dispatcher = ForgetfulDispatcher(load_groups(folder, 2, dtype))
    with torch.inference_mode():
        weights = load_trunk_weights(model, dtype, with_mtp=policy is not None)
        cache = LatentCache(model.config, limits.num_blocks, dtype)
        options: dict[str, Any] = {"max_model_len": 256, "deterministic": True}
        trunk = Trunk(model.config, weights, dispatcher, cache, **options)
        drafter = None
        if policy is not None:
            assert weights.mtp is not None
            module = CountedModule(model.config, weights.mtp, dispatcher, cache, **options)
            module.counts = dispatcher
            drafter = TestDrafter(module, policy, frozenset(model.config.eos_token_ids))
            drafter.guesses, drafter.answers = guesses, answers
    engine = Engine(model.config, trunk, limits, max_model_len=256, drafter=drafter)
    async with running_engine(engine):
        yield engine, dispatcher


def build_requests(sampling: SamplingParams = WARM, max_tokens: int = 24) -> list[Any]:
    return [request(prompt, max_tokens, sampling=sampling, logprobs=2) for prompt in PROMPTS]


async def run_all(engine: Engine, requests: Sequence[Any]) -> list[SequenceOutput]:
    """Together; the cache whole afterwards."""
    sequences = [engine.submit(each) for each in requests]
    outputs = [await collect(sequence) for sequence in sequences]
    engine.check_integrity()
    assert engine.progress().num_blocks_held == 0
    return outputs


def answers_of(outputs: Sequence[SequenceOutput]) -> Answers:
    return {tuple(prompt): token_ids(output) for prompt, output in zip(PROMPTS, outputs, strict=True)}


def assert_same(found: Sequence[SequenceOutput], expected: Sequence[SequenceOutput]) -> None:
    """Equal tokens and ends, logprobs within float32's tolerance."""
    assert [token_ids(output) for output in found] == [token_ids(output) for output in expected]
    for one, other in zip(found, expected, strict=True):
        assert (one.finish_reason, one.stop_token_id) == (other.finish_reason, other.stop_token_id)
        for token, wanted in zip(one.tokens, other.tokens, strict=True):
            assert token.logprobs is not None and wanted.logprobs is not None
            assert token.logprobs.top_token_ids == wanted.logprobs.top_token_ids
            assert token.logprobs.logprob == pytest.approx(wanted.logprobs.logprob, abs=LOGPROB_BY_DTYPE["float32"])


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> list[SequenceOutput]:
    async def run() -> list[SequenceOutput]:
        async with serving(checkpoint, None) as (engine, _):
            return await run_all(engine, build_requests())

    return asyncio.run(run())


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
async def test_tokens_and_logprobs_do_not_depend_on_the_depth(
    checkpoint: Path, plain: list[SequenceOutput], depth: int
) -> None:
    async with serving(checkpoint, FixedDepth(depth), answers=answers_of(plain)) as (engine, _):
        assert_same(await run_all(engine, build_requests()), plain)
        progress = engine.progress()
        assert len(progress.num_drafted) == depth
        assert progress.num_generated_tokens == 24 * len(PROMPTS)
        assert progress.num_generated_tokens == progress.num_turns + sum(progress.num_accepted)
        if depth > 0:
            assert 0.5 < sum(progress.num_accepted) / sum(progress.num_drafted) < 1


@pytest.mark.skipif(load_cpu_kernel(torch.bfloat16) is None, reason="no native CPU kernel here")
async def test_nor_in_bf16_bit_for_bit(checkpoint: Path) -> None:
    async with serving(checkpoint, None, dtype=torch.bfloat16) as (engine, _):
        expected = await run_all(engine, build_requests())
    for depth in (1, 3):
        answers = answers_of(expected)
        async with serving(checkpoint, FixedDepth(depth), dtype=torch.bfloat16, answers=answers) as (engine, _):
            assert await run_all(engine, build_requests()) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"sampling": GREEDY},
        {"sampling": replace(WARM, penalties=Penalties(1.3, 0.5, 0.4))},
        {"sampling": replace(GREEDY, penalties=Penalties(1.3, 0.5, 0.4))},
        {"sampling": replace(WARM, logit_bias=LogitBias([(7, 4.0), (8, -100.0)]), top_k=20)},
        {"stop_token_ids": frozenset(range(0, 320, 9))},
        {"stop_token_ids": frozenset(range(0, 320, 9)), "min_tokens": 11},
        {"sampling": replace(WARM, temperature=50.0), "ignore_eos": False},
    ],
    ids=["greedy", "penalties", "greedy penalties", "bias", "stop ids", "min_tokens", "end of sequence"],
)
async def test_what_a_request_asks_holds_for_every_drafted_token(checkpoint: Path, change: dict[str, Any]) -> None:
    asked = [replace(each, **change) for each in build_requests(max_tokens=30)]
    async with serving(checkpoint, None) as (engine, _):
        expected = await run_all(engine, asked)
    async with serving(checkpoint, FixedDepth(3), answers=answers_of(expected)) as (engine, _):
        assert_same(await run_all(engine, asked), expected)
    if "stop_token_ids" in change:
        assert any(output.finish_reason is FinishReason.STOP for output in expected)


async def test_chunks_and_reused_prefixes_change_nothing(checkpoint: Path, plain: list[SequenceOutput]) -> None:
    limits = replace(WIDE, max_batched_tokens=13, max_num_seqs=4)
    async with serving(checkpoint, FixedDepth(2), limits=limits, answers=answers_of(plain)) as (engine, _):
        assert_same(await run_all(engine, build_requests()), plain)
        assert_same(await run_all(engine, build_requests()), plain)
        assert engine.progress().num_cached_tokens > 0


@pytest.mark.parametrize("depth", [0, 3])
async def test_a_sequence_continued_on_another_router_goes_on_as_if_nothing_had_happened(
    checkpoint: Path, depth: int
) -> None:
    """Wherever it is cut, and although the next router drafts on its own."""
    sampling = replace(WARM, penalties=Penalties(1.2, 0.4, 0.3))
    changes: dict[str, Any] = {"stop_token_ids": frozenset(range(0, 320, 31)), "min_tokens": 9}
    asked = [replace(each, **changes) for each in build_requests(sampling, max_tokens=20)]
    async with serving(checkpoint, None) as (engine, _):
        whole = await run_all(engine, asked)
    for num_sent in (1, 5, 8, 9):
        remaining = [
            continue_behind(each, token_ids(output)[:num_sent]) for each, output in zip(asked, whole, strict=True)
        ]
        answers = {
            each.prompt_token_ids: token_ids(output)[num_sent:] for each, output in zip(remaining, whole, strict=True)
        }
        async with serving(checkpoint, FixedDepth(depth), answers=answers) as (engine, _):
            rest = await run_all(engine, remaining)
        assert_same(rest, [replace(output, tokens=output.tokens[num_sent:]) for output in whole])
    assert {output.finish_reason for output in whole} == {FinishReason.STOP, FinishReason.LENGTH}


@pytest.mark.skipif(load_cpu_kernel(torch.bfloat16) is None, reason="no native CPU kernel here")
async def test_nor_does_that_change_a_bit_of_bf16(checkpoint: Path) -> None:
    asked = build_requests(replace(WARM, penalties=Penalties(1.2, 0.4, 0.3)))
    async with serving(checkpoint, FixedDepth(2), dtype=torch.bfloat16) as (engine, _):
        whole = await run_all(engine, asked)
    remaining = [continue_behind(each, token_ids(output)[:7]) for each, output in zip(asked, whole, strict=True)]
    async with serving(checkpoint, FixedDepth(1), dtype=torch.bfloat16) as (engine, _):
        rest = await run_all(engine, remaining)
    assert rest == [replace(output, tokens=output.tokens[7:]) for output in whole]


def continue_behind(asked: GenerationRequest, sent: list[int]) -> GenerationRequest:
    """What the front asks of the next router when one is lost (router/api/continuation.py)."""
    return replace(
        asked,
        prompt_token_ids=(*asked.prompt_token_ids, *sent),
        num_answer_tokens=len(sent),
        max_tokens=asked.max_tokens - len(sent),
        min_tokens=max(0, asked.min_tokens - len(sent)),
    )


async def test_preemption_changes_nothing(checkpoint: Path) -> None:
    """Sequences that grow in a cache too small for all of them."""
    asked = [each for each in build_requests(max_tokens=60) if len(each.prompt_token_ids) < 20]
    async with serving(checkpoint, None) as (engine, _):
        expected = await run_all(engine, asked)
    answers = {each.prompt_token_ids: token_ids(output) for each, output in zip(asked, expected, strict=True)}
    limits = SchedulerLimits(max_num_seqs=8, max_batched_tokens=64, num_blocks=5, max_waiting=32)
    async with serving(checkpoint, FixedDepth(2), limits=limits, answers=answers) as (engine, _):
        assert_same(await run_all(engine, asked), expected)
        assert engine.progress().num_preemptions > 0


async def test_drafting_that_comes_and_goes_changes_nothing(checkpoint: Path, plain: list[SequenceOutput]) -> None:
    async with serving(checkpoint, FixedDepth(0, 2, 0, 0, 1, 3)) as (engine, _):
        assert_same(await run_all(engine, build_requests()), plain)
        assert sum(engine.progress().num_drafted) > 0


async def test_rows_kept_while_nothing_is_drafted_go_through_the_module_together(checkpoint: Path) -> None:
    async with serving(checkpoint, FixedDepth(0)) as (engine, dispatcher):
        await collect(engine.submit(request(PROMPTS[0], 2 * MAX_KEPT_ROWS)))
        assert dispatcher.num_module_passes == 2
        assert dispatcher.num_mtp_rounds == 0  # for the cache alone


async def test_of_a_prompt_only_the_last_row_asks_the_modules_experts(checkpoint: Path) -> None:
    async with serving(checkpoint, FixedDepth(1)) as (engine, dispatcher):
        await run_all(engine, [request([0, *range(30, 130)], 3)])
        assert dispatcher.num_rows[Checkpoint(checkpoint).config.num_hidden_layers] == 1


async def test_experts_are_asked_for_the_rows_that_drafts_are_made_of_alone(
    checkpoint: Path, plain: list[SequenceOutput]
) -> None:
    """Neither for prompts, however they are cut, nor for the rows of drafts that held."""
    limits = replace(WIDE, max_batched_tokens=40)
    async with serving(checkpoint, FixedDepth(1), limits=limits, answers=answers_of(plain)) as (engine, dispatcher):
        assert_same(await run_all(engine, build_requests()), plain)
        progress = engine.progress()
        assert sum(progress.num_accepted) > 0
        assert sum(progress.num_drafted) <= dispatcher.num_rows[MTP_LAYER_ID] <= progress.num_turns


async def test_without_experts_for_the_mtp_layer_requests_go_on_undrafted(
    checkpoint: Path, plain: list[SequenceOutput]
) -> None:
    async with serving(checkpoint, FixedDepth(1)) as (engine, dispatcher):
        dispatcher.fails_mtp = True
        assert_same(await run_all(engine, build_requests()), plain)
        assert dispatcher.num_mtp_rounds > 0
        assert engine.progress().num_drafted == ()


async def test_a_request_cancelled_while_it_is_drafted_for_leaves_nothing_behind(checkpoint: Path) -> None:
    async with serving(checkpoint, FixedDepth(2)) as (engine, dispatcher):
        staying, leaving = engine.submit(request(PROMPTS[0], 100)), engine.submit(request(PROMPTS[1], 100))
        await asyncio.wait_for(leaving.outputs.get(), DEADLINE_S)
        dispatcher.gate.clear()
        await asyncio.sleep(0)
        engine.cancel(leaving)
        dispatcher.gate.set()
        assert len(token_ids(await collect(staying))) == 100
        engine.check_integrity()
        assert engine.progress().num_blocks_held == 0


async def test_the_adaptive_policy_drafts_and_changes_nothing(checkpoint: Path, plain: list[SequenceOutput]) -> None:
    async with serving(checkpoint, DraftPolicy(2)) as (engine, _):
        assert_same(await run_all(engine, build_requests()), plain)
        assert engine.progress().num_drafted


def test_copies_that_differ_from_the_main_ones_are_used(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "equal", seed=3, num_nextn_predict_layers=1)
    weights = load_trunk_weights(Checkpoint(tmp_path / "equal"), torch.float32, with_mtp=True)
    assert weights.mtp is not None
    assert weights.mtp.embed_tokens is weights.embed_tokens and weights.mtp.head is weights.lm_head


@pytest.mark.parametrize("history", ["chunks", "reused prefix", "not drafted for at first"])
async def test_drafts_do_not_depend_on_how_the_modules_rows_came_about(checkpoint: Path, history: str) -> None:
    """Rejected drafts' rows are overwritten, kept ones written in time, and a reused block's last is the one wanted."""

    async def guess(history: str) -> Guesses:
        narrow = SchedulerLimits(max_num_seqs=4, max_batched_tokens=7, num_blocks=128, max_waiting=32)
        policy = FixedDepth(*[0] * 6, *[2] * 994) if history == "not drafted for at first" else FixedDepth(2)
        limits = narrow if history == "chunks" else WIDE
        guesses: Guesses = {}
        async with serving(checkpoint, policy, limits=limits, guesses=guesses) as (engine, _):
            if history == "reused prefix":
                await collect(engine.submit(request([*PROMPTS[2][:80], 3, 4, 5], 30)))
                guesses.clear()
            sequence = engine.submit(request(PROMPTS[2], 40, sampling=WARM))
            await collect(sequence)
            assert (sequence.num_cached_tokens == 64) == (history == "reused prefix")
        return guesses

    expected, found = await guess("whole"), await guess(history)
    compared = [length for length in expected if expected[length] and found.get(length)]
    assert len(compared) > 10
    assert [found[length] for length in compared] == [expected[length] for length in compared]


SHAPES = [
    Grammar("json_schema", '{"type":"object","properties":{"a":{"type":"string","maxLength":12}},"required":["a"]}'),
    Grammar("regex", "[a-z]{5,30}"),
    Grammar("regex", "(ab|cd){4,9}", start_after=frozenset(range(100, 320))),
]


def bind(folder: Path, asked: Sequence[GenerationRequest], shapes: Sequence[Grammar] = SHAPES) -> list[GrammarState]:
    """A state for each request, behind its answer tokens."""
    model = Checkpoint(folder).config
    compiler = LlguidanceCompiler.from_checkpoint(folder, model.vocab_size, model.eos_token_ids)
    assert compiler is not None
    return [
        GrammarState(
            compiler.compile(shape), shape.start_after, each.prompt_token_ids[len(each.prompt_token_ids) - n :]
        )
        for each, shape in zip(asked, shapes, strict=False)
        for n in (each.num_answer_tokens,)
    ]


async def run_bound(
    engine: Engine, folder: Path, asked: Sequence[GenerationRequest], shapes: Sequence[Grammar] = SHAPES
) -> list[SequenceOutput]:
    """Each of the first requests with a grammar, the others free."""
    states: list[GrammarState | None] = [*bind(folder, asked, shapes), *[None] * len(asked)]
    sequences = [engine.submit(each, state) for each, state in zip(asked, states, strict=False)]
    return [await collect(sequence) for sequence in sequences]


@pytest.mark.parametrize("depth", [0, 1, 3])
async def test_grammars_hold_whatever_is_drafted_and_wherever_the_answer_goes_on(checkpoint: Path, depth: int) -> None:
    asked = [replace(each, ignore_eos=False) for each in build_requests(replace(WARM, temperature=1.0), 40)]
    asked[0] = replace(asked[0], max_tokens=200)  # an untrained model likes white space
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    async with serving(checkpoint, None) as (engine, _):
        whole = await run_bound(engine, checkpoint, asked)
        texts = [tokenizer.decode(token_ids(output)) for output in whole]
        assert len(json.loads(texts[0])["a"]) <= 12
        assert re.fullmatch("[a-z]{5,30}", texts[1])
        assert [output.finish_reason for output in whole[:2]] == [FinishReason.STOP] * 2
    async with serving(checkpoint, FixedDepth(depth), answers=answers_of(whole)) as (engine, _):
        assert_same(await run_bound(engine, checkpoint, asked), whole)
    for num_sent in (1, 4):
        remaining = [
            continue_behind(each, token_ids(output)[:num_sent]) for each, output in zip(asked, whole, strict=True)
        ]
        async with serving(checkpoint, FixedDepth(depth)) as (engine, _):
            rest = await run_bound(engine, checkpoint, remaining)
        assert_same(rest, [replace(output, tokens=output.tokens[num_sent:]) for output in whole])


@pytest.mark.parametrize("depth", [0, 2])
async def test_grammars_hold_through_preemption_and_reused_prefixes(checkpoint: Path, depth: int) -> None:
    """In a cache too small for all of them, and twice, so that the second time begins with cached blocks."""
    wide = [replace(each, ignore_eos=False) for each in build_requests(replace(WARM, temperature=1.0), 120)]
    narrow = [each for each in wide if len(each.prompt_token_ids) < 20]
    shapes = [Grammar("regex", "[a-z]{300,400}"), Grammar("regex", "(ab|cd|x){200,400}")] * 8
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    async with serving(checkpoint, None) as (engine, _):
        whole, expected = [await run_bound(engine, checkpoint, asked, shapes) for asked in (wide, narrow)]
    for output in expected[:1]:
        assert re.fullmatch("[a-z]+", tokenizer.decode(token_ids(output)))
    limits = SchedulerLimits(max_num_seqs=8, max_batched_tokens=64, num_blocks=5, max_waiting=32)
    answers = {each.prompt_token_ids: token_ids(output) for each, output in zip(narrow, expected, strict=True)}
    async with serving(checkpoint, FixedDepth(depth), limits=limits, answers=answers) as (engine, _):
        assert_same(await run_bound(engine, checkpoint, narrow, shapes), expected)
        assert engine.progress().num_preemptions > 0
    async with serving(checkpoint, FixedDepth(depth), limits=replace(WIDE, max_batched_tokens=13)) as (engine, _):
        assert_same(await run_bound(engine, checkpoint, wide, shapes), whole)
        assert_same(await run_bound(engine, checkpoint, wide, shapes), whole)
        assert engine.progress().num_cached_tokens > 0


async def test_drafts_keep_to_the_grammar(checkpoint: Path) -> None:
    """An untrained module would hardly ever guess one of the few letters that may come."""
    asked = [replace(build_requests(max_tokens=40)[1], ignore_eos=False)] * 2
    async with serving(checkpoint, FixedDepth(2)) as (engine, _):
        await run_bound(engine, checkpoint, asked[:2])
        assert sum(engine.progress().num_accepted) > 0


async def test_a_grammar_that_fails_ends_its_own_sequence_only(checkpoint: Path) -> None:
    asked = [replace(each, ignore_eos=False) for each in build_requests()[:2]]
    async with serving(checkpoint, FixedDepth(1)) as (engine, _):
        state = bind(checkpoint, asked)[0]
        failing = engine.submit(asked[0], state)
        state.error = GrammarFailed("it is too complex")
        other = engine.submit(asked[1])
        with pytest.raises(GrammarFailed):
            await collect(failing)
        assert token_ids(await collect(other))
        engine.check_integrity()
        assert engine.progress().num_blocks_held == 0
