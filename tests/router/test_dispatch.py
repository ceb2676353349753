"""Scatter and gather over real gRPC on loopback: sums, order, and what happens when replicas fail."""

import asyncio
import contextlib
import itertools
import logging
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import torch

from experts.checkpoint import Checkpoint
from experts.group import ExpertGroup
from experts.model_config import ModelConfig
from experts.wire import WireFormat
from router.dispatch import CombineMode, Dispatcher, DispatchOptions
from router.errors import ExpertsUnavailable, StaleTable
from router.expert_pool import ExpertPool
from router.expert_table import ExpertTable, GroupEntry, table_from_proto, table_to_proto
from tests.random_checkpoint import read_tensors
from tests.router.in_process import (
    DEADLINE_S,
    Fault,
    FaultyExpertServer,
    build_table,
    entry_of,
    load_groups,
    start_replica,
)
from tests.tolerances import FP8_WIRE_RELATIVE_ERROR

LAYER_ID = 1
NUM_TOKENS = 6


class Cluster:
    """Replicas of two groups, and what a fault-free call returns."""

    def __init__(self, folder: Path, replicas_per_group: int = 1) -> None:
        self.config: ModelConfig = Checkpoint(folder).config
        self.groups: list[ExpertGroup] = load_groups(folder, 2)
        self.servers: list[list[FaultyExpertServer]] = [
            [start_replica(group, f"g{index}", f"g{index}-{number}") for number in range(replicas_per_group)]
            for index, group in enumerate(self.groups)
        ]

    def table(self, version: int = 1) -> ExpertTable:
        return build_table(version, self.groups, [list(replicas) for replicas in self.servers])

    def stop(self) -> None:
        for replicas in self.servers:
            for server in replicas:
                server.stop(grace_s=0)


@pytest.fixture(params=["native", "python"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every promise holds with and without the native library."""
    if request.param == "python":
        monkeypatch.setattr("router.native_scatter.load_library", lambda: None)


@pytest.fixture
def cluster(tiny_checkpoint: Path) -> Iterator[Cluster]:
    cluster = Cluster(tiny_checkpoint)
    yield cluster
    cluster.stop()


@pytest.fixture
def replicated(tiny_checkpoint: Path) -> Iterator[Cluster]:
    cluster = Cluster(tiny_checkpoint, replicas_per_group=2)
    yield cluster
    cluster.stop()


@contextlib.asynccontextmanager
async def dispatching(
    cluster: Cluster,
    *,
    combine: CombineMode = "reduced",
    call_timeout_s: float = 5.0,
    expert_wait_s: float = 10.0,
    wire_format: WireFormat = WireFormat.FLOAT32,
) -> AsyncIterator[tuple[Dispatcher, ExpertPool]]:
    pool = ExpertPool(cluster.config)
    pool.apply(cluster.table())
    dispatcher = Dispatcher(
        pool,
        DispatchOptions(wire_format, combine, call_timeout_s=call_timeout_s, expert_wait_s=expert_wait_s),
    )
    try:
        yield dispatcher, pool
    finally:
        await pool.close()


def batch(config: ModelConfig, experts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden_states, topk_ids, topk_weights for the given choice of experts per row."""
    generator = torch.Generator().manual_seed(len(experts))
    hidden_states = torch.randn(len(experts), config.hidden_size, generator=generator)
    topk_ids = torch.tensor(experts)
    return hidden_states, topk_ids, torch.rand(topk_ids.shape, generator=generator)


def spread(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    experts = [torch.randperm(config.n_routed_experts, generator=generator)[:4].tolist() for _ in range(NUM_TOKENS)]
    return batch(config, experts)


async def run(dispatcher: Dispatcher, asked: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    pending = await dispatcher.scatter(LAYER_ID, *asked)
    return await asyncio.wait_for(pending.gather(), DEADLINE_S)


def by_hand(folder: Path, asked: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """sum_k w_k expert_k(x), expert by expert, from the stored weights."""
    tensors = read_tensors(folder)
    total = torch.zeros(asked[0].shape)
    for row, (x, ids, weights) in enumerate(zip(*asked, strict=True)):
        for expert, weight in zip(ids.tolist(), weights, strict=True):
            gate, up, down = (
                tensors[f"model.layers.{LAYER_ID}.mlp.experts.{expert}.{name}_proj.weight"].float()
                for name in ("gate", "up", "down")
            )
            total[row] += weight * (down @ (torch.nn.functional.silu(gate @ x) * (up @ x)))
    return total


@pytest.mark.parametrize("combine", ["reduced", "exact"])
@pytest.mark.parametrize(
    "experts",
    [
        pytest.param([[3, 9, 1, 12]], id="one row, both groups"),
        pytest.param([[0, 1, 2, 3]] * 5, id="all rows to one group"),
        pytest.param([[7, 8, 6, 9], [0, 1, 2, 3], [15, 14, 13, 12]], id="rows of one group, of the other, of both"),
        pytest.param([[4, 4, 4, 4]], id="the same expert four times"),
    ],
)
async def test_sums_are_those_computed_by_hand(
    tiny_checkpoint: Path, cluster: Cluster, combine: CombineMode, experts: list[list[int]]
) -> None:
    if len(set(experts[0])) == 1:
        experts = [[4]]  # a gate never repeats an expert; top-1 is the nearest thing
    asked = batch(cluster.config, experts)
    async with dispatching(cluster, combine=combine) as (dispatcher, _):
        found = await run(dispatcher, asked)
    torch.testing.assert_close(found, by_hand(tiny_checkpoint, asked), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("combine", ["reduced", "exact"])
@pytest.mark.parametrize("wire_format", [WireFormat.FP8, WireFormat.FP8_BOTH])
async def test_fp8_on_the_wire_is_near_and_a_row_does_not_depend_on_its_neighbours(
    tiny_checkpoint: Path, cluster: Cluster, combine: CombineMode, wire_format: WireFormat
) -> None:
    asked = spread(cluster.config)
    asked[0][2] = 1e-30  # below what a scale can show
    async with dispatching(cluster, combine=combine, wire_format=wire_format) as (dispatcher, _):
        found = await run(dispatcher, asked)
        alone = [await run(dispatcher, (asked[0][i : i + 1], asked[1][i : i + 1], asked[2][i : i + 1])) for i in (0, 4)]
        broken = asked[0].clone()
        broken[4, 3] = float("nan")
        spoiled = await run(dispatcher, (broken, *asked[1:]))
    expected = by_hand(tiny_checkpoint, asked)
    assert (found - expected).norm() / expected.norm() < FP8_WIRE_RELATIVE_ERROR
    torch.testing.assert_close(torch.cat(alone), found[[0, 4]], rtol=1e-5, atol=1e-6)
    others = [0, 1, 2, 3, 5]
    assert spoiled[4].isnan().all() and torch.equal(spoiled[others], found[others])


async def test_a_group_that_no_row_chose_gets_no_frame(cluster: Cluster) -> None:
    async with dispatching(cluster) as (dispatcher, _):
        await run(dispatcher, batch(cluster.config, [[0, 1, 2, 3], [4, 5, 6, 7]]))
    assert [servers[0].num_frames for servers in cluster.servers] == [1, 0]


async def test_frames_are_on_their_way_while_the_caller_computes(cluster: Cluster) -> None:
    """The trunk computes its shared experts on the loop's thread: the groups must have their frames by then."""
    async with dispatching(cluster) as (dispatcher, pool):
        await wait_connected(pool, 2)
        pending = await dispatcher.scatter(LAYER_ID, *spread(cluster.config))
        # The loop gets no turn in here, on purpose.
        arrived = [servers[0].frame_arrived.wait(DEADLINE_S) for servers in cluster.servers]
        await asyncio.wait_for(pending.gather(), DEADLINE_S)
    assert arrived == [True, True]


async def test_frames_larger_than_a_message_are_cut_and_give_the_same_sums(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = spread(cluster.config)
    async with dispatching(cluster, combine="exact") as (dispatcher, _):
        whole = await run(dispatcher, asked)
        monkeypatch.setattr("router.dispatch.compute_max_rows", lambda *_, **__: 1)
        cluster.servers[0][0].num_frames = 0
        cut = await run(dispatcher, asked)
    assert cluster.servers[0][0].num_frames > 1
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fault", [f for f in Fault if f is not Fault.NOT_HOSTED])
async def test_a_frame_that_one_replica_fails_is_answered_by_the_other_bit_for_bit(
    replicated: Cluster, fault: Fault
) -> None:
    asked = spread(replicated.config)
    # Only a fault that needs the deadline gets a short one: on a busy machine a sound replica may miss it, too.
    async with dispatching(replicated, call_timeout_s=0.5 if fault is Fault.SLOW else 5.0) as (dispatcher, pool):
        await wait_connected(pool, 4)
        expected = await run(dispatcher, asked)
        for server in replicated.servers[1]:
            server.fault, server.num_faults = fault, 0
        replicated.servers[1][0].num_faults = 1
        async with asyncio.timeout(DEADLINE_S):
            while replicated.servers[1][0].num_faults:  # until the faulty one was chosen
                assert torch.equal(await run(dispatcher, asked), expected)
                await wait_connected(pool, 4)
        if fault is not Fault.TWICE:  # the first answer was good
            assert dispatcher.counters.num_retries + dispatcher.counters.num_hedges_won >= 1
        if fault in (Fault.NOT_FINITE, Fault.TWICE, Fault.WRONG_FRAME, Fault.TRUNCATED, Fault.WRONG_SHAPE):
            await wait_for(lambda: dispatcher.counters.errors.get("BadReply") == 1)
        # It serves again afterwards, and nothing is left over.
        assert torch.equal(await run(dispatcher, asked), expected)
        await wait_connected(pool, 4)


async def test_a_silent_replica_that_takes_all_the_time_leaves_one_try_for_the_other(replicated: Cluster) -> None:
    asked = spread(replicated.config)
    async with dispatching(replicated) as (dispatcher, pool):
        await wait_connected(pool, 4)
        expected = await run(dispatcher, asked)
    silent = replicated.servers[1][0]
    silent.fault, silent.num_faults, silent.slow_s = Fault.SLOW, 1, 2.0
    async with dispatching(replicated, call_timeout_s=1.0, expert_wait_s=1.0) as (dispatcher, pool):
        await wait_connected(pool, 4)
        async with asyncio.timeout(DEADLINE_S):
            while silent.num_faults:  # until the silent one was chosen
                assert torch.equal(await run(dispatcher, asked), expected)
        assert dispatcher.counters.errors["CallTimeout"] >= 1


@pytest.mark.parametrize(
    "fault",
    [Fault.DIE_BEFORE, Fault.DIE_AFTER, Fault.OVERLOADED, Fault.WRONG_SHAPE, Fault.GARBLED, Fault.NOT_FINITE],
)
async def test_the_only_replica_is_asked_again(cluster: Cluster, fault: Fault) -> None:
    asked = spread(cluster.config)
    async with dispatching(cluster) as (dispatcher, _):
        expected = await run(dispatcher, asked)
        # What is not finite twice is what the weights make of the rows.
        num_faults = 1 if fault is Fault.NOT_FINITE else 2
        cluster.servers[0][0].fault, cluster.servers[0][0].num_faults = fault, num_faults
        assert torch.equal(await run(dispatcher, asked), expected)
        assert dispatcher.counters.num_retries == num_faults


async def test_without_a_replica_the_request_fails_after_the_wait_and_works_when_one_is_back(cluster: Cluster) -> None:
    asked = spread(cluster.config)
    async with dispatching(cluster, expert_wait_s=0.3) as (dispatcher, pool):
        await wait_connected(pool, 2)
        expected = await run(dispatcher, asked)
        cluster.servers[1][0].stop(grace_s=0)
        with pytest.raises(ExpertsUnavailable, match="g1"):
            await run(dispatcher, asked)
        assert pool.unserved() == "waiting for a replica of expert group g1"
        cluster.servers[1] = [start_replica(cluster.groups[1], "g1", "g1-0")]
        pool.apply(cluster.table(version=2))
        await wait_connected(pool, 2)
        assert torch.equal(await run(dispatcher, asked), expected)


async def test_a_replica_that_refuses_every_frame_is_not_asked_in_a_hot_loop(cluster: Cluster) -> None:
    shedding = cluster.servers[1][0]
    shedding.fault, shedding.num_faults = Fault.OVERLOADED, 1_000_000
    async with dispatching(cluster, expert_wait_s=0.5) as (dispatcher, pool):
        await wait_connected(pool, 2)
        with pytest.raises(ExpertsUnavailable, match="OVERLOADED"):
            await run(dispatcher, spread(cluster.config))
    # Retries after 0, 20, 40, 80, 160, 320 ms; without pauses it was asked some 500 times a second.
    assert 2 <= shedding.num_frames <= 10


async def test_a_waiting_frame_goes_to_the_restarted_replica_of_a_new_table(cluster: Cluster) -> None:
    asked = spread(cluster.config)
    async with dispatching(cluster) as (dispatcher, pool):
        expected = await run(dispatcher, asked)
        cluster.servers[1][0].stop(grace_s=0)
        pending = await dispatcher.scatter(LAYER_ID, *asked)
        cluster.servers[1] = [start_replica(cluster.groups[1], "g1", "g1-0")]
        pool.apply(cluster.table(version=2))
        assert torch.equal(await asyncio.wait_for(pending.gather(), DEADLINE_S), expected)


async def test_a_frame_that_its_replica_does_not_host_is_planned_again_on_the_next_table(cluster: Cluster) -> None:
    asked = spread(cluster.config)
    async with dispatching(cluster) as (dispatcher, pool):
        expected = await run(dispatcher, asked)
        cluster.servers[0][0].fault, cluster.servers[0][0].num_faults = Fault.NOT_HOSTED, 1
        pending = await dispatcher.scatter(LAYER_ID, *asked)
        async with asyncio.timeout(DEADLINE_S):
            while dispatcher.counters.num_replans == 0:
                await asyncio.sleep(0)
        pool.apply(cluster.table(version=2))
        assert torch.equal(await asyncio.wait_for(pending.gather(), DEADLINE_S), expected)


@pytest.mark.parametrize("field", ["weight_digest", "incarnation", "replica_id"])
async def test_a_replica_that_is_not_the_one_of_the_table_is_never_used(cluster: Cluster, field: str) -> None:
    """Other weights, another incarnation or another replica at the address: refused at the handshake."""
    table = cluster.table(version=2)
    entry = entry_of(cluster.servers[0][0], cluster.groups[0])
    wrong = {"weight_digest": "f" * 64, "incarnation": entry.incarnation + 1, "replica_id": "g0-7"}
    impostor = type(entry)(**{**vars(entry), field: wrong[field]})
    groups = (GroupEntry("g0", table.groups[0].hosted, (impostor,)), table.groups[1])
    async with dispatching(cluster, expert_wait_s=0.5) as (dispatcher, pool):
        pool.apply(ExpertTable(2, groups))
        with pytest.raises(ExpertsUnavailable, match="g0"):
            await run(dispatcher, spread(cluster.config))
    assert cluster.servers[0][0].num_frames == 0


async def test_frames_are_spread_over_replicas_by_outstanding_work(replicated: Cluster) -> None:
    asked = spread(replicated.config)
    async with dispatching(replicated) as (dispatcher, pool):
        await wait_connected(pool, 4)
        for server in itertools.chain(*replicated.servers):  # no answer comes before all is sent
            server.fault, server.num_faults, server.slow_s = Fault.SLOW, 1, 0.5
        await asyncio.gather(*(run(dispatcher, asked) for _ in range(20)))
    counts = [server.num_frames for servers in replicated.servers for server in servers]
    assert min(counts) >= 5 and sum(counts) == 40


async def test_several_routers_at_once_each_get_their_own_sums(tiny_checkpoint: Path, cluster: Cluster) -> None:
    """Their frames meet at the groups and are joined there as they come."""
    asked = [batch(cluster.config, [[e, (e + 5) % 16, (e + 9) % 16, (e + 11) % 16]] * (1 + e % 3)) for e in range(4)]
    async with contextlib.AsyncExitStack() as routers:
        dispatchers = [(await routers.enter_async_context(dispatching(cluster)))[0] for _ in asked]
        for _ in range(20):
            found = await asyncio.gather(*(run(*pair) for pair in zip(dispatchers, asked, strict=True)))
            for one, batch_of_one in zip(found, asked, strict=True):
                torch.testing.assert_close(one, by_hand(tiny_checkpoint, batch_of_one), rtol=1e-4, atol=1e-5)


async def test_an_older_table_is_refused_and_connections_survive_a_new_one(cluster: Cluster) -> None:
    async with dispatching(cluster) as (dispatcher, pool):
        await run(dispatcher, spread(cluster.config))
        pool.apply(cluster.table(version=5))
        assert pool.connected_replica_ids() == ["g0-0", "g1-0"]  # at once: nothing was dialled again
        with pytest.raises(StaleTable, match="4 is older than 5"):
            pool.apply(cluster.table(version=4))


async def test_a_table_survives_its_journey_and_names_what_it_misses(cluster: Cluster) -> None:
    table = cluster.table(version=3)
    assert table_from_proto(table_to_proto(table)) == table
    assert table.missing([1, 2], 16) == []
    assert ExpertTable(1, table.groups[:1]).missing([1], 16) == [(1, expert) for expert in range(8, 16)]


async def wait_connected(pool: ExpertPool, count: int) -> None:
    await wait_for(lambda: len(pool.connected_replica_ids()) >= count)


async def wait_for(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_cancelled_scatter_or_gather_leaves_no_frame_waiting(cluster: Cluster) -> None:
    async with dispatching(cluster) as (dispatcher, pool):
        asked = spread(cluster.config)
        await run(dispatcher, asked)
        connections = [pool.pick(name) for name in cluster.table().group_names]
        for num_turns in range(4):
            task = asyncio.create_task(run(dispatcher, asked))
            for _ in range(num_turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task], timeout=DEADLINE_S)
            assert task.cancelled() or num_turns > 1  # by then it may be done
            assert [connection.outstanding for connection in connections if connection is not None] == [0, 0]
        expected = await run(dispatcher, asked)
        assert expected.shape == asked[0].shape


@pytest.mark.skipif(sys.platform != "linux", reason="abstract unix sockets are Linux's")
async def test_a_replica_on_this_host_is_reached_by_its_unix_socket(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="router.expert_connection")
    async with dispatching(cluster) as (dispatcher, _):
        await run(dispatcher, spread(cluster.config))
    connected = [record.getMessage() for record in caplog.records if "replica connected" in record.getMessage()]
    assert len(connected) == 2
    assert all(message.endswith("over=unix") for message in connected)
