"""One kept-open stream to one group replica.

It dials, checks that the process at the address is the replica the expert table names (incarnation and weight
digest), opens the stream, and pairs replies with frames by frame_id. When the stream breaks, every outstanding frame
fails at once with ConnectionLost and it dials again until it is closed. It does not retry frames: that is for the
dispatcher, which knows the other replicas.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import logging
from collections.abc import Callable

import grpc
import grpc.aio

from experts.errors import ExpertsError
from experts.v1 import experts_pb2 as pb
from experts.wire import MAX_MESSAGE_BYTES, ComputeReply, decode_response
from router.cancellation import is_task_cancelled
from router.errors import CallTimeout, ConnectionLost, ReplicaError, ReplicaMismatch
from router.expert_table import ReplicaEntry

logger = logging.getLogger(__name__)

DESCRIBE_METHOD = "/experts.v1.ExpertService/Describe"
COMPUTE_METHOD = "/experts.v1.ExpertService/Compute"

# Dialling again: quick enough for a replica that Ray restarts in about 0.3 s, without hammering one that is gone.
FIRST_RETRY_S = 0.02
LAST_RETRY_S = 0.5
DIAL_TIMEOUT_S = 5.0

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Our own backoff decides when to dial, not one that earlier channels to the address have built up.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
)


class ExpertConnection:
    """Mutated only by its own event loop. `outstanding` is the number of frames without a reply."""

    def __init__(self, replica: ReplicaEntry, hidden_size: int, on_change: Callable[[], None]) -> None:
        """on_change is called whenever `ready` changes."""
        self.replica = replica
        self.ready = False
        self._hidden_size = hidden_size
        self._on_change = on_change
        self._pending: dict[int, Callable[[ComputeReply | ReplicaError], None]] = {}
        self._outgoing: collections.deque[tuple[int, bytes]] = collections.deque()
        # The frame being written now, and the task that writes while there is something to write.
        self._writing_id: int | None = None
        self._writer: asyncio.Task[None] | None = None
        self._frame_ids = itertools.count(1)
        self._stream: grpc.aio.StreamStreamCall[bytes, bytes] | None = None
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"expert {replica.replica_id}")

    @property
    def outstanding(self) -> int:
        return len(self._pending)

    def next_frame_id(self) -> int:
        return next(self._frame_ids)

    def post(self, frame_id: int, data: bytes, on_done: Callable[[ComputeReply | ReplicaError], None]) -> None:
        """Send one encoded frame without waiting for anything. Raises ConnectionLost if there is no stream.

        on_done is called once, from the event loop, with the reply or with what became of the frame, unless forget()
        comes first. There is no deadline here: the caller has one for all its frames.
        """
        if self._stream is None or not self.ready:
            raise ConnectionLost(f"replica {self.replica.replica_id} is not connected")
        self._pending[frame_id] = on_done
        self._outgoing.append((frame_id, data))
        if self._writer is None:
            self._writer = asyncio.get_running_loop().create_task(self._write(self._stream))

    def forget(self, frame_id: int) -> None:
        """Wait no more for a frame.

        If it is being written, this breaks the stream: half a message cannot be taken back.
        """
        if self._pending.pop(frame_id, None) is None:
            return
        if frame_id == self._writing_id and self._stream is not None:
            self._stream.cancel()
        else:
            self._outgoing = collections.deque(entry for entry in self._outgoing if entry[0] != frame_id)

    async def call(self, frame_id: int, data: bytes, timeout_s: float) -> ComputeReply:
        """Send one encoded frame and wait for its reply. Raises ConnectionLost or CallTimeout. See forget()."""
        reply: asyncio.Future[ComputeReply | ReplicaError] = asyncio.get_running_loop().create_future()
        self.post(frame_id, data, lambda outcome: None if reply.done() else reply.set_result(outcome))
        try:
            async with asyncio.timeout(timeout_s):
                outcome = await reply
        except TimeoutError as error:
            raise CallTimeout(f"replica {self.replica.replica_id} did not answer within {timeout_s:.1f} s") from error
        finally:
            self.forget(frame_id)
        if isinstance(outcome, ReplicaError):
            raise outcome
        return outcome

    async def close(self) -> None:
        """End the stream and stop dialling. Outstanding frames fail with ConnectionLost."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._fail_pending("closed")

    async def _run(self) -> None:
        retry_s = FIRST_RETRY_S
        while True:
            try:
                await self._serve_once()
                reason = "stream ended"
                retry_s = FIRST_RETRY_S
            except ReplicaMismatch as error:
                reason = str(error)
                retry_s = LAST_RETRY_S
            except (grpc.RpcError, TimeoutError, OSError, ExpertsError) as error:
                reason = _describe(error)
            except asyncio.CancelledError:
                if is_task_cancelled():
                    raise
                reason = "a frame could not be written"
            finally:
                was_ready = self.ready
                self.ready = False
                self._stream = None
                if self._writer is not None:
                    self._writer.cancel()
                    self._writer = None
            if was_ready:
                retry_s = FIRST_RETRY_S
                logger.warning("replica lost replica_id=%s reason=%s", self.replica.replica_id, reason)
                self._on_change()
            self._fail_pending(reason)
            await asyncio.sleep(retry_s)
            retry_s = min(LAST_RETRY_S, retry_s * 2)

    async def _serve_once(self) -> None:
        """Dial, check, and read replies until the stream ends."""
        async with grpc.aio.insecure_channel(self.replica.endpoint, options=CHANNEL_OPTIONS) as channel:
            await self._check_identity(channel)
            compute = channel.stream_stream(COMPUTE_METHOD)
            stream = compute()
            await asyncio.wait_for(stream.wait_for_connection(), DIAL_TIMEOUT_S)
            self._stream = stream
            self.ready = True
            logger.info("replica connected replica_id=%s", self.replica.replica_id)
            self._on_change()
            while True:
                data = await stream.read()
                if not isinstance(data, bytes):  # EOF
                    return
                self._deliver(decode_response(data))

    async def _write(self, stream: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
        """Hand over what is there to be sent, frame by frame, as fast as flow control lets it go."""
        try:
            while self._outgoing:
                self._writing_id, data = self._outgoing.popleft()
                await stream.write(data)
        except (grpc.RpcError, asyncio.InvalidStateError, asyncio.CancelledError):
            # The reader meets the same end and tells everybody who waits.
            stream.cancel()
            if is_task_cancelled():
                raise
        finally:
            if self._stream is stream:
                self._writing_id = None
                self._writer = None

    async def _check_identity(self, channel: grpc.aio.Channel) -> None:
        describe = channel.unary_unary(
            DESCRIBE_METHOD,
            request_serializer=pb.DescribeRequest.SerializeToString,
            response_deserializer=pb.DescribeResponse.FromString,
        )
        found = await describe(pb.DescribeRequest(), timeout=DIAL_TIMEOUT_S, wait_for_ready=False)
        wanted = self.replica
        for field, got, want in (
            ("replica_id", found.replica_id, wanted.replica_id),
            ("incarnation", found.incarnation, wanted.incarnation),
            ("weight_digest", found.weight_digest, wanted.weight_digest),
            ("hidden_size", found.hidden_size, self._hidden_size),
        ):
            if got != want:
                raise ReplicaMismatch(f"{wanted.endpoint}: {field} is {got}, the expert table says {want}")

    def _deliver(self, reply: ComputeReply) -> None:
        on_done = self._pending.pop(reply.frame_id, None)
        if on_done is not None:  # else its caller stopped waiting
            on_done(reply)

    def _fail_pending(self, reason: str) -> None:
        failed, self._pending = self._pending, {}
        self._outgoing.clear()
        for on_done in failed.values():
            on_done(ConnectionLost(f"replica {self.replica.replica_id}: {reason}"))


def _describe(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__
