"""Experts that nobody serves are left out where that is allowed: never more than allowed, and always told."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experts.wire import WireFormat
from router.degradation import leave_out
from router.dispatch import Dispatcher, DispatchOptions
from router.errors import ExpertsUnavailable
from router.expert_pool import ExpertPool
from tests.router.in_process import DEADLINE_S, Fault
from tests.router.test_dispatch import Cluster, batch, run, wait_connected, wait_for

# Of 16 experts, group 0 has the first 8.
GROUPS = np.repeat([0, 1], 8)[None]
IDS = np.array([[1, 2, 9, 10], [11, 12, 13, 3], [8, 9, 10, 11]])
WEIGHTS = np.array([[0.1, 0.2, 0.3, 0.4], [0.5, 0.25, 0.125, 0.5], [0.5, 0.5, 0.5, 0.5]], dtype=np.float32)


def test_a_row_keeps_the_sum_of_its_weights() -> None:
    left_out = leave_out(IDS, WEIGHTS, GROUPS, frozenset({0}), most=2)
    assert left_out is not None
    assert left_out.topk_ids.tolist() == [[-1, -1, 9, 10], [11, 12, 13, -1], [8, 9, 10, 11]]
    assert left_out.num_left_out.tolist() == [2, 1, 0]
    np.testing.assert_allclose(left_out.topk_weights.sum(axis=1), WEIGHTS.sum(axis=1), rtol=1e-6)
    np.testing.assert_allclose(left_out.topk_weights[0, 2:], [3 / 7, 4 / 7], rtol=1e-6)
    assert (left_out.topk_weights[2] == WEIGHTS[2]).all()


@pytest.mark.parametrize(
    ("absent", "most"),
    [
        pytest.param({0}, 1, id="a row would lose more than it may"),
        pytest.param({1}, 4, id="a row would lose all it has"),
        pytest.param({7}, 4, id="nobody asks the absent"),
        pytest.param(set[int](), 4, id="nobody is absent"),
    ],
)
def test_then_nothing_is_left_out(absent: set[int], most: int) -> None:
    assert leave_out(IDS, WEIGHTS, GROUPS, frozenset(absent), most) is None


def test_a_choice_that_is_none_is_not_left_out() -> None:
    left_out = leave_out(np.array([[-1, 1, 9, 10]]), WEIGHTS[:1], GROUPS, frozenset({0}), most=1)
    assert left_out is not None and left_out.num_left_out.tolist() == [1]
    np.testing.assert_allclose(left_out.topk_weights[0, 2:].sum(), 0.9, rtol=1e-6)


@pytest.fixture
def cluster(tiny_checkpoint: Path) -> Iterator[Cluster]:
    cluster = Cluster(tiny_checkpoint)
    yield cluster
    cluster.stop()


@pytest.mark.parametrize("way", ["native", "python"])
async def test_the_sum_is_that_of_the_experts_that_are_there(
    cluster: Cluster, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "python":
        monkeypatch.setattr("router.native_scatter.load_library", lambda: None)
    pool = ExpertPool(cluster.config)
    pool.apply(cluster.table())
    options = DispatchOptions(WireFormat.FLOAT32, "reduced", 5.0, expert_wait_s=0.5, max_missing_experts=2)
    degrading, waiting = Dispatcher(pool, options), Dispatcher(pool, replace(options, max_missing_experts=0))
    rows, ids, weights = batch(cluster.config, IDS.tolist())
    weights = torch.from_numpy(WEIGHTS)
    left_out = leave_out(ids.numpy(), WEIGHTS, GROUPS, frozenset({0}), 2)
    assert left_out is not None
    try:
        await wait_connected(pool, 2)
        whole = await run(waiting, (rows, ids, weights))
        assert torch.equal(await run(degrading, (rows, ids, weights)), whole)
        expected = await run(
            waiting, (rows, torch.from_numpy(left_out.topk_ids), torch.from_numpy(left_out.topk_weights))
        )
        # The only replica of group 0 breaks its stream in the middle of a frame, and is gone then.
        dying = cluster.servers[0][0]
        dying.fault, dying.num_faults = Fault.DIE_BEFORE, 1
        pending = await degrading.scatter(1, rows, ids, weights)
        await asyncio.to_thread(dying.stop, 0)
        assert torch.equal(await asyncio.wait_for(pending.gather(), DEADLINE_S), expected)
        assert pending.num_left_out is not None and pending.num_left_out.tolist() == [2, 1, 0]
        await wait_for(lambda: pool.absent_groups() == {0})
        assert torch.equal(await run(degrading, (rows, ids, weights)), expected)
        assert degrading.counters.num_left_out == 6
        # Off by default, and a row that would lose more than it may waits as ever.
        with pytest.raises(ExpertsUnavailable):
            await run(waiting, (rows, ids, weights))
        with pytest.raises(ExpertsUnavailable):
            await run(degrading, batch(cluster.config, [[1, 2, 3, 9]]))
    finally:
        await pool.close()
