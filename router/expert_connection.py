"""One kept-open stream to one group replica.

It dials, checks that the process at the address is the replica the expert table names (incarnation and weight
digest), opens the stream, and pairs replies with frames by frame_id. When the stream breaks, every outstanding frame
fails at once with ConnectionLost and it dials again until it is closed; so it is when the replica gives no sign of life
(router/heartbeat.py) or answers what it was not asked. It does not retry frames: that is for the dispatcher, which
knows the other replicas. It measures how long the replica takes, which decides what it gets.

The check is an ordinary gRPC call; the stream is experts.http2_stream on a socket that the event loop watches, so that
a frame is written, and a reply read, by the loop's own thread.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import grpc
import grpc.aio

from experts.channels import open_channel
from experts.errors import ExpertsError
from experts.http2_stream import MessageStream, StreamEnded, make_client_opening
from experts.kernels.cpu_ffn import load_library
from experts.native_link import NativeLink
from experts.stream_socket import connect_beside, set_stream_options
from experts.tls import PEER_NAME, ClusterTls
from experts.tls_socket import StreamSocket, TlsSocket
from experts.v1 import experts_pb2 as pb
from experts.wire import (
    COMPUTE_METHOD,
    DESCRIBE_METHOD,
    MAX_MESSAGE_BYTES,
    Buffer,
    ComputeReply,
    ComputeStatus,
    decode_response,
)
from router.cancellation import is_task_cancelled
from router.dispatch_counters import DispatchCounters
from router.errors import BadReply, CallTimeout, ConnectionLost, ReplicaError, ReplicaMismatch
from router.expert_table import ReplicaEntry
from router.heartbeat import DEFAULT_HEARTBEATS, Heartbeat, HeartbeatOptions
from router.reply_times import ServiceTimes

logger = logging.getLogger(__name__)

# Dialling again: quick enough for a replica that Ray restarts in about 0.3 s, without hammering one that is gone.
FIRST_RETRY_S = 0.02
LAST_RETRY_S = 0.5
DIAL_TIMEOUT_S = 5.0

# A frame that is not sent within this after a scatter is sent when the loop comes by again.
FLUSH_WAIT_S = 0.01

# Of a replica that was never asked.
FIRST_EXPECTED_S = 0.001
# A reply that takes so many times what was expected, and this on top, is late.
LATE_FACTOR, LATE_S = 3.0, 0.01

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


_OPENING = make_client_opening(COMPUTE_METHOD)


class Borrower(Protocol):
    """Who has a connection's stream lent. Both may give it back."""

    def on_readable(self) -> None:
        """The socket has something, or is broken."""
        ...

    def on_taken_back(self) -> None:
        """The connection needs its stream; frames that are not answered are to be expect()ed."""
        ...


@dataclass(slots=True)
class _SentFrame:
    """A frame without a reply. on_done: None once its caller waits no more; the replica works at it all the same.
    sent_s: of time.monotonic: the loop's clock may stand still for a turn. expected_s: of the replica's time."""

    on_done: Callable[[ComputeReply | ReplicaError], None] | None
    sent_s: float
    size_class: int
    expected_s: float


class ExpertConnection:
    """Mutated only by its own event loop."""

    def __init__(
        self,
        replica: ReplicaEntry,
        hidden_size: int,
        on_change: Callable[[], None],
        *,
        heartbeats: HeartbeatOptions | None = None,
        counters: DispatchCounters | None = None,
        times: ServiceTimes | None = None,
        tls: ClusterTls | None = None,
    ) -> None:
        """on_change is called whenever `ready` changes. heartbeats: None: as by default. times: measured by others as
        well. tls: None: unencrypted."""
        self.replica = replica
        self.times = times or ServiceTimes()
        self.num_sent = 0
        # Of time.monotonic: when the replica last answered a frame.
        self.answered_s = 0.0
        self._is_connected = False
        self._hidden_size = hidden_size
        self._on_change = on_change
        self._heartbeats = heartbeats or DEFAULT_HEARTBEATS
        self._counters = counters or DispatchCounters()
        self._tls = tls
        # By frame id, in the order of sending.
        self._sent: dict[int, _SentFrame] = {}
        self._expected_s = 0.0
        self._frame_ids = itertools.count(1)
        self._own_stream: MessageStream | None = None
        # Of a stream that is lent: who has it, the frame that is on its way, and what was read when it came back.
        self._link: NativeLink | None = None
        self._is_lent = False
        self._borrower: Borrower | None = None
        self._lent_key = 0
        self._returned: list[Buffer] = []
        # What ended the stream.
        self._ended: asyncio.Future[Exception] | None = None
        self._opened: asyncio.Future[None] | None = None
        self._is_writer_added = False
        self._flushed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._run(), name=f"expert {replica.replica_id}")

    @property
    def ready(self) -> bool:
        """Whether frames can be posted."""
        return self._is_connected and self._own_stream is not None

    @property
    def outstanding(self) -> int:
        """Frames that somebody waits for."""
        return sum(sent.on_done is not None for sent in self._sent.values()) + (self._borrower is not None)

    @property
    def is_idle(self) -> bool:
        """Whether everything that was sent is answered."""
        return not self._sent and self._borrower is None

    def busy_s(self) -> float:
        """How long the replica will take for what it was sent. One that is late is not expected to answer any sooner
        than it has been silent already."""
        if not self._sent:
            return 0.0
        oldest = next(iter(self._sent.values()))
        silent_s = time.monotonic() - max(oldest.sent_s, self.answered_s)
        is_late = silent_s > LATE_FACTOR * oldest.expected_s + LATE_S
        return self._expected_s + silent_s if is_late else self._expected_s

    def next_frame_id(self) -> int:
        return next(self._frame_ids)

    def post(
        self,
        frame_id: int,
        parts: Sequence[Buffer],
        on_done: Callable[[ComputeReply | ReplicaError], None],
        size_class: int = 0,
    ) -> None:
        """Send one encoded frame without waiting for anything. Raises ConnectionLost if there is no stream.

        parts must stay as they are until on_done is called or forget() or leave_behind() returns. on_done is called
        once, from the event loop, with the reply or with what became of the frame, unless one of these comes first.
        There is no deadline here: the caller has one for all its frames. size_class: of reply_times.
        """
        if self._stream is None or not self._is_connected:
            raise ConnectionLost(f"replica {self.replica.replica_id} is not connected")
        expected_s = self.times.expect_s(size_class) or FIRST_EXPECTED_S
        self._sent[frame_id] = _SentFrame(on_done, time.monotonic(), size_class, expected_s)
        self._expected_s += expected_s
        self.num_sent += 1
        try:
            self._stream.send(frame_id, parts, sum(map(len, parts)))
        except OSError as error:
            self._end_stream(error)
        else:
            self._watch()

    def expect(
        self, frame_id: int, on_done: Callable[[ComputeReply | ReplicaError], None] | None, size_class: int = 0
    ) -> None:
        """Wait for the reply to a frame that a borrower sent; on_done: None, nobody does. See post()."""
        expected_s = self.times.expect_s(size_class) or FIRST_EXPECTED_S
        self._sent[frame_id] = _SentFrame(on_done, time.monotonic(), size_class, expected_s)
        self._expected_s += expected_s

    def lend(self, borrower: Borrower, frame_id: int) -> NativeLink | None:
        """The stream, for one frame; None unless it is open and nothing is on its way.

        It stays lent until end_loan(), or until it is needed here.
        """
        if self._borrower is not None or self._sent or self._returned or not self._is_connected:
            return None
        if not self._is_lent:
            stream, library = self._own_stream, load_library()
            if stream is None or library is None or self._is_writer_added or (state := stream.lend()) is None:
                return None
            self._link = self._link or NativeLink(library)
            self._link.open(stream.fileno(), state)
            self._is_lent = True
        self._borrower, self._lent_key = borrower, frame_id
        self.num_sent += 1
        return self._link

    def end_loan(self, borrower: Borrower) -> None:
        """The borrower is done. Does nothing if it has not got the stream."""
        # The link stays as it is: most often it is lent again.
        if self._borrower is borrower:
            self._borrower = None

    def note_answer(self, size_class: int, reply_s: float) -> None:
        """A borrower's frame was answered after reply_s."""
        self.times.record(size_class, reply_s)
        self.answered_s = time.monotonic()

    def take_back(self) -> None:
        """Have the stream here again. Replies that were read meanwhile are delivered in the loop's next turn."""
        if not self._is_lent:
            return
        self._is_lent = False
        borrower, self._borrower = self._borrower, None
        assert self._link is not None
        if self._own_stream is not None:
            self._loop.call_soon(self._read)
            try:
                self._link.close_into(self._own_stream, self._lent_key, self._returned)
            except (StreamEnded, OSError) as error:
                self._loop.call_soon(self._end_stream, error)
        if borrower is not None:
            borrower.on_taken_back()

    @property
    def _stream(self) -> MessageStream | None:
        """The stream, which is not lent then."""
        if self._is_lent:
            self.take_back()
        return self._own_stream

    @property
    def is_flushed(self) -> bool:
        """Whether everything posted is on its way."""
        return self._stream is None or not self._stream.wants_write

    async def wait_flushed(self) -> None:
        """Until everything posted is on its way, or FLUSH_WAIT_S."""
        while not self.is_flushed:
            self._flushed.clear()
            try:
                async with asyncio.timeout(FLUSH_WAIT_S):
                    await self._flushed.wait()
            except TimeoutError:
                return

    def forget(self, frame_id: int) -> None:
        """Wait no more for a frame.

        If it is being written, this breaks the stream: half a message cannot be taken back.
        """
        if self._let_go(frame_id) and self._stream is not None and not self._stream.withdraw(frame_id):
            self._end_stream(StreamEnded("a frame could not be written"))

    def leave_behind(self, frame_id: int) -> None:
        """Wait no more for a frame that was answered elsewhere. The replica may take its time, also for reading it."""
        if self._let_go(frame_id) and self._stream is not None:
            self._stream.detach(frame_id)

    def _let_go(self, frame_id: int) -> bool:
        """Nobody waits for a frame any more. False if nobody did, or if it was taken back before it went out."""
        sent = self._sent.get(frame_id)
        if sent is None or sent.on_done is None:
            return False
        sent.on_done = None
        if self._stream is not None and self._stream.is_waiting(frame_id):
            self._stream.withdraw(frame_id)
            del self._sent[frame_id]
            self._expected_s = self._expected_s - sent.expected_s if self._sent else 0.0
            return False
        return True

    def read_now(self) -> None:
        """Take in what lies in the socket, without waiting for the loop to come by."""
        if self._is_connected:
            self._read()

    def drop(self, error: ReplicaError) -> None:
        """End the stream because of what came over it, and dial again."""
        self._end_stream(error)

    def hand_over(self) -> None:
        """The replica left the table: fail what somebody waits for."""
        self.take_back()
        for frame_id, sent in list(self._sent.items()):
            on_done = sent.on_done
            self.leave_behind(frame_id)
            if on_done is not None:
                self._counters.num_rerouted += 1
                on_done(ConnectionLost(f"replica {self.replica.replica_id} left the expert table"))

    async def call(self, frame_id: int, parts: Sequence[Buffer], timeout_s: float, size_class: int = 0) -> ComputeReply:
        """Send one encoded frame and wait for its reply. Raises ConnectionLost or CallTimeout. See forget()."""
        reply: asyncio.Future[ComputeReply | ReplicaError] = asyncio.get_running_loop().create_future()
        self.post(frame_id, parts, lambda outcome: None if reply.done() else reply.set_result(outcome), size_class)
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
                reason = _describe(await self._serve_once())
            except ReplicaMismatch as error:
                reason = str(error)
                retry_s = LAST_RETRY_S
            except (grpc.RpcError, TimeoutError, OSError) as error:
                reason = _describe(error)
            except asyncio.CancelledError:
                if is_task_cancelled():
                    raise
                reason = "dialling was given up"
            finally:
                was_connected, self._is_connected = self._is_connected, False
            if was_connected:
                retry_s = FIRST_RETRY_S
                logger.warning("replica lost replica_id=%s reason=%s", self.replica.replica_id, reason)
                self._on_change()
            self._fail_pending(reason)
            await asyncio.sleep(retry_s)
            retry_s = min(LAST_RETRY_S, retry_s * 2)

    async def _serve_once(self) -> Exception:
        """Dial, check, and serve the stream until it ends. Returns what ended it, raises what was wrong before."""
        async with open_channel(self.replica.endpoint, self._tls, CHANNEL_OPTIONS) as channel:
            await self._check_identity(channel)
        loop = asyncio.get_running_loop()
        host, _, port = self.replica.endpoint.rpartition(":")
        connection: StreamSocket | None = None
        heartbeat: Heartbeat | None = None
        try:
            async with asyncio.timeout(DIAL_TIMEOUT_S):
                connection = await _connect(self.replica.endpoint, self._tls)
                self._own_stream = MessageStream(connection, _OPENING, MAX_MESSAGE_BYTES)
                self._ended, self._opened = loop.create_future(), loop.create_future()
                loop.add_reader(connection, self._read)
                self._own_stream.flush()
                self._watch()
                await asyncio.wait((self._opened, self._ended), return_when=asyncio.FIRST_COMPLETED)
                if not self._ended.done():
                    heartbeat = await self._start_heartbeat(host.strip("[]"), int(port))
            if not self._ended.done():
                self._is_connected = True
                logger.info("replica connected replica_id=%s over=%s", self.replica.replica_id, _name_way(connection))
                self._on_change()
            return await self._ended
        finally:
            if heartbeat is not None:
                heartbeat.close()
            self._drop_stream()
            if connection is not None:
                connection.close()

    async def _start_heartbeat(self, host: str, port: int) -> Heartbeat:
        """Raises OSError."""
        _, heartbeat = await self._loop.create_connection(
            lambda: Heartbeat(self._heartbeats, self._on_missed_heartbeat, self._on_dead),
            host,
            port,
            ssl=None if self._tls is None else self._tls.client_context,
            server_hostname=None if self._tls is None else PEER_NAME,
        )
        return heartbeat

    def _on_missed_heartbeat(self) -> None:
        self._counters.num_missed_heartbeats += 1

    def _on_dead(self, reason: str) -> None:
        self._counters.num_dead_replicas += 1
        self._end_stream(StreamEnded(reason))

    def _read(self) -> None:
        """The socket has something."""
        if self._borrower is not None:
            self._borrower.on_readable()
            return
        stream = self._stream
        if stream is None:
            return
        received, self._returned = self._returned, []
        ended: StreamEnded | OSError | None = None
        try:
            stream.receive(received)
        except (StreamEnded, OSError) as error:
            ended = error
        try:
            for data in received:
                if ended is None:
                    stream.consume(len(data))
                self._deliver(decode_response(data))
                if self._stream is not stream:  # whoever got the reply broke the stream
                    return
        except OSError as error:
            ended = error
        except (ExpertsError, BadReply) as error:
            self._counters.count_error(BadReply(str(error)))
            self._end_stream(error)
            return
        if ended is not None:
            self._end_stream(ended)
            return
        if self._opened is not None and stream.is_open and not self._opened.done():
            self._opened.set_result(None)
        self._watch()

    def _write(self) -> None:
        """The socket takes more."""
        if self._stream is None:
            return
        try:
            self._stream.flush()
        except OSError as error:
            self._end_stream(error)
            return
        self._watch()

    def _watch(self) -> None:
        """Ask the loop to tell when the socket takes more, as long as there is more."""
        if self._stream is None or self._stream.wants_write == self._is_writer_added:
            return
        loop = asyncio.get_running_loop()
        if self._stream.wants_write:
            loop.add_writer(self._stream.socket, self._write)
        else:
            loop.remove_writer(self._stream.socket)
            self._flushed.set()
        self._is_writer_added = not self._is_writer_added

    def _end_stream(self, error: Exception) -> None:
        """The stream is no good any more; _run fails what is outstanding and dials again."""
        self._drop_stream()
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(error)

    def _drop_stream(self) -> None:
        stream, self._own_stream = self._stream, None
        if stream is None:
            return
        self._returned.clear()
        loop = asyncio.get_running_loop()
        loop.remove_reader(stream.socket)
        if self._is_writer_added:
            loop.remove_writer(stream.socket)
            self._is_writer_added = False
        self._flushed.set()
        stream.close()

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
        """Raises BadReply if it answers nothing that was asked."""
        sent = self._sent.pop(reply.frame_id, None)
        if sent is None:
            raise BadReply(f"replica {self.replica.replica_id} answered frame {reply.frame_id}, which it was not sent")
        now_s = time.monotonic()
        self._expected_s = self._expected_s - sent.expected_s if self._sent else 0.0
        if reply.status is ComputeStatus.OK:
            # It answers one after the other: a frame's turn comes when the one before is done.
            self.times.record(sent.size_class, now_s - max(sent.sent_s, self.answered_s))
        self.answered_s = now_s
        if reply.incarnation != self.replica.incarnation:
            self._sent[reply.frame_id] = sent
            raise BadReply(f"replica {self.replica.replica_id} answered as incarnation {reply.incarnation}")
        if sent.on_done is not None:
            sent.on_done(reply)

    def _fail_pending(self, reason: str) -> None:
        failed, self._sent = self._sent, {}
        self._expected_s = 0.0
        for sent in failed.values():
            if sent.on_done is not None:
                sent.on_done(ConnectionLost(f"replica {self.replica.replica_id}: {reason}"))


def _name_way(connection: StreamSocket) -> str:
    if not isinstance(connection, socket.socket):
        return "tls"
    return "unix" if connection.family == socket.AF_UNIX else "tcp"


async def _connect(endpoint: str, tls: ClusterTls | None) -> StreamSocket:
    """By the unix socket beside the endpoint, else over TCP; with certificates always that. Raises OSError."""
    beside = connect_beside(endpoint) if tls is None else None
    connection = beside or await _connect_tcp(endpoint)
    try:
        set_stream_options(connection)
    except BaseException:
        connection.close()
        raise
    return connection if tls is None else await _encrypt(connection, tls)


async def _connect_tcp(endpoint: str) -> socket.socket:
    """Raises OSError."""
    loop = asyncio.get_running_loop()
    host, _, port = endpoint.rpartition(":")
    found = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    family, kind, protocol, _, address = found[0]
    connection = socket.socket(family, kind, protocol)
    try:
        connection.setblocking(False)
        await loop.sock_connect(connection, address)
    except BaseException:
        connection.close()
        raise
    return connection


async def _encrypt(connection: socket.socket, tls: ClusterTls) -> TlsSocket:
    """Shake hands. Raises OSError."""
    loop = asyncio.get_running_loop()
    encrypted = TlsSocket(connection, tls.client_context, server_name=PEER_NAME)
    try:
        while (mask := encrypted.handshake()) is not None:
            ready = asyncio.Event()
            reads = mask == selectors.EVENT_READ
            (loop.add_reader if reads else loop.add_writer)(encrypted, ready.set)
            try:
                await ready.wait()
            finally:
                (loop.remove_reader if reads else loop.remove_writer)(encrypted)
    except BaseException:
        encrypted.close()
        raise
    return encrypted


def _describe(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__
