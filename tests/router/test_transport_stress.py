"""Frames of all sizes at once through sockets that take little: nobody waits for ever, and every sum is right.

What this would find: a wake-up that is lost between a full socket and the loop, a message whose rest is never written,
or a reply that is paired with another frame. Seeded, so a failure can be repeated.
"""

import asyncio
import contextlib
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import uvloop

from experts import front_door
from experts.wire import WireFormat
from router import expert_connection
from router.dispatch import Dispatcher, DispatchOptions
from router.expert_pool import ExpertPool
from tests.router.in_process import DEADLINE_S
from tests.router.test_dispatch import LAYER_ID, Cluster, batch, wait_connected

# Less than most frames, so that most writes are partial.
SOCKET_BYTES = 16_384
NUM_WORKERS = 6
NUM_ROUNDS = 25
ROWS = (1, 3, 40, 400)


@pytest.fixture
def narrow_cluster(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    original = front_door.set_stream_options

    def narrow(connection: socket.socket) -> None:
        original(connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)

    monkeypatch.setattr(front_door, "set_stream_options", narrow)
    monkeypatch.setattr(expert_connection, "set_stream_options", narrow)
    cluster = Cluster(tiny_checkpoint, replicas_per_group=2)
    yield cluster
    cluster.stop()


@pytest.mark.parametrize("seed", [1, 2])
def test_frames_of_all_sizes_at_once_come_back_whole(narrow_cluster: Cluster, seed: int) -> None:
    uvloop.run(_scatter_at_random(narrow_cluster, seed))


async def _scatter_at_random(cluster: Cluster, seed: int) -> None:
    chooser = random.Random(seed)
    experts = [chooser.sample(range(cluster.config.n_routed_experts), 4) for _ in range(max(ROWS))]
    asked = [batch(cluster.config, experts[:num_rows]) for num_rows in ROWS]
    pool = ExpertPool(cluster.config)
    pool.apply(cluster.table())
    # Longer than the test may take: no wait is ended by the deadline of a frame.
    dispatcher = Dispatcher(pool, DispatchOptions(WireFormat.FLOAT32, "reduced", 10 * DEADLINE_S, 10 * DEADLINE_S))
    try:
        await wait_connected(pool, 4)
        async with asyncio.timeout(DEADLINE_S):
            expected = [await _run(dispatcher, one) for one in asked]
        num_right = 0

        async def work(turns: random.Random) -> None:
            nonlocal num_right
            for _ in range(NUM_ROUNDS):
                index = turns.randrange(len(asked))
                task = asyncio.create_task(_run(dispatcher, asked[index]))
                if turns.random() < 0.2:  # in the middle of a write or of a reply
                    for _ in range(turns.randrange(12)):
                        await asyncio.sleep(0)
                    task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    torch.testing.assert_close(await task, expected[index], rtol=1e-5, atol=1e-6)
                    num_right += 1

        async with asyncio.timeout(2 * DEADLINE_S):
            await asyncio.gather(*(work(random.Random(seed * 100 + number)) for number in range(NUM_WORKERS)))
        assert num_right >= NUM_WORKERS * NUM_ROUNDS / 2
        async with asyncio.timeout(DEADLINE_S):
            while sum(replica.num_outstanding for replica in pool.replica_times()):
                await asyncio.sleep(0.01)
    finally:
        await pool.close()


async def _run(dispatcher: Dispatcher, asked: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    pending = await dispatcher.scatter(LAYER_ID, *asked)
    return await pending.gather()
