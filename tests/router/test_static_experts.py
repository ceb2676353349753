"""The table that is made from known addresses, over real servers."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from experts.checkpoint import Checkpoint
from experts.server import ExpertServer, ReplicaIdentity
from router.expert_pool import ExpertPool
from router.static_experts import LOOK_EVERY_S, StaticExperts
from tests.router.in_process import DEADLINE_S, load_groups


@contextlib.asynccontextmanager
async def looking(folder: Path, endpoints: list[str]) -> AsyncIterator[ExpertPool]:
    pool = ExpertPool(Checkpoint(folder).config)
    task = asyncio.create_task(StaticExperts(endpoints, pool).run())
    try:
        yield pool
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await pool.close()


async def wait_served(pool: ExpertPool) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while pool.unserved() is not None:
            await asyncio.sleep(0.01)


async def test_groups_stand_in_the_order_of_what_they_host_and_a_restarted_replica_comes_back(
    tiny_checkpoint: Path,
) -> None:
    groups = load_groups(tiny_checkpoint, 2)
    servers = [ExpertServer(group, ReplicaIdentity(f"g{i}", f"g{i}-0", 1)) for i, group in enumerate(groups)]
    endpoints = [server.start() for server in servers]
    async with looking(tiny_checkpoint, endpoints[::-1]) as pool:
        await wait_served(pool)
        assert pool.table.group_names == ("g0", "g1")
        await asyncio.to_thread(servers[1].stop, 0)
        port = int(endpoints[1].rpartition(":")[2])
        servers[1] = ExpertServer(groups[1], ReplicaIdentity("g1", "g1-0", 2), port=port)
        servers[1].start()
        async with asyncio.timeout(DEADLINE_S):
            while [replica.incarnation for replica in pool.table.groups[1].replicas] != [2]:
                await asyncio.sleep(0.01)
        await wait_served(pool)
    for server in servers:
        server.stop(0)


async def test_replicas_of_one_name_with_other_weights_are_not_mixed(
    tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two groups that were both left with the default name: one is used, the other one is named in the log, once."""
    groups = load_groups(tiny_checkpoint, 2)
    servers = [ExpertServer(group, ReplicaIdentity("g0", f"g0-{i}", time.time_ns())) for i, group in enumerate(groups)]
    endpoints = [server.start() for server in servers]
    async with looking(tiny_checkpoint, endpoints) as pool:
        async with asyncio.timeout(DEADLINE_S):
            while not pool.connected_replica_ids():
                await asyncio.sleep(0.01)
        await asyncio.sleep(5 * LOOK_EVERY_S)  # several looks, none of which may change anything
        assert pool.connected_replica_ids() == ["g0-0"]
        assert str(pool.unserved()).startswith("no expert group hosts layer 1, expert 8")
    refusals = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert len(refusals) == 1 and endpoints[1] in refusals[0]
    for server in servers:
        server.stop(0)
