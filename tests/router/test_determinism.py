"""`--deterministic`: in bf16, a sequence's tokens and logprobs do not depend, in a single bit, on what else runs."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch

from experts.checkpoint import Checkpoint
from experts.kernels.cpu_ffn import load_cpu_kernel
from experts.model_config import ModelConfig
from experts.wire import WireFormat
from router.dispatch import Dispatcher, DispatchOptions
from router.drafter import Drafter
from router.engine import Engine
from router.expert_pool import ExpertPool
from router.latent_cache import LatentCache
from router.overlap_policy import MicroBatchSetting, OverlapPolicy
from router.sampler import SamplingParams
from router.scheduler import SchedulerLimits
from router.sequence import GenerationRequest, SequenceOutput
from router.trunk import Trunk
from router.weights import load_trunk_weights
from tests.random_checkpoint import write_random_checkpoint
from tests.router.in_process import GREEDY, build_table, collect, load_groups, request, start_replica, token_ids
from tests.router.scripted_drafter import ScriptedDrafter

pytestmark = pytest.mark.skipif(
    load_cpu_kernel(torch.bfloat16) is None,
    reason="no native CPU kernel here (no compiler, and none prebuilt): torch's products depend on their neighbours",
)

PROMPTS = [[0, 5, 9, 200], [0, 17], [0, *range(30, 130)], [0, 250, 251, 252, 253, 254], list(range(40, 57))]
WIDE = SchedulerLimits(max_num_seqs=16, max_batched_tokens=512, num_blocks=128, max_waiting=32)
LARGE = SchedulerLimits(max_num_seqs=32, max_batched_tokens=512, num_blocks=128, max_waiting=32)
SCARCE = SchedulerLimits(max_num_seqs=16, max_batched_tokens=40, num_blocks=6, max_waiting=32)
SEEDED = SamplingParams(temperature=0.8, top_k=0, top_p=0.95, min_p=0.0, seed=7)
NARROW = SchedulerLimits(max_num_seqs=4, max_batched_tokens=7, num_blocks=128, max_waiting=32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP8, with partial blocks, and matrices wide enough for several tiles of the kernel."""
    folder = tmp_path_factory.mktemp("determinism")
    write_random_checkpoint(folder, seed=9, fp8=True, hidden_size=192, moe_intermediate_size=160)
    return folder


@contextlib.asynccontextmanager
async def running(
    folder: Path,
    limits: SchedulerLimits,
    num_groups: int = 2,
    micro_batches: MicroBatchSetting = "off",
    drafter: Drafter | None = None,
) -> AsyncIterator[Engine]:
    """A deterministic bf16 engine over real gRPC to groups in this process."""
    config: ModelConfig = Checkpoint(folder).config
    groups = load_groups(folder, num_groups, torch.bfloat16)
    servers = [start_replica(group, f"g{index}", f"g{index}-0") for index, group in enumerate(groups)]
    pool = ExpertPool(config)
    pool.apply(build_table(1, groups, [[server] for server in servers]))
    dispatcher = Dispatcher(pool, DispatchOptions(WireFormat.BFLOAT16, "reduced", call_timeout_s=10, expert_wait_s=10))
    with torch.inference_mode():
        weights = load_trunk_weights(Checkpoint(folder), torch.bfloat16)
        cache = LatentCache(config, limits.num_blocks, torch.bfloat16)
        trunk = Trunk(config, weights, dispatcher, cache, max_model_len=256, deterministic=True)
    overlap = OverlapPolicy(micro_batches)
    engine = Engine(config, trunk, limits, max_model_len=256, overlap=overlap, drafter=drafter)
    task = asyncio.create_task(engine.run())
    try:
        yield engine
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await pool.close()
        for server in servers:
            server.stop(grace_s=0)


def build_requests(max_tokens: int = 12) -> list[GenerationRequest]:
    """Greedy ones and seeded ones in turn."""
    return [
        request(prompt, max_tokens, logprobs=2, prompt_logprobs=1, sampling=SEEDED if number % 2 else GREEDY)
        for number, prompt in enumerate(PROMPTS)
    ]


async def alone(engine: Engine, max_tokens: int = 12) -> list[SequenceOutput]:
    return [await collect(engine.submit(each)) for each in build_requests(max_tokens)]


async def test_batch_mates_change_nothing(checkpoint: Path) -> None:
    async with running(checkpoint, WIDE) as engine:
        expected = await alone(engine)
        sequences = [engine.submit(each) for each in build_requests()]
        assert [await collect(sequence) for sequence in sequences] == expected


async def test_chunks_of_the_prompt_change_nothing(checkpoint: Path) -> None:
    async with running(checkpoint, WIDE) as engine:
        expected = await alone(engine)
    async with running(checkpoint, NARROW) as engine:
        sequences = [engine.submit(each) for each in build_requests()]
        assert [await collect(sequence) for sequence in sequences] == expected


@pytest.mark.parametrize("count", [2, 4])
async def test_micro_batches_change_nothing(checkpoint: Path, count: int) -> None:
    """Also of one prompt: a chunk of 100 rows is cut in two, which attend one after the other."""
    async with running(checkpoint, WIDE) as engine:
        expected = await alone(engine)
    async with running(checkpoint, WIDE, micro_batches=count) as engine:
        assert await alone(engine) == expected
        sequences = [engine.submit(each) for each in build_requests()]
        assert [await collect(sequence) for sequence in sequences] == expected


@pytest.mark.parametrize("micro_batches", [1, 2])
async def test_rows_that_nobody_reads_change_nothing(checkpoint: Path, micro_batches: int) -> None:
    """All of a prompt's rows go through the last layer where somebody asked for their logprobs, else only the last."""
    async with running(checkpoint, WIDE, micro_batches=micro_batches) as engine:
        read = await alone(engine)
        unread = [dataclasses.replace(each, prompt_logprobs=None) for each in build_requests()]
        assert [(await collect(engine.submit(each))).tokens for each in unread] == [each.tokens for each in read]
        sequences = [engine.submit(each) for each in [*unread, *build_requests()]]
        together = [await collect(sequence) for sequence in sequences]
    assert [each.tokens for each in together[: len(unread)]] == [each.tokens for each in read]
    assert together[len(unread) :] == read


async def test_a_sequence_continued_elsewhere_goes_on_bit_for_bit(checkpoint: Path) -> None:
    """What a router does with the requests of one that died: re-prefill prompt and answer so far."""
    async with running(checkpoint, WIDE) as engine:
        whole = await collect(engine.submit(request(PROMPTS[2], 12, logprobs=2)))
        sent = token_ids(whole)[:5]
        rest = await collect(engine.submit(request(PROMPTS[2] + sent, 7, logprobs=2)))
    assert rest.tokens == whole.tokens[5:]


async def test_prefill_judges_tokens_as_decode_did(checkpoint: Path) -> None:
    async with running(checkpoint, WIDE) as engine:
        whole = await collect(engine.submit(request(PROMPTS[3], 12, logprobs=0)))
        again = await collect(engine.submit(request(PROMPTS[3] + token_ids(whole), 0, prompt_logprobs=0)))
    assert again.prompt_tokens[len(PROMPTS[3]) :] == whole.tokens


async def test_a_batch_of_32_changes_nothing(checkpoint: Path) -> None:
    asked = [
        request([0, number, *range(10, 10 + number)], 10, logprobs=1, sampling=SEEDED if number % 2 else GREEDY)
        for number in range(5, 37)
    ]
    async with running(checkpoint, LARGE) as engine:
        expected = [await collect(engine.submit(each)) for each in asked]
        sequences = [engine.submit(each) for each in asked]
        assert [await collect(sequence) for sequence in sequences] == expected


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
async def test_a_cached_prefix_changes_nothing(checkpoint: Path, sampling: SamplingParams) -> None:
    first, second = [0, *range(30, 130)], [0, *range(30, 110), *range(200, 220)]
    async with running(checkpoint, WIDE) as engine:
        alone = await collect(
            engine.submit(request(second, 12, logprobs=2, sampling=sampling, cache_salt="nobody else's"))
        )
        await collect(engine.submit(request(first, 12)))
        reusing = engine.submit(request(second, 12, logprobs=2, sampling=sampling))
        assert (await collect(reusing)).tokens == alone.tokens
        assert reusing.num_cached_tokens == 64


async def test_preemption_changes_nothing(checkpoint: Path) -> None:
    async with running(checkpoint, WIDE) as engine:
        expected = await alone(engine, max_tokens=40)
    async with running(checkpoint, SCARCE) as engine:
        sequences = [engine.submit(each) for each in build_requests(max_tokens=40)]
        assert [await collect(sequence) for sequence in sequences] == expected
        assert engine.progress().num_preemptions > 0
        engine.check_integrity()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_verified_drafts_change_nothing(checkpoint: Path, temperature: float) -> None:
    """Whatever is guessed: here, every fifth token is guessed wrong."""
    sampling = SamplingParams(temperature=temperature, top_k=0, top_p=0.9, min_p=0.0, seed=3)
    asked = [request(prompt, 24, logprobs=2, sampling=sampling) for prompt in PROMPTS]
    async with running(checkpoint, WIDE) as engine:
        expected = [await collect(engine.submit(each)) for each in asked]
    drafter = ScriptedDrafter(3)
    drafter.answers = {each.prompt_token_ids: token_ids(output) for each, output in zip(asked, expected, strict=True)}
    async with running(checkpoint, WIDE, drafter=drafter) as engine:
        sequences = [engine.submit(each) for each in asked]
        assert [await collect(sequence) for sequence in sequences] == expected
        assert engine.progress().num_steps < 24
