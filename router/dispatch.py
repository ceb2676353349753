"""Scatter a layer's rows to the expert groups and gather their weighted sums.

An expert call is pure, so a frame that a replica fails is simply sent to another, and a layer whose plan no longer
fits the expert table is planned again. Sums are added in the table's group order (reduced) or in ascending expert id
(exact), never in the order of arrival.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from experts.activation_quantization import QuantizedRows, quantize_rows
from experts.wire import Buffer, ComputeReply, ComputeStatus, WireFormat, compute_max_rows, encode_request_parts
from router.dispatch_plan import GroupFrame, plan_frames, split_frame
from router.errors import (
    CallTimeout,
    ExpertsUnavailable,
    FrameRefused,
    ReplicaError,
    ReplicaRefused,
    RouterError,
    TableChanged,
)
from router.expert_connection import FIRST_RETRY_S, LAST_RETRY_S, ExpertConnection
from router.expert_pool import ExpertPool
from router.row_sums import Answer, add_answers

CombineMode = Literal["reduced", "exact"]

# Of an attempt that starts just before the deadline of its layer: less would only waste the replica's work.
LEAST_TIMEOUT_S = 1.0

ReplyOrError = ComputeReply | ReplicaError


@dataclass(frozen=True)
class DispatchOptions:
    """wire_format: of activations, out and back. call_timeout_s: for one attempt of one frame.
    expert_wait_s: for a group without a usable replica, all attempts together."""

    wire_format: WireFormat
    combine: CombineMode
    call_timeout_s: float
    expert_wait_s: float


@dataclass
class DispatchCounters:
    """Since start."""

    num_frames: int = 0
    num_retries: int = 0
    num_replans: int = 0
    errors: dict[str, int] = field(default_factory=dict[str, int])

    def count_error(self, error: ReplicaError) -> None:
        name = type(error).__name__
        self.errors[name] = self.errors.get(name, 0) + 1


class PostedFrame(NamedTuple):
    """A frame on its way."""

    connection: ExpertConnection
    frame_id: int


class Dispatcher:
    """Implements decoder_layer.ExpertDispatcher over an ExpertPool. Safe for several scatters at once on one loop."""

    def __init__(self, pool: ExpertPool, options: DispatchOptions) -> None:
        self._pool = pool
        self._options = options
        self.counters = DispatchCounters()

    async def scatter(
        self, layer_id: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> PendingGather:
        """hidden_states: [num_tokens, hidden_size]; topk_ids int64 and topk_weights float32: [num_tokens, top_k]."""
        layer = _Layer(
            layer_id=layer_id,
            hidden_states=to_wire(hidden_states, self._options.wire_format),
            num_tokens=hidden_states.shape[0],
            hidden_size=hidden_states.shape[1],
            topk_ids=topk_ids.numpy(),
            topk_weights=topk_weights.numpy(),
            deadline=asyncio.get_running_loop().time() + self._options.expert_wait_s,
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

    def plan(self, layer: _Layer) -> list[GroupFrame]:
        """Raises TableChanged when the table in force does not host every chosen expert."""
        try:
            frames = plan_frames(layer.topk_ids, layer.topk_weights, self._pool.expert_groups(layer.layer_id))
        except LookupError as error:
            raise TableChanged(str(error)) from error
        max_rows = compute_max_rows(
            layer.hidden_size,
            layer.topk_ids.shape[1],
            self._options.wire_format,
            exact=self._options.combine == "exact",
        )
        return [part for frame in frames for part in split_frame(frame, max_rows)]

    def post(
        self, layer: _Layer, frame: GroupFrame, group_name: str, on_done: Callable[[PostedFrame, ReplyOrError], None]
    ) -> PostedFrame | None:
        """Send a frame to the replica with the least to do. None if no replica of the group is connected."""
        connection = self._pool.pick(group_name)
        if connection is None:
            return None
        self.counters.num_frames += 1
        posted = PostedFrame(connection, connection.next_frame_id())
        data = self._encode(connection, posted.frame_id, layer, frame, self.first_timeout_s(layer))
        connection.post(posted.frame_id, data, lambda outcome: on_done(posted, outcome))
        return posted

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
            connection = await self._pool.acquire(group_name, failed, layer.deadline)
            timeout_s = self.first_timeout_s(layer)
            self.counters.num_frames += 1
            try:
                frame_id = connection.next_frame_id()
                data = self._encode(connection, frame_id, layer, frame, timeout_s)
                reply = await connection.call(frame_id, data, timeout_s)
                return self.check_reply(connection, layer, frame, reply)
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
        if asyncio.get_running_loop().time() >= layer.deadline and not self._pool.has_other(group_name, failed):
            raise ExpertsUnavailable(f"expert group {group_name}: {error}") from error

    def check_reply(
        self, connection: ExpertConnection, layer: _Layer, frame: GroupFrame, reply: ComputeReply
    ) -> Tensor:
        """The tensor of an answer that is one. Raises TableChanged, FrameRefused or ReplicaRefused."""
        if reply.status is ComputeStatus.NOT_HOSTED:
            raise TableChanged(reply.message)
        if reply.status is ComputeStatus.BAD_REQUEST:
            raise FrameRefused(f"replica {connection.replica.replica_id}: {reply.message}")
        num_rows = len(frame.pair_rows) if self._options.combine == "exact" else len(frame.row_ids)
        expected = (num_rows, layer.hidden_size)
        if reply.status is not ComputeStatus.OK or reply.tensor is None:
            raise ReplicaRefused(f"replica {connection.replica.replica_id}: {reply.status.name}: {reply.message}")
        if tuple(reply.tensor.shape) != expected or reply.dtype != self._options.wire_format.reply_dtype:
            raise ReplicaRefused(
                f"replica {connection.replica.replica_id}: got {tuple(reply.tensor.shape)} {reply.dtype}, "
                f"expected {expected} {self._options.wire_format.reply_dtype}"
            )
        return reply.tensor

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

    As long as every replica answers there is no task and no timer per frame: replies come in by callback. A frame that
    fails gets a task that takes it elsewhere; a table that changed gets one that plans the layer again.
    """

    def __init__(self, dispatcher: Dispatcher, layer: _Layer) -> None:
        self._dispatcher = dispatcher
        self._layer = layer
        self._loop = asyncio.get_running_loop()
        self._finished: asyncio.Future[None] = self._loop.create_future()
        self._table_version = 0
        self._frames: list[GroupFrame] = []
        self._group_names: list[str] = []
        self._replies: list[Tensor | None] = []
        self._num_missing = 0
        # By frame: what was sent and not answered.
        self._posted: dict[int, PostedFrame] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Plan by the table in force and send every frame."""
        table = self._dispatcher.pool.table
        self._table_version = table.version
        try:
            self._frames = self._dispatcher.plan(self._layer)
        except TableChanged as error:
            self._plan_again(error)
            return
        self._group_names = [table.group_names[frame.group_index] for frame in self._frames]
        self._replies = [None] * len(self._frames)
        self._num_missing = len(self._frames)
        if not self._frames:
            self._finished.set_result(None)
        for index, frame in enumerate(self._frames):
            posted = self._dispatcher.post(
                self._layer, frame, self._group_names[index], functools.partial(self._on_done, index)
            )
            if posted is None:
                self._start_task(self._call_group(index, []))
            else:
                self._posted[index] = posted
        self._timer = self._loop.call_later(self._dispatcher.first_timeout_s(self._layer), self._time_out)

    async def wait_sent(self) -> None:
        """Until the frames are on their way, or a short time."""
        for posted in list(self._posted.values()):
            if not posted.connection.is_flushed:
                await posted.connection.wait_flushed()

    async def gather(self) -> Tensor:
        """[num_tokens, hidden_size] float32. Raises ExpertsUnavailable."""
        try:
            await self._finished
        finally:
            self._stop()
        replies = [reply for reply in self._replies if reply is not None]
        return self._dispatcher.combine(self._layer, self._frames, replies)

    def abandon(self) -> None:
        """Instead of gather(): nobody wants the result any more."""
        self._stop()
        self._finished.cancel()

    def _on_done(self, index: int, posted: PostedFrame, outcome: ReplyOrError) -> None:
        if self._posted.pop(index, None) is None:
            return
        try:
            if isinstance(outcome, ReplicaError):
                raise outcome
            reply = self._dispatcher.check_reply(posted.connection, self._layer, self._frames[index], outcome)
        except ReplicaError as error:
            self._take_elsewhere(index, posted.connection, error)
        except TableChanged as error:
            self._plan_again(error)
        except FrameRefused as error:
            self._fail(error)
        else:
            self._accept(index, reply)

    def _accept(self, index: int, reply: Tensor) -> None:
        self._replies[index] = reply
        self._num_missing -= 1
        if self._num_missing == 0 and not self._finished.done():
            self._finished.set_result(None)

    def _fail(self, error: BaseException) -> None:
        if not self._finished.done():
            self._finished.set_exception(error)

    def _time_out(self) -> None:
        """The time of the first attempts is over."""
        for index, posted in list(self._posted.items()):
            del self._posted[index]
            posted.connection.forget(posted.frame_id)
            replica_id = posted.connection.replica.replica_id
            self._take_elsewhere(index, posted.connection, CallTimeout(f"replica {replica_id} did not answer in time"))

    def _take_elsewhere(self, index: int, connection: ExpertConnection, error: ReplicaError) -> None:
        try:
            self._dispatcher.note_failure(self._layer, self._group_names[index], [connection], error)
        except ExpertsUnavailable as unavailable:
            self._fail(unavailable)
        else:
            self._start_task(self._call_group(index, [connection]))

    async def _call_group(self, index: int, failed: list[ExpertConnection]) -> None:
        name = self._group_names[index]
        try:
            reply = await self._dispatcher.call_group(self._layer, self._frames[index], name, failed)
        except TableChanged as error:
            self._plan_again(error)
        except RouterError as error:
            self._fail(error)
        else:
            self._accept(index, reply)

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
        for posted in self._posted.values():
            posted.connection.forget(posted.frame_id)
        self._posted.clear()
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
