"""Serves one expert group over gRPC: experts.v1.ExpertService and grpc.health.v1.

One address for all. The streams of routers, which every layer of every step waits for, are served by one thread that
reads, computes and answers (experts/router_streams.py). Any other client is forwarded to an ordinary gRPC server in
this process (experts/front_door.py), which answers the same calls with one thread per stream; it listens on loopback
only. Both give their frames to one Batcher. Errors become a ComputeStatus here and nowhere else.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from experts import wire
from experts.batcher import Batcher, Computed, Entry
from experts.errors import BadFrame, Draining, ExpertsError, NotHosted, Overloaded, StaleIncarnation
from experts.front_door import FrontDoor
from experts.group import ExpertGroup
from experts.http2_stream import make_client_opening
from experts.load_meter import load_to_proto, make_load_meter
from experts.native_serving import make_native_serving
from experts.peer_copy import give_expert
from experts.router_streams import (
    INVALID_ARGUMENT,
    RESOURCE_EXHAUSTED,
    Received,
    RouterStreams,
    StreamBroken,
)
from experts.tls import ClusterTls, check_listen_address
from experts.v1 import experts_pb2
from experts.weights import ExpertWeights
from experts.wire import COMPUTE_METHOD, MAX_MESSAGE_BYTES, SERVICE_NAME, Buffer, ComputeFrame, ComputeStatus

logger = logging.getLogger(__name__)

# Calls beside the streams of other clients: Describe, and the health checks of Ray and of every router.
_SPARE_THREADS = 32

_SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Routers ping idle streams every 20 s; without these the server would close them for pinging too often.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    # A port belongs to one replica: starting a second one on it must fail.
    ("grpc.so_reuseport", 0),
)

# Of the gRPC server behind the front door.
_INNER_HOST = "127.0.0.1"
_DOOR_TIMEOUT_S = 1.0
# A frame of many rows may take seconds.
_CHANGE_TIMEOUT_S = 60.0

_STATUS_OF_ERROR: dict[type[ExpertsError], ComputeStatus] = {
    BadFrame: ComputeStatus.BAD_REQUEST,
    NotHosted: ComputeStatus.NOT_HOSTED,
    StaleIncarnation: ComputeStatus.STALE_INCARNATION,
    Overloaded: ComputeStatus.OVERLOADED,
    Draining: ComputeStatus.DRAINING,
}


_CODE_OF_NUMBER = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(frozen=True, slots=True)
class ReplicaIdentity:
    """Who this process is. incarnation: greater for every start of the same replica."""

    group_name: str
    replica_id: str
    incarnation: int


class ExpertServer:
    """A gRPC server around one expert group.

    start() -> endpoint; drain(grace_s) stops taking frames; stop() ends. start and stop are called once each, from
    one thread; drain may be called from any.
    """

    def __init__(
        self,
        group: ExpertGroup,
        identity: ReplicaIdentity,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        max_streams: int = 64,
        native: bool = True,
        tls: ClusterTls | None = None,
        allow_insecure: bool = False,
        checkpoint: str | None = None,
    ) -> None:
        """port 0 takes a free one. max_streams: most streams open at once; a further call is refused. native: serve
        usual frames without the interpreter, if the group can be computed so. tls: None: unencrypted,
        which allow_insecure permits on an address that other machines reach. checkpoint: folder of which replicas
        that start may copy what the group hosts; None: they may not. Raises ConfigError if such an address is
        not permitted."""
        check_listen_address(host, tls, allow_insecure=allow_insecure)
        self._group = group
        self._identity = identity
        self._host = host
        self._port = port
        self._checkpoint = checkpoint
        self._batcher = Batcher(group)
        self._meter = make_load_meter(group.config, time.monotonic())
        self._state = threading.Condition()
        self._num_streams = 0
        self._is_draining = False
        num_threads = max_streams + _SPARE_THREADS
        self._max_streams = max_streams
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="experts-grpc")
        self._health = health.HealthServicer(experimental_non_blocking=True)
        self._server = grpc.server(self._pool, options=_SERVER_OPTIONS, maximum_concurrent_rpcs=num_threads)
        self._native = make_native_serving(group.frame_function, identity.incarnation, self._meter) if native else None
        self._streams = RouterStreams(self._serve, self._enter_stream, self._leave_stream, self._native)
        self._door = FrontDoor(make_client_opening(COMPUTE_METHOD), self._streams.adopt, tls)

    def start(self) -> str:
        """Bind and serve. Returns "host:port". Raises RuntimeError or OSError if the port is taken."""
        self._server.add_generic_rpc_handlers((self._make_handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        inner_port = self._server.add_insecure_port(f"{_INNER_HOST}:0")
        self._server.start()
        try:
            self._port = self._door.start(self._host, self._port, (_INNER_HOST, inner_port))
        except OSError:
            self._server.stop(None)
            raise
        self._streams.start()
        self._set_health(health_pb2.HealthCheckResponse.SERVING)
        return self.endpoint

    @property
    def endpoint(self) -> str:
        return f"{self._host}:{self._port}"

    @property
    def num_streams(self) -> int:
        """Streams open now."""
        with self._state:
            return self._num_streams

    def use_weights(self, weights: ExpertWeights) -> None:
        """Go on with other experts of the same checkpoint, between two frames. From any thread but that of the streams.

        Raises TimeoutError if a frame takes longer than _CHANGE_TIMEOUT_S; nothing has changed then.
        """
        self._streams.call(lambda: self._change_weights(weights), _CHANGE_TIMEOUT_S)

    def _change_weights(self, weights: ExpertWeights) -> None:
        """By the thread of the streams: the native loop computes in no other."""
        self._group.use(weights)
        function = self._group.frame_function
        if self._native is not None and function is not None:
            self._native.use(function)

    def drain(self, grace_s: float) -> None:
        """Leave: report NOT_SERVING at once, go on answering until every stream is closed or grace_s is over,
        then answer DRAINING. Blocks for at most grace_s."""
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        logger.info("draining replica_id=%s grace_s=%g", self._identity.replica_id, grace_s)
        with self._state:
            self._state.wait_for(lambda: self._num_streams == 0, timeout=grace_s)
            self._refuse_all()

    def stop(self, grace_s: float = 1.0) -> None:
        """Refuse new calls, let frames being computed finish for grace_s, then close everything."""
        self._health.enter_graceful_shutdown()
        with self._state:
            self._refuse_all()
        self._door.stop_listening()
        stopped = self._server.stop(grace_s)
        self._streams.close(grace_s)
        stopped.wait()
        self._door.close(_DOOR_TIMEOUT_S)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _refuse_all(self) -> None:
        """Frames that come from now on are answered with DRAINING."""
        self._is_draining = True
        if self._native is not None:
            self._native.disable()

    def _set_health(self, status: Any) -> None:
        for service in ("", SERVICE_NAME):
            self._health.set(service, status)

    def _make_handlers(self) -> grpc.GenericRpcHandler:
        """Handlers without serialisers for Compute: it takes and gives raw bytes."""
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Describe": grpc.unary_unary_rpc_method_handler(
                    self._describe,
                    request_deserializer=experts_pb2.DescribeRequest.FromString,
                    response_serializer=experts_pb2.DescribeResponse.SerializeToString,
                ),
                "Load": grpc.unary_unary_rpc_method_handler(
                    self._load,
                    request_deserializer=experts_pb2.LoadRequest.FromString,
                    response_serializer=experts_pb2.LoadResponse.SerializeToString,
                ),
                "FetchExpert": grpc.unary_stream_rpc_method_handler(
                    self._fetch_expert,
                    request_deserializer=experts_pb2.FetchExpertRequest.FromString,
                    response_serializer=experts_pb2.FetchExpertResponse.SerializeToString,
                ),
                "Compute": grpc.stream_stream_rpc_method_handler(self._compute_stream),
            },
        )

    def _describe(self, request: experts_pb2.DescribeRequest, context: grpc.ServicerContext) -> Any:
        return experts_pb2.DescribeResponse(
            group_name=self._identity.group_name,
            replica_id=self._identity.replica_id,
            incarnation=self._identity.incarnation,
            weight_digest=self._group.weight_digest,
            numerics_id=self._group.numerics_id,
            hosted=[wire.expert_range_to_proto(block) for block in self._group.hosted],
            hidden_size=self._group.hidden_size,
            max_rows=self._group.max_rows,
            pid=os.getpid(),
        )

    def _load(self, request: experts_pb2.LoadRequest, context: grpc.ServicerContext) -> Any:
        return load_to_proto(self._meter, self._identity.incarnation, time.monotonic(), request.with_pairs)

    def _fetch_expert(self, request: experts_pb2.FetchExpertRequest, context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            if self._checkpoint is None:
                raise NotHosted("this replica gives no experts away")
            yield from give_expert(self._group.weights, self._checkpoint, (request.layer_id, request.expert_id))
        except ExpertsError as error:
            code = grpc.StatusCode.NOT_FOUND if isinstance(error, NotHosted) else grpc.StatusCode.DATA_LOSS
            context.abort(code, str(error))

    def _enter_stream(self) -> None:
        """Count a stream in. Raises StreamBroken if there are too many."""
        with self._state:
            if self._num_streams >= self._max_streams:
                raise StreamBroken(RESOURCE_EXHAUSTED, f"{self._max_streams} streams are open already")
            self._num_streams += 1

    def _leave_stream(self) -> None:
        with self._state:
            self._num_streams -= 1
            self._state.notify_all()

    def _compute_stream(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Answer the frames of a client of the gRPC server, one by one, until it closes the stream."""
        try:
            self._enter_stream()
            try:
                for data in requests:
                    entry = self._admit(data, time.monotonic(), context.is_active)
                    if isinstance(entry, Entry):
                        yield from (b"".join(self._encode(done)) for done in self._batcher.compute_all([entry]))
                    else:
                        yield b"".join(entry)
            finally:
                self._leave_stream()
        except StreamBroken as error:
            context.abort(_CODE_OF_NUMBER[error.code], str(error))

    def _serve(self, received: Sequence[Received]) -> None:
        """Answer the frames that came over routers' streams: all that wait together are computed together."""
        admitted: list[Received] = []
        entries: list[Entry] = []
        for message in received:
            stream = message.stream
            try:
                entry = self._admit(message.data, message.received_s, lambda stream=stream: stream.is_open)
            except StreamBroken as error:
                self._streams.end_stream(stream, error.code, str(error))
                continue
            if isinstance(entry, Entry):
                admitted.append(message)
                entries.append(entry)
            else:
                stream.answer(entry, len(message.data))
        if not entries:
            return
        for message, entry in zip(admitted, self._batcher.compute_all(entries), strict=True):
            try:
                message.stream.answer(self._encode(entry), len(message.data))
            except StreamBroken as error:
                self._streams.end_stream(message.stream, error.code, str(error))

    def _admit(self, data: Buffer, received_s: float, is_wanted: Callable[[], bool]) -> Entry | list[Buffer]:
        """Decode and check a frame. Returns it, ready to be computed, or the answer that refuses it.

        Raises StreamBroken if there is no number to answer to.
        """
        frame_id: int | None = None
        try:
            frame = wire.decode_request(data)
            frame_id = frame.frame_id
            self._check(frame)
        except BadFrame as error:
            frame_id = error.frame_id if frame_id is None else frame_id
            if frame_id is None:
                raise StreamBroken(INVALID_ARGUMENT, str(error)) from error
            return self._refuse(frame_id, error)
        except StreamBroken:
            raise
        except Exception as error:
            assert frame_id is not None
            return self._refuse(frame_id, error)
        return Entry(frame, received_s, received_s + frame.deadline_ms / 1000, is_wanted)

    def _check(self, frame: ComputeFrame) -> None:
        """Raises an ExpertsError if the frame is not for this replica, now."""
        if self._is_draining:
            raise Draining(f"replica {self._identity.replica_id} is draining")
        if frame.incarnation != self._identity.incarnation:
            raise StaleIncarnation(f"this is incarnation {self._identity.incarnation}, not {frame.incarnation}")
        self._group.check_frame(frame)

    def _encode(self, entry: Entry) -> list[Buffer]:
        """The answer to a frame that was computed, or failed to be."""
        frame, outcome = entry.frame, entry.outcome
        try:
            if isinstance(outcome, Computed):
                self._meter.note_frame(
                    frame.layer_id,
                    frame.pair_experts,
                    received_s=entry.received_s,
                    started_s=outcome.started_s,
                    ended_s=outcome.ended_s,
                )
                return wire.encode_response_parts(
                    frame_id=frame.frame_id,
                    incarnation=self._identity.incarnation,
                    tensor=outcome.tensor,
                    queue_us=int((outcome.started_s - entry.received_s) * 1e6),
                    compute_us=int((outcome.ended_s - outcome.started_s) * 1e6),
                    dtype=frame.reply_dtype,
                )
        except Exception as error:
            return self._refuse(frame.frame_id, error)
        assert outcome is not None
        return self._refuse(frame.frame_id, outcome)

    def _refuse(self, frame_id: int, error: BaseException) -> list[Buffer]:
        """An answer that says what went wrong."""
        if isinstance(error, ExpertsError):
            status, message = _STATUS_OF_ERROR.get(type(error), ComputeStatus.INTERNAL), str(error)
        elif is_out_of_memory(error):
            status, message = ComputeStatus.OVERLOADED, "out of memory for this frame"
        else:
            status, message = ComputeStatus.INTERNAL, f"{type(error).__name__}: {error}".splitlines()[0]
            logger.error("frame failed frame_id=%d", frame_id, exc_info=error)
        logger.debug("refused frame_id=%d status=%s: %s", frame_id, status.name, message)
        return [
            wire.encode_refusal(
                frame_id=frame_id, incarnation=self._identity.incarnation, status=status, message=message
            )
        ]


def is_out_of_memory(error: BaseException) -> bool:
    """Tell an allocation that failed from other errors; torch's CPU allocator raises a plain RuntimeError."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
