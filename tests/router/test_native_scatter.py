"""Frames that the native library sends: the bytes of the planner and the encoder, whatever the gate chose."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from experts import wire
from experts.http2_stream import WINDOW_BYTES, MessageStream, StreamState, make_frame, make_window_update
from experts.kernels.cpu_ffn import load_library
from experts.native_link import NativeLink
from experts.wire import MAX_MESSAGE_BYTES, encode_request, encode_response
from router.dispatch_plan import plan_frames
from router.expert_connection import ExpertConnection
from router.expert_pool import ExpertPool
from router.expert_table import ExpertTable, ReplicaEntry
from router.group_traffic import TrafficBook
from router.native_scatter import Asked, NativeRound, NativeScatter, SentFrame
from router.row_sums import Answer, add_answers
from router.sequence_trace import HopRecorder
from tests.router.in_process import Fault
from tests.router.test_dispatch import LAYER_ID, Cluster, dispatching, run, spread, wait_for

NUM_EXPERTS, HIDDEN = 16, 64
PING = make_frame(6, 0, 0, b"01234567")


class Lender:
    """What a NativeScatter asks of an ExpertConnection, over a socket pair."""

    def __init__(self, number: int) -> None:
        self.replica = ReplicaEntry(f"g{number}-0", "nowhere:1", 1_000 + number, "", "")
        self.near, self.far = socket.socketpair()
        self.near.setblocking(False)
        self.far.settimeout(5)
        for end in (self.near, self.far):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        self.stream = MessageStream(self.near, b"", MAX_MESSAGE_BYTES, knows_settings=True)
        self.link = NativeLink(library())
        state = StreamState(WINDOW_BYTES, WINDOW_BYTES, (1 << 24) - 1, WINDOW_BYTES, 0)
        self.link.open(self.near.fileno(), state)
        self.num_frames = 0
        self.is_lent = False
        self.returned: list[bytes] = []

    def next_frame_id(self) -> int:
        self.num_frames += 1
        return self.num_frames

    def lend(self, borrower: object, frame_id: int) -> NativeLink:
        self.is_lent = True
        return self.link

    def end_loan(self, borrower: object) -> None:
        self.is_lent = False

    def take_back(self) -> None:
        self.is_lent = False
        returned: list[wire.Buffer] = []
        self.link.close_into(self.stream, 0, returned)
        self.returned = [bytes(data) for data in returned]

    def note_answer(self, size_class: int, reply_s: float) -> None:
        assert size_class > 0 and 0 < reply_s < 60

    def answer(self, frame_id: int, rows: torch.Tensor, **overrides: Any) -> None:
        reply = {"frame_id": frame_id, "incarnation": self.replica.incarnation, "tensor": rows} | overrides
        message = encode_response(queue_us=1, compute_us=2, **reply)
        self.far.sendall(make_frame(0, 0, 1, b"\0" + len(message).to_bytes(4, "big") + message))

    def close(self) -> None:
        self.near.close()
        self.far.close()


class Pool:
    def __init__(self, lenders: list[Lender], expert_groups: np.ndarray) -> None:
        self.table = ExpertTable(3, ())
        self.traffic = TrafficBook()
        self.hops = HopRecorder()
        self._lenders, self._expert_groups = lenders, expert_groups

    def sole_connections(self, lane: int = 0) -> list[Lender]:
        return self._lenders

    def expert_groups(self, layer_id: int) -> np.ndarray:
        return self._expert_groups


class Successor:
    """Who goes on; remembers what it got."""

    def __init__(self) -> None:
        self.frames: dict[int, SentFrame] | None = None
        self.num_left_out = None

    def __call__(self, asked: Asked, frames: dict[int, SentFrame]) -> Successor:
        self.frames = frames
        return self

    async def gather(self) -> torch.Tensor:
        return torch.full((1, 1), -1.0)

    def abandon(self) -> None: ...


def library() -> Any:
    found = load_library()
    if found is None:
        pytest.skip("no native library here")
    return found


@pytest.fixture
def lenders() -> Iterator[list[Lender]]:
    lenders = [Lender(number) for number in range(3)]
    yield lenders
    for lender in lenders:
        lender.close()


def choose(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, np.ndarray]:
    """Rows, topk_ids (some -1), topk_weights, and the group of each expert in each turn."""
    chosen = random.Random(seed)
    num_tokens, top_k = chosen.choice([1, 1, 2, 5, 33]), chosen.choice([1, 2, 4])
    ids = torch.tensor([chosen.sample(range(NUM_EXPERTS), top_k) for _ in range(num_tokens)])
    if chosen.random() < 0.3:
        ids[torch.rand(ids.shape) < 0.2] = -1
    rows = torch.randn(num_tokens, HIDDEN).to(torch.bfloat16)
    num_turns = chosen.choice([1, 1, 2, 16])
    groups = np.array([[chosen.randrange(3) for _ in range(NUM_EXPERTS)] for _ in range(num_turns)], dtype=np.int64)
    return rows, ids, torch.rand(num_tokens, top_k), groups


def make_scatter(lenders: list[Lender], groups: np.ndarray, go_on: Successor) -> NativeScatter:
    pool = cast(ExpertPool, Pool(lenders, groups))
    return NativeScatter(library(), pool, torch.bfloat16, torch.bfloat16, 5.0, cast(Any, go_on))


@pytest.mark.parametrize("seed", range(30))
async def test_bytes_and_sums_are_those_of_planner_encoder_and_row_sums(lenders: list[Lender], seed: int) -> None:
    torch.manual_seed(seed)
    rows, ids, weights, groups = choose(seed)
    pending = make_scatter(lenders, groups, Successor()).send(LAYER_ID, rows, ids, weights, 5.0)
    assert pending is not None
    frames = plan_frames(ids.numpy(), weights.numpy(), groups)
    assert pending.num_frames == len(frames)
    answers: list[Answer] = []
    for frame in frames:
        lender = lenders[frame.group_index]
        expected = encode_request(
            frame_id=1,
            incarnation=lender.replica.incarnation,
            table_version=3,
            layer_id=LAYER_ID,
            hidden_states=rows[torch.from_numpy(frame.row_ids)],
            pair_rows=frame.pair_rows,
            pair_experts=frame.pair_experts,
            pair_weights=frame.pair_weights,
            exact=False,
            deadline_ms=5_000,
            reply_dtype=torch.bfloat16,
        )
        data = make_frame(0, 0, 1, b"\0" + len(expected).to_bytes(4, "big") + expected)
        assert lender.far.recv(len(data) + 1, socket.MSG_WAITALL | socket.MSG_DONTWAIT) == data
        answer = torch.randn(len(frame.row_ids), HIDDEN).to(torch.bfloat16)
        lender.far.sendall(make_window_update(0, 77))
        lender.answer(1, answer)
        answers.append(Answer(answer, frame.row_ids))
    assert torch.equal(await pending.gather(), add_answers(answers, len(rows), HIDDEN))
    assert not any(lender.is_lent for lender in lenders)


@pytest.mark.parametrize(
    "overrides",
    [{"frame_id": 9}, {"incarnation": 5}, {"dtype": torch.float32}, {"rows": torch.ones(2, HIDDEN)}, {"ping": True}],
    ids=lambda overrides: next(iter(overrides)),
)
async def test_whatever_else_is_answered_goes_to_who_goes_on(lenders: list[Lender], overrides: dict[str, Any]) -> None:
    rows, ids = torch.ones(1, HIDDEN, dtype=torch.bfloat16), torch.tensor([[1, 2]])
    successor = Successor()
    groups = np.array([[0, 1, 2] * 6], dtype=np.int64)
    pending = make_scatter(lenders, groups, successor).send(LAYER_ID, rows, ids, torch.ones(1, 2), 5.0)
    assert pending is not None and pending.num_frames == 2
    lenders[1].answer(1, rows)
    if "ping" in overrides:
        lenders[2].far.sendall(PING)
    else:
        lenders[2].answer(**({"frame_id": 1, "rows": rows} | overrides))
    assert (await pending.gather()).item() == -1
    frames = successor.frames
    assert frames is not None and set(frames) == {1, 2}
    answered = frames[1].answer
    # Of what came together, either may have been looked at first.
    assert answered is None or torch.equal(answered, rows)
    assert frames[2].answer is None
    assert len(lenders[2].returned) == ("ping" not in overrides)


async def test_rows_that_are_not_finite_are_left_to_who_goes_on(lenders: list[Lender]) -> None:
    rows, ids = torch.ones(1, HIDDEN, dtype=torch.bfloat16), torch.tensor([[1]])
    successor = Successor()
    pending = make_scatter(lenders, np.ones((1, 16), dtype=np.int64), successor).send(
        LAYER_ID, rows, ids, torch.ones(1, 1), 5.0
    )
    assert pending is not None
    lenders[1].answer(1, rows * torch.inf)
    assert (await pending.gather()).item() == -1
    assert successor.frames is not None and successor.frames[1].answer is not None


async def test_an_expert_that_nobody_serves_and_a_full_window_send_nothing(lenders: list[Lender]) -> None:
    rows, ids = torch.ones(1, HIDDEN, dtype=torch.bfloat16), torch.tensor([[0, 1]])
    groups = np.array([[0, -1]], dtype=np.int64)
    assert make_scatter(lenders, groups, Successor()).send(LAYER_ID, rows, ids, torch.ones(1, 2), 5.0) is None
    lenders[1].link.open(lenders[1].near.fileno(), StreamState(10, 10, 1 << 20, WINDOW_BYTES, 0))
    groups = np.array([[0, 1]], dtype=np.int64)
    assert make_scatter(lenders, groups, Successor()).send(LAYER_ID, rows, ids, torch.ones(1, 2), 5.0) is None
    for lender in lenders:
        assert not lender.is_lent
        lender.far.setblocking(False)
        with pytest.raises(BlockingIOError):
            lender.far.recv(1)


async def test_scatters_of_several_tasks_at_once_each_get_their_own_sums(tiny_checkpoint: Path) -> None:
    """The second needs the streams that the first has; both go on."""
    cluster = Cluster(tiny_checkpoint)
    try:
        async with dispatching(cluster) as (dispatcher, pool):
            asked = [spread(cluster.config) for _ in range(6)]
            alone = [await run(dispatcher, one) for one in asked]
            assert all(isinstance(c, ExpertConnection) and c.is_idle for c in pool.sole_connections() or [])
            for _ in range(3):
                found = await asyncio.gather(*(run(dispatcher, one) for one in asked))
                assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))
    finally:
        cluster.stop()


async def test_rounds_at_the_same_time_have_lanes(tiny_checkpoint: Path) -> None:
    """Each has its streams; a broken one or a table without the replica takes its lanes along, and loses nothing."""
    library()
    cluster = Cluster(tiny_checkpoint)
    try:
        async with dispatching(cluster) as (dispatcher, pool):
            asked = spread(cluster.config)
            expected = await run(dispatcher, asked)
            for fault in (None, Fault.DIE_BEFORE, None):
                await wait_for(lambda: pool.sole_connections(1) is not None)
                cluster.servers[0][0].fault, cluster.servers[0][0].num_faults = fault, int(fault is not None)
                tasks = [asyncio.create_task(dispatcher.scatter(LAYER_ID, *asked)) for _ in range(2)]
                rounds = await asyncio.gather(*tasks)
                assert all(isinstance(one, NativeRound) for one in rounds)
                for one in rounds:
                    assert torch.equal(await one.gather(), expected)
            assert dispatcher.counters.num_retries >= 1
            lanes = pool.sole_connections(1)
            assert lanes is not None
            pool.apply(ExpertTable(2, ()))
            assert pool.sole_connections(1) is None
            await wait_for(lambda: not any(connection.ready for connection in lanes))
    finally:
        cluster.stop()


async def test_what_a_replica_was_sent_is_counted_over_its_lanes(tiny_checkpoint: Path) -> None:
    library()
    cluster = Cluster(tiny_checkpoint)
    try:
        async with dispatching(cluster) as (dispatcher, pool):
            asked = spread(cluster.config)
            await run(dispatcher, asked)
            await wait_for(lambda: pool.sole_connections(1) is not None)
            before = [replica.num_frames for replica in pool.replica_times()]
            await asyncio.gather(*(run(dispatcher, asked) for _ in range(2)))
            assert [replica.num_frames for replica in pool.replica_times()] == [number + 2 for number in before]
    finally:
        cluster.stop()
