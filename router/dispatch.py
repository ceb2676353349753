"""Scatter a layer's rows to the expert groups and gather their weighted sums.

An expert call is pure, so a frame that a replica fails is simply sent to another, and a layer whose plan no longer
fits the expert table is planned again. Sums are added in the table's group order (reduced) or in ascending expert id
(exact), never in the order of arrival.
"""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from experts.activation_quantization import QuantizedRows, quantize_rows
from experts.wire import Buffer, ComputeReply, ComputeStatus, WireFormat, compute_max_rows, encode_request_parts
from router.degradation import LeftOut, leave_out
from router.dispatch_counters import DispatchCounters
from router.dispatch_plan import GroupFrame, compute_turns, plan_frames, split_frame
from router.errors import (
    BadReply,
    CallTimeout,
    ConnectionLost,
    ExpertsUnavailable,
    FrameRefused,
    ReplicaError,
    ReplicaRefused,
    RouterError,
    TableChanged,
)
from router.expert_connection import FIRST_RETRY_S, LAST_RETRY_S, ExpertConnection
from router.expert_pool import ExpertPool
from router.native_scatter import Asked, Gather, NativeRound, SentFrame, make_native_scatter
from router.reply_times import get_size_class
from router.row_sums import Answer, add_answers
from router.sequence_trace import Hop

CombineMode = Literal["reduced", "exact"]

# Of an attempt that starts just before the deadline of its layer: less would only waste the replica's work.
LEAST_TIMEOUT_S = 1.0
# Copies of frames, for stragglers or to measure a replica: at most this share of all frames, saved up to so many.
HEDGE_SHARE = 0.1
MAX_SAVED_HEDGES = 16.0
# A reply is never late before this: what the event loop and the scheduler of the machine add varies by as much.
LEAST_HEDGE_S = 0.002
# Larger batches take so long that what the interpreter adds does not matter, and may need more than a message a group.
NATIVE_ROWS = 512

ReplyOrError = ComputeReply | ReplicaError


@dataclass(frozen=True)
class DispatchOptions:
    """wire_format: of activations, out and back. call_timeout_s: for one attempt of one frame.
    expert_wait_s: for a group without a usable replica, all attempts together. max_missing_experts: of a token, that
    are left out instead of waited for; see router/degradation.py."""

    wire_format: WireFormat
    combine: CombineMode
    call_timeout_s: float
    expert_wait_s: float
    max_missing_experts: int = 0


class PostedFrame(NamedTuple):
    """A frame on its way. sent_s, hedge_s, deadline_s: of time.monotonic; hedge_s: from when on another replica
    shall be asked as well; None: never."""

    connection: ExpertConnection
    frame_id: int
    sent_s: float
    hedge_s: float | None
    deadline_s: float


class Dispatcher:
    """Implements decoder_layer.ExpertDispatcher over an ExpertPool. Safe for several scatters at once on one loop."""

    def __init__(self, pool: ExpertPool, options: DispatchOptions) -> None:
        self._pool = pool
        self._options = options
        self._saved_hedges = MAX_SAVED_HEDGES
        request_dtype, reply_dtype = options.wire_format.request_dtype, options.wire_format.reply_dtype
        self._native = (
            make_native_scatter(pool, request_dtype, reply_dtype, options.call_timeout_s, self._go_on)
            if options.combine == "reduced"
            else None
        )

    async def scatter(
        self, layer_id: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> PendingGather | NativeRound:
        """hidden_states: [num_tokens, hidden_size]; topk_ids int64 and topk_weights float32: [num_tokens, top_k]."""
        options = self._options
        if self._native is not None and hidden_states.shape[0] <= NATIVE_ROWS:
            rows = hidden_states.to(options.wire_format.request_dtype)
            timeout_s = min(options.call_timeout_s, max(options.expert_wait_s, LEAST_TIMEOUT_S))
            sent = self._native.send(layer_id, rows, topk_ids, topk_weights, timeout_s)
            if sent is not None:
                self.counters.num_frames += sent.num_frames
                return sent
        layer = self._make_layer(
            layer_id,
            to_wire(hidden_states, options.wire_format),
            topk_ids,
            topk_weights,
            asyncio.get_running_loop().time(),
        )
        pending = PendingGather(self, layer)
        pending.start()
        # The caller computes on this thread next, and nobody else writes what the sockets have not taken yet.
        try:
            await pending.wait_sent()
        except asyncio.CancelledError:
            pending.abandon()
            raise
        return pending

    def _make_layer(
        self,
        layer_id: int,
        rows: Tensor | QuantizedRows,
        topk_ids: Tensor,
        topk_weights: Tensor,
        started_s: float,
    ) -> _Layer:
        num_tokens, hidden_size = (rows.values if isinstance(rows, QuantizedRows) else rows).shape
        return _Layer(
            layer_id=layer_id,
            hidden_states=rows,
            num_tokens=num_tokens,
            hidden_size=hidden_size,
            topk_ids=topk_ids.numpy(),
            topk_weights=topk_weights.numpy(),
            deadline=started_s + self._options.expert_wait_s,
        )

    def _go_on(self, asked: Asked, frames: dict[int, SentFrame]) -> Gather:
        """With a round that is not one for the native library any more."""
        layer = self._make_layer(
            asked.layer_id, asked.hidden_states, asked.topk_ids, asked.topk_weights, asked.started_s
        )
        pending = PendingGather(self, layer)
        pending.adopt(frames, asked)
        return pending

    def leave_out(self, layer: _Layer) -> LeftOut | None:
        """What a layer does without now, where that is allowed."""
        most = self._options.max_missing_experts
        absent = self._pool.absent_groups() if most else frozenset[int]()
        if not absent:
            return None
        return leave_out(layer.topk_ids, layer.topk_weights, self._pool.expert_groups(layer.layer_id), absent, most)

    def plan(self, layer: _Layer, left_out: LeftOut | None = None) -> list[GroupFrame]:
        """Raises TableChanged when the table in force does not host every chosen expert."""
        groups = self._pool.expert_groups(layer.layer_id)
        try:
            if left_out is None:
                frames = plan_frames(layer.topk_ids, layer.topk_weights, groups)
            else:
                turns = compute_turns(layer.topk_weights, len(groups))
                frames = plan_frames(left_out.topk_ids, left_out.topk_weights, groups, turns)
        except LookupError as error:
            raise TableChanged(str(error)) from error
        max_rows = compute_max_rows(
            layer.hidden_size,
            layer.topk_ids.shape[1],
            self._options.wire_format,
            exact=self._options.combine == "exact",
        )
        return [part for frame in frames for part in split_frame(frame, max_rows)]

    @property
    def counters(self) -> DispatchCounters:
        return self._pool.counters

    def post(
        self,
        layer: _Layer,
        frame: GroupFrame,
        group_name: str,
        on_done: Callable[[PostedFrame, ReplyOrError], None],
        avoid: Sequence[ExpertConnection] = (),
    ) -> PostedFrame | None:
        """Send a frame to the replica that will be done with it first. None if no replica of the group is connected,
        other than those to avoid."""
        size_class = get_size_class(len(frame.pair_rows))
        while True:
            connection = self._pool.pick(group_name, size_class, avoid)
            if connection is None:
                return None
            try:
                return self._post_to(connection, layer, frame, group_name, on_done)
            except ConnectionLost:  # it is not ready any more, so another is picked
                continue

    def post_copy(
        self,
        layer: _Layer,
        frame: GroupFrame,
        group_name: str,
        on_done: Callable[[PostedFrame, ReplyOrError], None],
        first: PostedFrame,
    ) -> PostedFrame | None:
        """Send a late frame to another replica as well. None if there is none, or the budget is spent."""
        if self._saved_hedges < 1:
            return None
        copy = self.post(layer, frame, group_name, on_done, [first.connection])
        if copy is not None:
            self._saved_hedges -= 1
            self.counters.num_hedges += 1
            self._pool.traffic.of(group_name).num_hedges += 1
        return copy

    def measure(
        self,
        layer: _Layer,
        frame: GroupFrame,
        group_name: str,
        on_done: Callable[[PostedFrame, ReplyOrError], None],
        first: PostedFrame,
    ) -> PostedFrame | None:
        """Send a copy to a replica that was too slow to get any and may have recovered, if there is one."""
        if self._saved_hedges < 1:
            return None
        size_class = get_size_class(len(frame.pair_rows))
        connection = self._pool.pick_unmeasured(group_name, size_class, first.connection)
        if connection is None:
            return None
        self._saved_hedges -= 1
        self.counters.num_probes += 1
        return self._post_to(connection, layer, frame, group_name, on_done)

    def _post_to(
        self,
        connection: ExpertConnection,
        layer: _Layer,
        frame: GroupFrame,
        group_name: str,
        on_done: Callable[[PostedFrame, ReplyOrError], None],
    ) -> PostedFrame:
        """Raises ConnectionLost."""
        self.counters.num_frames += 1
        self._saved_hedges = min(MAX_SAVED_HEDGES, self._saved_hedges + HEDGE_SHARE)
        size_class = get_size_class(len(frame.pair_rows))
        late_s = self._pool.late_point(group_name, size_class).late_s
        now_s = time.monotonic()
        timeout_s = self.first_timeout_s(layer)
        posted = PostedFrame(
            connection,
            connection.next_frame_id(),
            now_s,
            None if late_s is None else now_s + max(late_s, LEAST_HEDGE_S),
            now_s + timeout_s,
        )
        data = self._encode(connection, posted.frame_id, layer, frame, timeout_s)
        self._count_frame(group_name, frame, data)
        connection.post(posted.frame_id, data, lambda outcome: on_done(posted, outcome), size_class)
        return posted

    def note_answer(
        self, posted: PostedFrame, layer: _Layer, frame: GroupFrame, group_name: str, reply: Tensor
    ) -> None:
        """It was the first good one."""
        if self._pool.hops.is_on:
            replica_id, num_pairs = posted.connection.replica.replica_id, len(frame.pair_rows)
            self._pool.hops.note(
                Hop(layer.layer_id, group_name, replica_id, num_pairs, posted.sent_s, time.monotonic())
            )
        reply_s = time.monotonic() - posted.sent_s
        self._count_answer(group_name, reply, reply_s)
        self._pool.late_point(group_name, get_size_class(len(frame.pair_rows))).record(reply_s)

    def first_timeout_s(self, layer: _Layer) -> float:
        """What an attempt that starts now may take."""
        remaining_s = layer.deadline - asyncio.get_running_loop().time()
        return min(self._options.call_timeout_s, max(remaining_s, LEAST_TIMEOUT_S))

    async def call_group(
        self, layer: _Layer, frame: GroupFrame, group_name: str, failed: list[ExpertConnection]
    ) -> Tensor:
        """One frame to whichever replica of the group answers it first without fault; failed: those that did not.

        Returns [num_rows, hidden_size] (reduced) or [num_pairs, hidden_size] (exact), see ComputeReply.tensor.
        Raises ExpertsUnavailable when expert_wait_s is over and no connected replica is untried (a silent one may have
        taken all that time), TableChanged when the frame must be planned again, FrameRefused.
        """
        retry_s = FIRST_RETRY_S
        while True:
            size_class = get_size_class(len(frame.pair_rows))
            connection = await self._pool.acquire(group_name, size_class, failed, layer.deadline)
            timeout_s = self.first_timeout_s(layer)
            self.counters.num_frames += 1
            try:
                frame_id = connection.next_frame_id()
                data = self._encode(connection, frame_id, layer, frame, timeout_s)
                self._count_frame(group_name, frame, data)
                sent_s = time.monotonic()
                reply = await connection.call(frame_id, data, timeout_s, size_class)
                tensor = self.check_reply(connection, layer, frame, reply)
                self._count_answer(group_name, tensor, time.monotonic() - sent_s)
                return tensor
            except ReplicaError as error:
                self.note_failure(layer, group_name, [*failed, connection], error)
                if connection in failed:  # every replica has failed it: ask again, but not in a hot loop
                    await asyncio.sleep(retry_s)
                    retry_s = min(LAST_RETRY_S, retry_s * 2)
                failed.append(connection)

    def note_failure(
        self, layer: _Layer, group_name: str, failed: Sequence[ExpertConnection], error: ReplicaError
    ) -> None:
        """Count it. Raises ExpertsUnavailable if it was the last attempt that the layer's deadline allows."""
        self.counters.count_error(error)
        self.counters.num_retries += 1
        self._pool.traffic.of(group_name).num_retries += 1
        if asyncio.get_running_loop().time() >= layer.deadline and not self._pool.has_other(group_name, failed):
            raise ExpertsUnavailable(f"expert group {group_name}: {error}") from error

    def check_reply(
        self, connection: ExpertConnection, layer: _Layer, frame: GroupFrame, reply: ComputeReply
    ) -> Tensor:
        """The tensor of an answer that is one. Raises TableChanged, FrameRefused, ReplicaRefused or BadReply."""
        if reply.status is ComputeStatus.NOT_HOSTED:
            raise TableChanged(reply.message)
        if reply.status is ComputeStatus.BAD_REQUEST:
            raise FrameRefused(f"replica {connection.replica.replica_id}: {reply.message}")
        num_rows = len(frame.pair_rows) if self._options.combine == "exact" else len(frame.row_ids)
        expected = (num_rows, layer.hidden_size)
        if reply.status is not ComputeStatus.OK or reply.tensor is None:
            raise ReplicaRefused(f"replica {connection.replica.replica_id}: {reply.status.name}: {reply.message}")
        if tuple(reply.tensor.shape) != expected or reply.dtype != self._options.wire_format.reply_dtype:
            error = BadReply(
                f"replica {connection.replica.replica_id}: got {tuple(reply.tensor.shape)} {reply.dtype}, "
                f"expected {expected} {self._options.wire_format.reply_dtype}"
            )
            connection.drop(error)
            raise error
        return reply.tensor

    def _count_frame(self, group_name: str, frame: GroupFrame, data: Sequence[Buffer]) -> None:
        self._pool.traffic.of(group_name).count_frame(
            len(frame.row_ids), len(frame.pair_rows), sum(len(part) for part in data)
        )

    def _count_answer(self, group_name: str, reply: Tensor, reply_s: float) -> None:
        size_bytes = reply.numel() * self._options.wire_format.reply_dtype.itemsize
        self._pool.traffic.of(group_name).count_answer(size_bytes, reply_s)

    def _encode(
        self, connection: ExpertConnection, frame_id: int, layer: _Layer, frame: GroupFrame, timeout_s: float
    ) -> list[Buffer]:
        return encode_request_parts(
            frame_id=frame_id,
            incarnation=connection.replica.incarnation,
            table_version=self._pool.table.version,
            layer_id=layer.layer_id,
            hidden_states=layer.rows(frame.row_ids),
            pair_rows=frame.pair_rows,
            pair_experts=frame.pair_experts,
            pair_weights=frame.pair_weights,
            exact=self._options.combine == "exact",
            deadline_ms=int(timeout_s * 1000),
            reply_dtype=self._options.wire_format.reply_dtype,
        )

    def combine(self, layer: _Layer, frames: list[GroupFrame], replies: list[Tensor]) -> Tensor:
        """[num_tokens, hidden_size] float32."""
        num_tokens, hidden_size = layer.num_tokens, layer.hidden_size
        if self._options.combine == "exact":
            top_k = layer.topk_ids.shape[1]
            rows = torch.zeros(num_tokens * top_k, hidden_size, dtype=torch.float32)
            for frame, reply in zip(frames, replies, strict=True):
                rows[torch.from_numpy(frame.pair_slots)] = reply.float()
            by_rank = rows.view(num_tokens, top_k, hidden_size)
            total = by_rank[:, 0].clone()
            for rank in range(1, top_k):
                total += by_rank[:, rank]
            return total
        answers = [
            Answer(reply, None if len(frame.row_ids) == num_tokens else frame.row_ids)
            for frame, reply in zip(frames, replies, strict=True)
        ]
        return add_answers(answers, num_tokens, hidden_size)

    @property
    def pool(self) -> ExpertPool:
        return self._pool


class PendingGather:
    """The frames of one scatter. gather() is awaited exactly once, by the trunk.

    As long as every replica answers there is no task, and one timer for all frames: replies come in by callback. A
    frame that fails is sent elsewhere at once; a task waits where there is no replica to send it to. A table that
    changed has the layer planned again.
    """

    def __init__(self, dispatcher: Dispatcher, layer: _Layer) -> None:
        self._dispatcher = dispatcher
        self._layer = layer
        self._loop = asyncio.get_running_loop()
        self._finished: asyncio.Future[None] = self._loop.create_future()
        self._table_version = 0
        self._left_out: LeftOut | None = None
        self._frames: list[GroupFrame] = []
        self._group_names: list[str] = []
        self._replies: list[Tensor | None] = []
        self._answered_by: list[ExpertConnection | None] = []
        self._num_missing = 0
        # By frame: what was sent and not answered, and a copy of it at another replica.
        self._posted: dict[int, PostedFrame] = {}
        self._copies: dict[int, PostedFrame] = {}
        # By frame: the replicas that did not answer, or not well.
        self._failed: dict[int, list[ExpertConnection]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Plan by the table in force and send every frame."""
        table = self._dispatcher.pool.table
        self._table_version = table.version
        self._failed.clear()
        self._left_out = self._dispatcher.leave_out(self._layer)
        try:
            self._frames = self._dispatcher.plan(self._layer, self._left_out)
        except TableChanged as error:
            self._plan_again(error)
            return
        self._group_names = [table.group_names[frame.group_index] for frame in self._frames]
        self._replies = [None] * len(self._frames)
        self._answered_by = [None] * len(self._frames)
        self._num_missing = len(self._frames)
        if not self._frames:
            self._finished.set_result(None)
        frames = self._frames
        for index in range(len(frames)):
            self._send(index)
            if self._frames is not frames:  # it began anew, without experts that are missing
                return
        self._set_timer()

    def adopt(self, sent: dict[int, SentFrame], asked: Asked) -> None:
        """Instead of start(): go on with frames, by their groups, that are on their way or answered."""
        table = self._dispatcher.pool.table
        if table.version != asked.table_version:
            for frame in sent.values():
                if frame.answer is None:
                    frame.connection.expect(frame.frame_id, None)
            self.start()
            return
        self._table_version = table.version
        self._frames = self._dispatcher.plan(self._layer)
        self._group_names = [table.group_names[frame.group_index] for frame in self._frames]
        self._replies = [None] * len(self._frames)
        self._answered_by = [None] * len(self._frames)
        self._num_missing = len(self._frames)
        timeout_s = self._dispatcher.first_timeout_s(self._layer)
        for index, frame in enumerate(self._frames):
            connection, frame_id, answer = sent[frame.group_index]
            if answer is not None:
                self._accept(index, answer, connection)
                continue
            posted = PostedFrame(connection, frame_id, asked.started_s, None, asked.started_s + timeout_s)
            self._posted[index] = posted
            on_done = functools.partial(self._on_done, index, posted)
            if connection.ready:
                connection.expect(frame_id, on_done, get_size_class(len(frame.pair_rows)))
            else:
                self._loop.call_soon(
                    on_done, ConnectionLost(f"replica {connection.replica.replica_id} is not connected")
                )
        self._set_timer()

    async def wait_sent(self) -> None:
        """Until the frames are on their way, or a short time."""
        for posted in list(self._posted.values()):
            if not posted.connection.is_flushed:
                await posted.connection.wait_flushed()

    async def gather(self) -> Tensor:
        """[num_tokens, hidden_size] float32. Raises ExpertsUnavailable."""
        try:
            while True:
                await self._finished
                replies = [reply for reply in self._replies if reply is not None]
                total = self._dispatcher.combine(self._layer, self._frames, replies)
                # One pass, in which anything that is not finite shows.
                if math.isfinite(total.sum().item()) or not self._ask_again():
                    if self._left_out is not None:
                        self._dispatcher.counters.num_left_out += int(self._left_out.num_left_out.sum())
                    return total
        finally:
            self._stop()

    @property
    def num_left_out(self) -> npt.NDArray[np.int32] | None:
        """[num_tokens]: experts of each row that the gathered sum does without; None: of none."""
        return None if self._left_out is None else self._left_out.num_left_out

    def abandon(self) -> None:
        """Instead of gather(): nobody wants the result any more."""
        self._stop()
        self._finished.cancel()

    def _send(self, index: int) -> None:
        """To the best replica that has not failed the frame; where there is none, a task waits for one."""
        failed = self._failed.get(index, [])
        frame, name = self._frames[index], self._group_names[index]
        on_done = functools.partial(self._on_done, index)
        posted = self._dispatcher.post(self._layer, frame, name, on_done, failed)
        if posted is None and self._left_out is None and self._dispatcher.leave_out(self._layer) is not None:
            self._stop()
            self.start()
            return
        if posted is None:
            self._start_task(self._call_group(index, failed))
            return
        self._posted[index] = posted
        copy = None if failed else self._dispatcher.measure(self._layer, frame, name, on_done, posted)
        if copy is not None:
            self._copies[index] = copy

    def _ask_again(self) -> bool:
        """Have frames computed elsewhere whose answers are not finite although what was sent is. False if there is none
        whose answer was not confirmed already: then it is what the weights make of the rows."""
        suspects: list[int] = []
        for index, (frame, reply) in enumerate(zip(self._frames, self._replies, strict=True)):
            is_first = self._answered_by[index] is not None and index not in self._failed
            if reply is not None and is_first and not self._layer.explains(frame, reply):
                suspects.append(index)
        if not suspects:
            return False
        self._finished = self._loop.create_future()
        self._num_missing = len(suspects)
        for index in suspects:
            connection = self._answered_by[index]
            assert connection is not None
            self._replies[index] = None
            error = BadReply(f"replica {connection.replica.replica_id} answered with numbers that are not finite")
            connection.drop(error)
            self._take_elsewhere(index, connection, error)
        self._set_timer()
        return True

    def _on_done(self, index: int, posted: PostedFrame, outcome: ReplyOrError) -> None:
        first, copy = self._posted.get(index), self._copies.get(index)
        if posted is not first and posted is not copy:
            return
        try:
            if isinstance(outcome, ReplicaError):
                raise outcome
            reply = self._dispatcher.check_reply(posted.connection, self._layer, self._frames[index], outcome)
        except ReplicaError as error:
            self._lose(index, posted, error)
        except TableChanged as error:
            self._plan_again(error)
        except FrameRefused as error:
            self._fail(error)
        else:
            del self._posted[index]
            self._dispatcher.note_answer(posted, self._layer, self._frames[index], self._group_names[index], reply)
            if copy is not None and first is not None:
                del self._copies[index]
                other = first if posted is copy else copy
                other.connection.leave_behind(other.frame_id)
                self._dispatcher.counters.num_hedges_won += posted is copy
            self._accept(index, reply, posted.connection)

    def _lose(self, index: int, posted: PostedFrame, error: ReplicaError) -> None:
        """An attempt failed; where a copy is on its way that is the attempt now."""
        copy = self._copies.pop(index, None)
        if copy is None:
            del self._posted[index]
            self._take_elsewhere(index, posted.connection, error)
            self._set_timer()
            return
        self._dispatcher.counters.count_error(error)
        self._dispatcher.counters.num_retries += 1
        self._dispatcher.pool.traffic.of(self._group_names[index]).num_retries += 1
        self._failed.setdefault(index, []).append(posted.connection)
        if posted is not copy:
            self._posted[index] = copy

    def _accept(self, index: int, reply: Tensor, connection: ExpertConnection | None) -> None:
        self._replies[index] = reply
        self._answered_by[index] = connection
        self._num_missing -= 1
        if self._num_missing == 0 and not self._finished.done():
            self._finished.set_result(None)

    def _fail(self, error: BaseException) -> None:
        if not self._finished.done():
            self._finished.set_exception(error)

    def _set_timer(self) -> None:
        """For whatever is due next of what is on its way."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._posted:
            return
        now_s = time.monotonic()
        next_s = math.inf
        for index, posted in self._posted.items():
            next_s = min(next_s, posted.deadline_s)
            if posted.hedge_s is not None and index not in self._copies:
                # Where nobody else can be asked now, or the budget is spent: look again after as long.
                again_s = now_s + max(posted.hedge_s - posted.sent_s, LEAST_HEDGE_S)
                next_s = min(next_s, posted.hedge_s if posted.hedge_s > now_s else again_s)
        self._timer = self._loop.call_later(max(0.0, next_s - now_s), self._look)

    def _look(self) -> None:
        """Something is due: a copy to another replica, or the end of an attempt."""
        self._timer = None
        # This loop may have been busy, and the answers may lie in the sockets.
        for posted in list(self._posted.values()):
            posted.connection.read_now()
        now_s = time.monotonic()
        for index, posted in list(self._posted.items()):
            if self._posted.get(index) is not posted:
                continue
            if now_s >= posted.deadline_s:
                self._time_out(index, posted)
            elif posted.hedge_s is not None and now_s >= posted.hedge_s and index not in self._copies:
                on_done = functools.partial(self._on_done, index)
                copy = self._dispatcher.post_copy(
                    self._layer, self._frames[index], self._group_names[index], on_done, posted
                )
                if copy is not None:
                    self._copies[index] = copy
        if not self._finished.done():
            self._set_timer()

    def _time_out(self, index: int, posted: PostedFrame) -> None:
        """The time of an attempt, and of its copy, is over."""
        del self._posted[index]
        copy = self._copies.pop(index, None)
        if copy is not None:
            copy.connection.forget(copy.frame_id)
            self._failed.setdefault(index, []).append(copy.connection)
        posted.connection.forget(posted.frame_id)
        replica_id = posted.connection.replica.replica_id
        self._take_elsewhere(index, posted.connection, CallTimeout(f"replica {replica_id} did not answer in time"))

    def _take_elsewhere(self, index: int, connection: ExpertConnection, error: ReplicaError) -> None:
        failed = self._failed.setdefault(index, [])
        failed.append(connection)
        try:
            self._dispatcher.note_failure(self._layer, self._group_names[index], failed, error)
        except ExpertsUnavailable as unavailable:
            self._fail(unavailable)
        else:
            self._send(index)

    async def _call_group(self, index: int, failed: list[ExpertConnection]) -> None:
        name = self._group_names[index]
        try:
            reply = await self._dispatcher.call_group(self._layer, self._frames[index], name, failed)
        except TableChanged as error:
            self._plan_again(error)
        except RouterError as error:
            self._fail(error)
        else:
            self._accept(index, reply, None)

    def _plan_again(self, error: TableChanged) -> None:
        """Drop everything of this plan, wait for a newer table, start over."""
        self._dispatcher.counters.num_replans += 1
        self._stop()
        self._start_task(self._wait_for_table(str(error)))

    async def _wait_for_table(self, reason: str) -> None:
        try:
            await self._dispatcher.pool.wait_newer(self._table_version, self._layer.deadline, reason)
        except RouterError as error:
            self._fail(error)
        else:
            self.start()

    def _start_task(self, coroutine: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _stop(self) -> None:
        """Nobody waits for what is still on its way."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._posted or self._copies:
            for posted in [*self._posted.values(), *self._copies.values()]:
                posted.connection.forget(posted.frame_id)
            self._posted.clear()
            self._copies.clear()
        current = asyncio.current_task(self._loop)
        for task in list(self._tasks):
            if task is not current:
                task.cancel()


@dataclass(frozen=True)
class _Layer:
    """What one scatter was asked for. hidden_states: as they travel. deadline: of the event loop's clock."""

    layer_id: int
    hidden_states: Tensor | QuantizedRows
    num_tokens: int
    hidden_size: int
    topk_ids: npt.NDArray[np.int64]
    topk_weights: npt.NDArray[np.float32]
    deadline: float

    def explains(self, frame: GroupFrame, reply: Tensor) -> bool:
        """Whether all rows of an answer that are not finite are of rows that were sent like that."""
        rows = self.rows(frame.row_ids)
        if isinstance(rows, QuantizedRows):  # a block that is not finite travels as NaN
            sent = ((rows.values.view(torch.uint8) & 0x7F) != 0x7F).all(dim=1)
        else:
            sent = rows.isfinite().all(dim=1)
        if len(reply) != len(frame.row_ids):  # exact: a row for each pair
            sent = sent[torch.from_numpy(frame.pair_rows).long()]
        return not (sent & ~reply.isfinite().all(dim=1)).any().item()

    def rows(self, row_ids: npt.NDArray[np.int64]) -> Tensor | QuantizedRows:
        if len(row_ids) == self.num_tokens:
            return self.hidden_states
        chosen = torch.from_numpy(row_ids)
        if isinstance(self.hidden_states, QuantizedRows):
            return self.hidden_states.select(chosen)
        return self.hidden_states.index_select(0, chosen)


def to_wire(hidden_states: Tensor, wire_format: WireFormat) -> Tensor | QuantizedRows:
    """Rows as requests of this format carry them."""
    dtype = wire_format.request_dtype
    return quantize_rows(hidden_states) if dtype == torch.float8_e4m3fn else hidden_states.to(dtype)
