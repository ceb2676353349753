"""A layer's scatter and gather as two calls of the native library (experts/kernels/cpu/scatter.h), for the usual case.

Planned, encoded, sent, received and added up by the interpreter, a round over four groups of one row cost 550 us, most
of it for calls whose code and data other processes had driven out of the caches. The usual case is: sums, no FP8 on the
wire, one replica for each group, all connected and idle. A round that turns out otherwise goes on as a
dispatch.PendingGather with the same frames.

Micro-batches scatter at the same time. A stream is lent to one round at a time, so each has streams of its own: a lane,
dialled when it is first missed.

The gather waits for the sockets in the library, for a short time and not while micro-batches take turns; after that
the event loop waits. So nobody else on the loop waits long: it gets a turn every LOOP_TURN_S.
"""

from __future__ import annotations

import asyncio
import ctypes
import time
import weakref
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from experts.kernels.cpu_ffn import load_library
from experts.v1 import experts_pb2
from router.expert_connection import ExpertConnection
from router.expert_pool import ExpertPool
from router.group_traffic import NativeTraffic
from router.reply_times import get_size_class
from router.sequence_trace import Hop

# How long a gather waits in the library.
WAIT_US = 3_000
LOOP_TURN_S = 0.01
# Rounds at the same time; further ones go by the interpreter.
MAX_LANES = 4
# Of so many rounds, one is measured.
MEASURE_EVERY = 16
# A scatter waits so long for full sockets, like ExpertConnection.wait_flushed().
_FLUSH_MS = 10
_DONE, _WAITING = 0, 1

_WIRE_DTYPES: Final = {
    torch.bfloat16: experts_pb2.TENSOR_DTYPE_BFLOAT16,
    torch.float32: experts_pb2.TENSOR_DTYPE_FLOAT32,
}


class _Request(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in (
                *("num_tokens", "top_k", "num_experts", "num_groups", "num_turns", "hidden_size"),
                *("dtype", "reply_dtype", "layer_id", "deadline_ms", "flush_ms", "reserved"),
            )
        ),
        ("table_version", ctypes.c_uint64),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("topk_ids", "expert_groups", "topk_weights", "hidden"),
                *("links", "frame_ids", "incarnations"),
            )
        ),
    )


class SentFrame(NamedTuple):
    """A frame of a round that goes on elsewhere. answer: what its group answered already."""

    connection: ExpertConnection
    frame_id: int
    answer: Tensor | None


class Gather(Protocol):
    @property
    def num_left_out(self) -> npt.NDArray[np.int32] | None: ...

    async def gather(self) -> Tensor: ...

    def abandon(self) -> None: ...


class Successor(Protocol):
    """Who goes on with a round."""

    def __call__(self, asked: Asked, frames: dict[int, SentFrame]) -> Gather:
        """frames: by index of the group in the table."""
        ...


class Asked(NamedTuple):
    """A scatter's arguments; hidden_states: as they travel. started_s: of the event loop's clock."""

    layer_id: int
    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    started_s: float
    table_version: int


class NativeScatter:
    """Scatters for one dispatcher, in as many lanes as there are rounds at the same time."""

    def __init__(
        self,
        library: ctypes.CDLL,
        pool: ExpertPool,
        dtype: torch.dtype,
        reply_dtype: torch.dtype,
        call_timeout_s: float,
        go_on: Successor,
    ) -> None:
        """dtypes: of the wire. Raises MemoryError."""
        self.library = library
        self.go_on = go_on
        self.dtype = dtype
        self.reply_dtype = reply_dtype
        self.call_timeout_s = call_timeout_s
        self.loop_turn_s = 0.0
        self.pool = pool
        self._lanes = [_Lane(self, 0)]
        # Of the scatter before this one.
        self._task: weakref.ref[asyncio.Task[Any]] | None = None

    def send(
        self, layer_id: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, timeout_s: float
    ) -> NativeRound | None:
        """Send a layer's frames; None, and nothing is sent, if this is not the usual case. See Dispatcher.scatter()."""
        # Micro-batches have a task each, and one shall not wait for another's answers.
        task = asyncio.current_task()
        is_alone = self._task is not None and task is self._task()
        if not is_alone:
            self._task = None if task is None else weakref.ref(task)
        if not topk_ids.numel() or hidden_states.dtype != self.dtype or not hidden_states.is_contiguous():
            return None
        if topk_ids.dtype != torch.int64 or topk_weights.dtype != torch.float32:
            return None
        if not (topk_ids.is_contiguous() and topk_weights.is_contiguous()):
            return None
        loop = asyncio.get_running_loop()
        asked = Asked(layer_id, hidden_states, topk_ids, topk_weights, loop.time(), self.pool.table.version)
        for lane in self._lanes:
            if not lane.is_busy:
                return lane.send(asked, loop, timeout_s, WAIT_US if is_alone else 0)
        if len(self._lanes) < MAX_LANES:
            self._lanes.append(_Lane(self, len(self._lanes)))
            return self._lanes[-1].send(asked, loop, timeout_s, 0)
        return None


class _Lane:
    """One stream to each group, and what the library knows of the round that is on its way over them."""

    def __init__(self, scatter: NativeScatter, number: int) -> None:
        """Raises MemoryError."""
        self.scatter = scatter
        self.is_busy = False
        self.handle: int = scatter.library.shoal_scatter_new() or 0
        if not self.handle:
            raise MemoryError("no memory for a scatter")
        weakref.finalize(self, scatter.library.shoal_scatter_free, self.handle)
        self._number = number
        self._request = _Request(
            dtype=_WIRE_DTYPES[scatter.dtype], reply_dtype=_WIRE_DTYPES[scatter.reply_dtype], flush_ms=_FLUSH_MS
        )
        self._table_version = -1
        self._group_names: Sequence[str] = ()
        scatter.pool.traffic.add_collector(self._collect_traffic)
        self._connections: Sequence[ExpertConnection] | None = None
        self._links: Any = None
        self._frame_ids: Any = None
        self._incarnations: Any = None
        self._num_rounds = 0

    def send(self, asked: Asked, loop: asyncio.AbstractEventLoop, timeout_s: float, wait_us: int) -> NativeRound | None:
        """wait_us: how long the gather may wait in the library."""
        if asked.table_version != self._table_version or self._connections is None:
            self._look_at_table(asked.table_version)
        connections = self._connections
        if connections is None:
            return None
        round_ = NativeRound(self, asked, connections, loop, wait_us)
        frame_ids: list[int] = []
        for index, connection in enumerate(connections):
            frame_id = connection.next_frame_id()
            link = connection.lend(round_, frame_id)
            if link is None:
                round_.end_loans()
                return None
            frame_ids.append(frame_id)
            self._links[index] = link.address
            self._frame_ids[index] = frame_id
        round_.frame_ids = frame_ids
        groups = self.scatter.pool.expert_groups(asked.layer_id)
        request = self._request
        request.num_tokens, request.hidden_size = asked.hidden_states.shape
        request.top_k = asked.topk_ids.shape[1]
        request.num_turns, request.num_experts = groups.shape
        request.layer_id = asked.layer_id
        request.deadline_ms = int(timeout_s * 1000)
        request.topk_ids = asked.topk_ids.data_ptr()
        request.topk_weights = asked.topk_weights.data_ptr()
        request.hidden = asked.hidden_states.data_ptr()
        request.expert_groups = groups.ctypes.data
        num_frames = self.scatter.library.shoal_scatter(self.handle, ctypes.byref(request))
        if num_frames < 0:
            round_.frame_ids = ()
            round_.end_loans()
            return None
        round_.num_frames = num_frames
        self.is_busy = True
        return round_

    def note_answers(self, layer_id: int, connections: Sequence[ExpertConnection]) -> None:
        """Now and then, how long the replicas took; always, while a request is traced."""
        self._num_rounds += 1
        hops = self.scatter.pool.hops
        if self._num_rounds % MEASURE_EVERY != 1 and not hops.is_on:
            return
        count = len(connections)
        pairs, reply_ns = (ctypes.c_int32 * count)(), (ctypes.c_int64 * count)()
        self.scatter.library.shoal_scatter_times(self.handle, count, pairs, reply_ns)
        for index, connection in enumerate(connections):
            if pairs[index]:
                connection.note_answer(get_size_class(pairs[index]), reply_ns[index] / 1e9)
        if hops.is_on:
            # The last answer has just come.
            sent_s = time.monotonic() - max(reply_ns) / 1e9
            for name, connection, num_pairs, own_ns in zip(
                self._group_names, connections, pairs, reply_ns, strict=True
            ):
                if num_pairs:
                    replica_id = connection.replica.replica_id
                    hops.note(Hop(layer_id, name, replica_id, num_pairs, sent_s, sent_s + own_ns / 1e9))

    def _collect_traffic(self) -> None:
        counted = (NativeTraffic * len(self._group_names))()
        self.scatter.library.shoal_scatter_take_traffic(self.handle, len(counted), ctypes.byref(counted))
        self.scatter.pool.traffic.add_native(self._group_names, list(counted))

    def _look_at_table(self, version: int) -> None:
        if version != self._table_version:
            # What was counted so far belongs to the groups of the table before.
            self._collect_traffic()
            self._group_names = self.scatter.pool.table.group_names
        connections = self._connections = self.scatter.pool.sole_connections(self._number)
        self._table_version = version
        if connections is None:
            return
        count = len(connections)
        self._links = (ctypes.c_void_p * count)()
        self._frame_ids = (ctypes.c_uint64 * count)()
        self._incarnations = (ctypes.c_uint64 * count)(*(c.replica.incarnation for c in connections))
        request = self._request
        request.num_groups, request.table_version = count, version
        request.links = ctypes.addressof(self._links)
        request.frame_ids = ctypes.addressof(self._frame_ids)
        request.incarnations = ctypes.addressof(self._incarnations)


class NativeRound:
    """The frames of one scatter on their way; borrows its connections' streams until they are answered."""

    def __init__(
        self,
        lane: _Lane,
        asked: Asked,
        connections: Sequence[ExpertConnection],
        loop: asyncio.AbstractEventLoop,
        wait_us: int,
    ) -> None:
        self.num_frames = 0
        # Empty once nothing is on its way in the lane.
        self.frame_ids: Sequence[int] = ()
        self._lane, self._scatter = lane, lane.scatter
        self._wait_us = wait_us
        self._asked = asked
        self._connections = connections
        self._loop = loop
        self._total: Tensor | None = None
        # What goes on with the round.
        self._successor: Gather | None = None
        self._changed: asyncio.Future[None] | None = None

    async def gather(self) -> Tensor:
        """[num_tokens, hidden_size] float32. Raises ExpertsUnavailable."""
        scatter, loop = self._scatter, self._loop
        if self.frame_ids:
            self._look(self._wait_us)
        try:
            if self.frame_ids:
                await self._wait()
            elif loop.time() - scatter.loop_turn_s > LOOP_TURN_S:
                scatter.loop_turn_s = loop.time()
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.abandon()
            raise
        if self._successor is not None:
            return await self._successor.gather()
        assert self._total is not None  # and finite, else the library would have left it to a successor
        return self._total

    @property
    def num_left_out(self) -> npt.NDArray[np.int32] | None:
        """See PendingGather."""
        return None if self._successor is None else self._successor.num_left_out

    def abandon(self) -> None:
        """Instead of gather(): nobody wants the result any more."""
        if self._successor is None:
            if not self.frame_ids:
                return
            self._leave()
        assert self._successor is not None
        self._successor.abandon()

    def end_loans(self) -> None:
        for connection in self._connections:
            connection.end_loan(self)

    def on_readable(self) -> None:
        """A stream has something, and the event loop waits."""
        self._look(0)

    def on_taken_back(self) -> None:
        """Somebody else needs a stream."""
        self._leave()

    async def _wait(self) -> None:
        """Until everything is answered or somebody else goes on."""
        self._changed = self._loop.create_future()
        left_s = self._asked.started_s + self._scatter.call_timeout_s - self._loop.time()
        timer = self._loop.call_later(max(0.0, left_s), self._leave)
        try:
            await self._changed
        finally:
            timer.cancel()
            self._scatter.loop_turn_s = self._loop.time()

    def _look(self, timeout_us: int) -> None:
        if self._total is None:
            num_tokens, hidden_size = self._asked.hidden_states.shape
            self._total = torch.empty(num_tokens, hidden_size, dtype=torch.float32)
        status = self._scatter.library.shoal_gather(self._lane.handle, timeout_us, self._total.data_ptr())
        if status == _WAITING:
            return
        if status != _DONE:
            self._leave()
            return
        self.end_loans()
        self.frame_ids = ()
        self._lane.is_busy = False
        self._lane.note_answers(self._asked.layer_id, self._connections)
        self._notify()

    def _leave(self) -> None:
        """Give the streams back; who goes on gets what was sent."""
        if self._successor is not None or not self.frame_ids:
            return
        frames: dict[int, SentFrame] = {}
        count = len(self._connections)
        rows, answers = (ctypes.c_int32 * count)(), (ctypes.c_void_p * count)()
        library = self._scatter.library
        library.shoal_scatter_look(self._lane.handle, count, rows, answers)
        for index, connection in enumerate(self._connections):
            if rows[index]:
                answer = None if not answers[index] else self._copy_answer(answers[index], rows[index])
                frames[index] = SentFrame(connection, self.frame_ids[index], answer)
        # First all are back: whoever goes on may need them.
        self.frame_ids = ()
        self._lane.is_busy = False
        for connection in self._connections:
            connection.take_back()
        self._successor = self._scatter.go_on(self._asked, frames)
        self._notify()

    def _copy_answer(self, address: int, num_rows: int) -> Tensor:
        dtype, hidden_size = self._scatter.reply_dtype, self._asked.hidden_states.shape[1]
        data = bytearray(ctypes.string_at(address, num_rows * hidden_size * dtype.itemsize))
        return torch.frombuffer(data, dtype=dtype).view(num_rows, hidden_size)

    def _notify(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)


def make_native_scatter(
    pool: ExpertPool, dtype: torch.dtype, reply_dtype: torch.dtype, call_timeout_s: float, go_on: Successor
) -> NativeScatter | None:
    """None without the library, or if it does not know the wire's dtypes."""
    library = load_library()
    if library is None or dtype not in _WIRE_DTYPES or reply_dtype not in _WIRE_DTYPES:
        return None
    return NativeScatter(library, pool, dtype, reply_dtype, call_timeout_s, go_on)
