"""`--deterministic`: in bf16, a sequence's tokens and logprobs do not depend, in a single bit, on what else runs."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch

from experts.checkpoint import Checkpoint
from experts.kernels.cpu_ffn import load_cpu_kernel
from experts.model_config import ModelConfig
from experts.wire import WireFormat
from router.dispatch import Dispatcher, DispatchOptions
from router.engine import Engine
from router.expert_pool import ExpertPool
from router.latent_cache import LatentCache
from router.overlap_policy import MicroBatchSetting, OverlapPolicy
from router.scheduler import SchedulerLimits
from router.sequence import SequenceOutput
from router.trunk import Trunk
from router.weights import load_trunk_weights
from tests.random_checkpoint import write_random_checkpoint
from tests.router.in_process import build_table, collect, load_groups, request, start_replica, token_ids

pytestmark = pytest.mark.skipif(
    load_cpu_kernel(torch.bfloat16) is None,
    reason="no native CPU kernel here (no compiler, and none prebuilt): torch's products depend on their neighbours",
)

PROMPTS = [[0, 5, 9, 200], [0, 17], [0, *range(30, 130)], [0, 250, 251, 252, 253, 254], list(range(40, 57))]
WIDE = SchedulerLimits(max_num_seqs=16, max_batched_tokens=512, num_blocks=128, max_waiting=32)
NARROW = SchedulerLimits(max_num_seqs=4, max_batched_tokens=7, num_blocks=128, max_waiting=32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP8, with partial blocks, and matrices wide enough for several tiles of the kernel."""
    folder = tmp_path_factory.mktemp("determinism")
    write_random_checkpoint(folder, seed=9, fp8=True, hidden_size=192, moe_intermediate_size=160)
    return folder


@contextlib.asynccontextmanager
async def running(
    folder: Path, limits: SchedulerLimits, num_groups: int = 2, micro_batches: MicroBatchSetting = "off"
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
    engine = Engine(config, trunk, limits, max_model_len=256, overlap=OverlapPolicy(micro_batches))
    task = asyncio.create_task(engine.run())
    try:
        yield engine
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await pool.close()
        for server in servers:
            server.stop(grace_s=0)


async def alone(engine: Engine) -> list[SequenceOutput]:
    return [await collect(engine.submit(request(prompt, 12, logprobs=2, prompt_logprobs=1))) for prompt in PROMPTS]


async def test_batch_mates_change_nothing(checkpoint: Path) -> None:
    async with running(checkpoint, WIDE) as engine:
        expected = await alone(engine)
        sequences = [engine.submit(request(prompt, 12, logprobs=2, prompt_logprobs=1)) for prompt in PROMPTS]
        assert [await collect(sequence) for sequence in sequences] == expected


async def test_chunks_of_the_prompt_change_nothing(checkpoint: Path) -> None:
    async with running(checkpoint, WIDE) as engine:
        expected = await alone(engine)
    async with running(checkpoint, NARROW) as engine:
        sequences = [engine.submit(request(prompt, 12, logprobs=2, prompt_logprobs=1)) for prompt in PROMPTS]
        assert [await collect(sequence) for sequence in sequences] == expected


@pytest.mark.parametrize("count", [2, 4])
async def test_micro_batches_change_nothing(checkpoint: Path, count: int) -> None:
    """Also of one prompt: a chunk of 100 rows is cut in two, which attend one after the other."""
    async with running(checkpoint, WIDE) as engine:
        expected = await alone(engine)
    async with running(checkpoint, WIDE, micro_batches=count) as engine:
        assert await alone(engine) == expected
        sequences = [engine.submit(request(prompt, 12, logprobs=2, prompt_logprobs=1)) for prompt in PROMPTS]
        assert [await collect(sequence) for sequence in sequences] == expected


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
