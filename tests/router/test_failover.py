"""Replicas that fall silent, become slow, leave the table or compute otherwise: who gets the frames then."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import torch

from experts.wire import WireFormat
from router.dispatch import Dispatcher, DispatchOptions
from router.errors import ExpertsUnavailable
from router.expert_pool import ExpertPool, Numerics, PoolOptions
from router.expert_table import ExpertTable, GroupEntry, ReplicaEntry
from router.heartbeat import HeartbeatOptions
from tests.router.in_process import DEADLINE_S, Fault
from tests.router.test_dispatch import Cluster, run, spread, wait_connected, wait_for
from tests.tcp_proxy import TcpProxy, tcp_proxy

# Twice as quick as by default: the tests are about what happens then.
QUICK = HeartbeatOptions(interval_s=0.1, num_missed=3)


@pytest.fixture
def replicated(tiny_checkpoint: Path) -> Iterator[Cluster]:
    cluster = Cluster(tiny_checkpoint, replicas_per_group=2)
    yield cluster
    cluster.stop()


@pytest.fixture
def proxy(replicated: Cluster) -> Iterator[TcpProxy]:
    """In the path to the first replica of the second group."""
    with tcp_proxy([replicated.servers[1][0].endpoint]) as running:
        yield running


def table_through(cluster: Cluster, proxy: TcpProxy, version: int = 1) -> ExpertTable:
    first, second = cluster.table(version).groups
    behind, other = second.replicas
    moved = ReplicaEntry(**{**vars(behind), "endpoint": proxy.endpoints[0]})
    return ExpertTable(version, (first, GroupEntry(second.name, second.hosted, (moved, other))))


@contextlib.asynccontextmanager
async def dispatching(
    cluster: Cluster,
    table: ExpertTable,
    *,
    heartbeats: HeartbeatOptions = QUICK,
    numerics: Numerics = "sticky",
    call_timeout_s: float = DEADLINE_S,
    expert_wait_s: float = DEADLINE_S,
) -> AsyncIterator[tuple[Dispatcher, ExpertPool]]:
    pool = ExpertPool(cluster.config, PoolOptions(heartbeats, numerics))
    pool.apply(table)
    options = DispatchOptions(WireFormat.FLOAT32, "reduced", call_timeout_s, expert_wait_s)
    try:
        await wait_connected(pool, sum(len(group.replicas) for group in table.groups))
        yield Dispatcher(pool, options), pool
    finally:
        await pool.close()


async def test_a_replica_that_falls_silent_is_found_and_its_frames_move(replicated: Cluster, proxy: TcpProxy) -> None:
    asked = spread(replicated.config)
    async with dispatching(replicated, table_through(replicated, proxy)) as (dispatcher, pool):
        expected = await run(dispatcher, asked)
        proxy.stall()
        started_s = time.monotonic()
        while dispatcher.counters.num_dead_replicas == 0:
            assert torch.equal(await run(dispatcher, asked), expected)
            await asyncio.sleep(0)
        # No deadline of a frame is near: it is the heartbeats that find it.
        assert time.monotonic() - started_s < DEADLINE_S / 2
        assert dispatcher.counters.num_missed_heartbeats >= QUICK.num_missed
        assert pool.connected_replica_ids() == ["g0-0", "g0-1", "g1-1"]
        assert torch.equal(await run(dispatcher, asked), expected)
        proxy.resume()
        await wait_connected(pool, 4)


async def test_a_replica_that_computes_for_long_is_not_dead(replicated: Cluster) -> None:
    """The thread of the stream says nothing for ten heartbeats, the process lives."""
    asked = spread(replicated.config)
    groups = replicated.table().groups
    alone = ExpertTable(1, tuple(GroupEntry(g.name, g.hosted, g.replicas[:1]) for g in groups))
    slow = replicated.servers[1][0]
    async with dispatching(replicated, alone) as (dispatcher, _):
        expected = await run(dispatcher, asked)
        slow.fault, slow.num_faults, slow.slow_s = Fault.SLOW, 1, 10 * QUICK.interval_s
        assert torch.equal(await run(dispatcher, asked), expected)
        assert dispatcher.counters.num_dead_replicas == 0
        assert dispatcher.counters.num_retries == 0


async def test_frames_of_a_silent_replica_that_leaves_the_table_move_at_once(
    replicated: Cluster, proxy: TcpProxy
) -> None:
    asked = spread(replicated.config)
    never = HeartbeatOptions(interval_s=DEADLINE_S, num_missed=3)
    async with dispatching(replicated, table_through(replicated, proxy), heartbeats=never) as (dispatcher, pool):
        expected = await run(dispatcher, asked)
        proxy.stall()
        waiting = [asyncio.create_task(run(dispatcher, asked)) for _ in range(4)]
        # Each replica has at least one of them; how many more, their speeds decide.
        await wait_for(lambda: any(task.done() for task in waiting))
        assert not all(task.done() for task in waiting)
        first, second = replicated.table(2).groups
        pool.apply(ExpertTable(2, (first, GroupEntry(second.name, second.hosted, second.replicas[1:]))))
        for task in waiting:
            assert torch.equal(await asyncio.wait_for(task, DEADLINE_S / 2), expected)
        assert dispatcher.counters.num_rerouted >= 1


async def test_the_last_replica_that_leaves_the_table_still_answers_what_it_has(replicated: Cluster) -> None:
    asked = spread(replicated.config)
    groups = replicated.table().groups
    alone = ExpertTable(1, (groups[0], GroupEntry(groups[1].name, groups[1].hosted, groups[1].replicas[:1])))
    leaving = replicated.servers[1][0]
    async with dispatching(replicated, alone) as (dispatcher, pool):
        expected = await run(dispatcher, asked)
        leaving.fault, leaving.num_faults, leaving.slow_s = Fault.SLOW, 1, 0.3
        leaving.frame_arrived.clear()
        task = asyncio.create_task(run(dispatcher, asked))
        await asyncio.to_thread(leaving.frame_arrived.wait, DEADLINE_S)
        pool.apply(ExpertTable(2, (groups[0], GroupEntry(groups[1].name, groups[1].hosted, ()))))
        assert torch.equal(await task, expected)


async def test_a_replica_that_is_late_is_hedged_around(replicated: Cluster, proxy: TcpProxy) -> None:
    """Its connection stands and its answers do not come: from the late point on, others are asked as well."""
    asked = spread(replicated.config)
    never = HeartbeatOptions(interval_s=DEADLINE_S, num_missed=3)
    both = table_through(replicated, proxy, version=2)
    first, second = both.groups
    without = ExpertTable(1, (first, GroupEntry(second.name, second.hosted, second.replicas[1:])))
    async with dispatching(replicated, without, heartbeats=never) as (dispatcher, pool):
        expected = await run(dispatcher, asked)
        for _ in range(100):
            await run(dispatcher, asked)
        pool.apply(both)
        await wait_connected(pool, 4)
        proxy.stall()
        # Who was never asked counts as fast as the others, so the next frame is its; it stays the only one.
        for num_runs in range(1, 4):
            assert torch.equal(await asyncio.wait_for(run(dispatcher, asked), DEADLINE_S / 2), expected)
            assert dispatcher.counters.num_hedges_won >= 1
            assert pool.replica_times()[2].num_frames <= num_runs
        proxy.resume()


async def test_a_slow_replica_gets_little_until_it_has_recovered(replicated: Cluster, proxy: TcpProxy) -> None:
    """Answers 100 ms late, in the network's way."""
    asked = spread(replicated.config)
    async with dispatching(replicated, table_through(replicated, proxy)) as (dispatcher, pool):
        expected = await run(dispatcher, asked)
        for _ in range(200):
            await run(dispatcher, asked)
        before = [replica.num_frames for replica in pool.replica_times()]
        proxy.set_delay(50.0)
        for _ in range(200):
            assert torch.equal(await run(dispatcher, asked), expected)
        after = [replica.num_frames for replica in pool.replica_times()]
        slow, other = after[2] - before[2], after[3] - before[3]
        assert slow < other / 5
        counters = dispatcher.counters
        assert counters.num_hedges + counters.num_probes <= 0.1 * counters.num_frames + 16
        # It is named, at the latest by a probe, and gets its share again soon after it has recovered.
        async with asyncio.timeout(DEADLINE_S):
            while pool.replica_times()[2].slowness <= 5:
                await run(dispatcher, asked)
        await wait_for(lambda: pool.replica_times()[2].num_outstanding == 0)
        proxy.set_delay(0.0)
        async with asyncio.timeout(DEADLINE_S):
            while pool.replica_times()[2].slowness > 5:
                await run(dispatcher, asked)


def with_numerics(cluster: Cluster, version: int, numerics_ids: list[str]) -> ExpertTable:
    """The replicas of the second group say that they compute like this; so many of them are in the table."""
    first, second = cluster.table(version).groups
    replicas = tuple(
        ReplicaEntry(**{**vars(replica), "numerics_id": numerics_id})
        for replica, numerics_id in zip(second.replicas, numerics_ids, strict=False)
    )
    return ExpertTable(version, (first, GroupEntry(second.name, second.hosted, replicas)))


@pytest.mark.parametrize("numerics", ["sticky", "mixed"])
async def test_frames_stay_with_one_arithmetic_while_a_replica_of_it_lives(
    replicated: Cluster, numerics: Numerics
) -> None:
    asked = spread(replicated.config)
    async with dispatching(replicated, with_numerics(replicated, 1, ["cpu", "gpu"]), numerics=numerics) as (
        dispatcher,
        pool,
    ):
        await asyncio.gather(*(run(dispatcher, asked) for _ in range(10)))
        used = [replica.num_frames > 0 for replica in pool.replica_times()[2:]]
        assert sum(used) == (1 if numerics == "sticky" else 2)
        assert (dispatcher.counters.num_crossings > 0) == (numerics == "mixed")
        replicated.servers[1][used.index(True)].stop(grace_s=0)
        await run(dispatcher, asked)
        assert dispatcher.counters.num_crossings >= 1


async def test_uniform_numerics_never_cross(replicated: Cluster) -> None:
    asked = spread(replicated.config)
    table = with_numerics(replicated, 1, ["cpu", "gpu"])
    async with dispatching(replicated, table, numerics="uniform", expert_wait_s=0.3) as (dispatcher, pool):
        await run(dispatcher, asked)
        used = [replica.num_frames > 0 for replica in pool.replica_times()[2:]].index(True)
        replicated.servers[1][used].stop(grace_s=0)
        with pytest.raises(ExpertsUnavailable, match="g1"):
            await run(dispatcher, asked)
        assert pool.unserved() == "waiting for a replica of expert group g1"
        assert dispatcher.counters.num_crossings == 0
