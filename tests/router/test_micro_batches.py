"""Steps cut into micro-batches: the cuts, what runs at the same time, and what is left when one of them fails."""

import asyncio
import dataclasses

import pytest
import torch

from router.block_pool import BLOCK_SIZE
from router.errors import ExpertsUnavailable
from router.layer_order import LayerOrder
from router.micro_batches import LEAST_ROWS_OF_PART, MicroBatch, MicroBatchRunner, split_batch
from router.overlap_policy import OverlapPolicy
from router.step_batch import Segment, StepBatch, TokenSpan, build_step_batch

DEADLINE_S = 10.0
NUM_LAYERS = 3


def build(*sizes: tuple[int, int]) -> StepBatch:
    """A step of (num_new, context_len) sequences with tokens and blocks of their own."""
    spans: list[TokenSpan] = []
    next_block = 0
    for number, (num_new, context_len) in enumerate(sizes):
        num_blocks = -(-(context_len + num_new) // BLOCK_SIZE)
        tokens = [1000 * number + token for token in range(num_new)]
        spans.append(TokenSpan(tokens, context_len, range(next_block, next_block + num_blocks)))
        next_block += num_blocks
    return build_step_batch(spans)


def rows_of(parts: list[MicroBatch]) -> list[int]:
    return [len(part.batch.input_ids) for part in parts]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    "sizes",
    [
        [(1, 5)],
        [(1, 40)] * 32,
        [(500, 0)],
        [(90, 64), (1, 3000), (1, 7), (200, 31), (3, 0)],
        [(LEAST_ROWS_OF_PART + 1, 3), (1, 2)],
    ],
)
def test_the_parts_are_the_step(sizes: list[tuple[int, int]], count: int) -> None:
    whole = build(*sizes)
    whole = dataclasses.replace(whole, output_rows=torch.arange(0, len(whole.input_ids), 3))
    parts = split_batch(whole, count)
    assert 1 <= len(parts) <= count
    for name in ("input_ids", "positions", "slot_mapping"):
        assert torch.cat([getattr(part.batch, name) for part in parts]).equal(getattr(whole, name))
    outputs = [part.batch.input_ids[part.batch.output_rows] for part in parts]
    assert torch.cat(outputs).equal(whole.input_ids[::3])
    for part, _ in parts:
        assert part.segments[0].start == 0
        assert sum(segment.num_new for segment in part.segments) == len(part.input_ids)
        for segment, blocks in zip(part.segments, part.block_tables, strict=True):
            rows = slice(segment.start, segment.start + segment.num_new)
            positions = part.positions[rows]
            assert positions.tolist() == list(range(segment.context_len, segment.context_len + segment.num_new))
            slots = blocks[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
            assert slots.equal(part.slot_mapping[rows])


def test_decoding_sequences_are_shared_out_by_their_cost() -> None:
    assert rows_of(split_batch(build(*[(1, 100)] * 32), 2)) == [16, 16]
    assert rows_of(split_batch(build(*[(1, 100)] * 32), 4)) == [8, 8, 8, 8]
    # A long context costs as much as several short ones.
    assert rows_of(split_batch(build((1, 5000), *[(1, 0)] * 4), 2)) == [1, 4]


def test_one_token_is_one_micro_batch() -> None:
    assert rows_of(split_batch(build((1, 100)), 4)) == [1]


def test_a_long_chunk_is_cut_and_its_second_part_follows_the_first() -> None:
    first, second = split_batch(build((400, 96)), 2)
    assert not first.follows
    assert second.follows
    assert abs(len(first.batch.input_ids) - 200) < 20
    num_first = len(first.batch.input_ids)
    assert list(second.batch.segments) == [Segment(0, 400 - num_first, 96 + num_first)]


def test_a_short_chunk_stays_whole() -> None:
    parts = split_batch(build((LEAST_ROWS_OF_PART, 0), (LEAST_ROWS_OF_PART, 0)), 2)
    assert rows_of(parts) == [LEAST_ROWS_OF_PART, LEAST_ROWS_OF_PART]
    assert not parts[1].follows
    assert rows_of(split_batch(build((2 * LEAST_ROWS_OF_PART - 1, 0)), 2)) == [2 * LEAST_ROWS_OF_PART - 1]


class ScriptedTrunk:
    """Notes (micro-batch, layer) when it attends, and lets each layer's experts answer as told. The result of a row is
    its token."""

    def __init__(self) -> None:
        self.attended: list[tuple[int, int]] = []
        self.num_waiting = 0
        self.answered: dict[int, asyncio.Event] = {}
        self.error_of: int | None = None

    async def forward(self, batch: StepBatch, order: LayerOrder | None = None) -> torch.Tensor:
        name = int(batch.input_ids[0])
        for layer_id in range(NUM_LAYERS):
            if order is not None:
                await order.enter(layer_id)
            self.attended.append((name, layer_id))
            if name == self.error_of and layer_id == 1:
                raise ExpertsUnavailable("no replica")
            self.num_waiting += 1
            try:
                for _ in range(3):  # turns of the loop until the answer is there
                    await asyncio.sleep(0)
                if (answered := self.answered.get(name)) is not None:
                    await answered.wait()
            finally:
                self.num_waiting -= 1
        return batch.input_ids[:, None].float()


async def run(trunk: ScriptedTrunk, batch: StepBatch, count: int = 2) -> torch.Tensor:
    return await asyncio.wait_for(MicroBatchRunner(trunk, OverlapPolicy(count)).forward(batch), DEADLINE_S)


async def test_one_attends_while_the_other_waits_and_rows_keep_their_order() -> None:
    trunk = ScriptedTrunk()
    batch = build((1, 8), (1, 8), (1, 8), (1, 8))
    result = await run(trunk, batch)
    assert result[:, 0].tolist() == batch.input_ids.tolist()
    assert trunk.attended == [(name, layer_id) for layer_id in range(NUM_LAYERS) for name in (0, 2000)]


async def test_a_micro_batch_whose_experts_are_slow_holds_up_no_other() -> None:
    trunk = ScriptedTrunk()
    slow = trunk.answered[0] = asyncio.Event()
    task = asyncio.create_task(run(trunk, build((1, 8), (1, 8))))
    async with asyncio.timeout(DEADLINE_S):
        while (1000, NUM_LAYERS - 1) not in trunk.attended:
            await asyncio.sleep(0)
    assert (0, 1) not in trunk.attended
    slow.set()
    await task


async def test_the_second_part_of_a_chunk_never_overtakes_the_first() -> None:
    """It reads, in every layer, the cache rows that the first writes there."""
    trunk = ScriptedTrunk()
    slow = trunk.answered[0] = asyncio.Event()
    task = asyncio.create_task(run(trunk, build((100, 0))))
    async with asyncio.timeout(DEADLINE_S):
        while len(trunk.attended) < 2:
            await asyncio.sleep(0)
    for _ in range(20):
        await asyncio.sleep(0)
    assert [layer_id for _, layer_id in trunk.attended] == [0, 0]  # and it waits there
    slow.set()
    await task
    assert [layer_id for _, layer_id in trunk.attended] == [0, 0, 1, 1, 2, 2]
    assert [name == 0 for name, _ in trunk.attended] == [True, False] * NUM_LAYERS


async def test_when_one_fails_the_step_fails_with_its_error_and_the_other_is_stopped() -> None:
    trunk = ScriptedTrunk()
    trunk.error_of = 0
    trunk.answered[1000] = asyncio.Event()  # for ever
    tasks_before = asyncio.all_tasks()
    with pytest.raises(ExpertsUnavailable, match="no replica"):
        await run(trunk, build((1, 8), (1, 8)))
    assert trunk.num_waiting == 0
    assert asyncio.all_tasks() == tasks_before


async def test_cancelling_a_step_stops_all_its_micro_batches() -> None:
    trunk = ScriptedTrunk()
    trunk.answered = {0: asyncio.Event(), 1000: asyncio.Event()}
    task = asyncio.create_task(run(trunk, build((1, 8), (1, 8))))
    async with asyncio.timeout(DEADLINE_S):
        while trunk.num_waiting < 2:
            await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert trunk.num_waiting == 0


async def test_waiting_is_what_the_loop_did_not_compute() -> None:
    recorded: list[tuple[object, ...]] = []

    class Recorder(OverlapPolicy):
        def record(self, *arguments: object) -> None:
            recorded.append(arguments)

    now_s, computed_s = iter([10.0, 10.5]), iter([3.0, 3.125])
    runner = MicroBatchRunner(
        ScriptedTrunk(), Recorder("off"), clock=lambda: next(now_s), compute_clock=lambda: next(computed_s)
    )
    await runner.forward(build((1, 8), (1, 8), (1, 8)))
    assert recorded == [((3, 3), 1, (0.5, 0.375))]
