"""What is counted of each group's traffic, by the native library and by the dispatcher alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from experts.wire import encode_request
from router.dispatch_plan import plan_frames
from router.group_traffic import FIRST_BOUND_US, LATENCY_BOUNDS_S, NUM_BUCKETS, GroupTraffic, find_bucket
from tests.router.in_process import Fault
from tests.router.test_dispatch import LAYER_ID, Cluster, dispatching, run, spread, wait_connected

NUM_ROUNDS = 5


@pytest.fixture
def cluster(tiny_checkpoint: Path) -> Iterator[Cluster]:
    cluster = Cluster(tiny_checkpoint)
    yield cluster
    cluster.stop()


@pytest.mark.parametrize("way", ["native", "python"])
async def test_frames_rows_pairs_and_bytes_are_those_of_the_plan(
    cluster: Cluster, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "python":
        monkeypatch.setattr("router.native_scatter.load_library", lambda: None)
    hidden_states, topk_ids, topk_weights = asked = spread(cluster.config)
    async with dispatching(cluster) as (dispatcher, pool):
        await wait_connected(pool, 2)
        frames = plan_frames(topk_ids.numpy(), topk_weights.numpy(), pool.expert_groups(LAYER_ID))
        for _ in range(NUM_ROUNDS):
            await run(dispatcher, asked)
        traffic = pool.traffic.read()
        assert pool.traffic.read() == traffic
        for frame in frames:
            counted = traffic[f"g{frame.group_index}"]
            message = encode_request(
                frame_id=1,
                incarnation=pool.table.groups[frame.group_index].replicas[0].incarnation,
                table_version=1,
                layer_id=LAYER_ID,
                hidden_states=hidden_states[frame.row_ids],
                pair_rows=frame.pair_rows,
                pair_experts=frame.pair_experts,
                pair_weights=frame.pair_weights,
                exact=False,
                deadline_ms=5000,
                reply_dtype=hidden_states.dtype,
            )
            assert counted.num_frames == NUM_ROUNDS
            assert counted.num_rows == NUM_ROUNDS * len(frame.row_ids)
            assert counted.num_pairs == NUM_ROUNDS * len(frame.pair_rows)
            # The deadline that a frame carries may take a byte less.
            assert counted.sent_bytes == pytest.approx(NUM_ROUNDS * len(message), abs=NUM_ROUNDS)
            assert counted.received_bytes == NUM_ROUNDS * len(frame.row_ids) * cluster.config.hidden_size * 4
            assert sum(counted.latency_counts) == NUM_ROUNDS
            assert 0 < counted.latency_us < NUM_ROUNDS * 5e6


async def test_a_repeated_frame_counts_twice_and_as_a_retry_of_its_group(cluster: Cluster) -> None:
    server = cluster.servers[1][0]
    server.fault, server.num_faults = Fault.OVERLOADED, 1
    async with dispatching(cluster) as (dispatcher, pool):
        await run(dispatcher, spread(cluster.config))
        traffic = pool.traffic.read()
    assert traffic["g1"].num_retries == 1
    assert traffic["g1"].num_frames == 2
    assert sum(traffic["g1"].latency_counts) == 1
    assert traffic["g0"].num_retries == 0


def test_a_bucket_holds_what_its_bound_says() -> None:
    for index in range(NUM_BUCKETS - 1):
        bound_us = FIRST_BOUND_US << index
        assert find_bucket(bound_us) == index
        assert find_bucket(bound_us + 1) == index + 1
        assert LATENCY_BOUNDS_S[index] == bound_us / 1e6
    assert find_bucket(0) == 0
    assert find_bucket(10**12) == NUM_BUCKETS - 1
    traffic = GroupTraffic()
    traffic.count_answer(10, 0.0001)
    assert (traffic.latency_us, traffic.latency_counts[1]) == (100, 1)
