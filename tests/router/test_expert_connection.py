"""A connection to a peer that takes no frames: nobody waits for ever, and it dials again."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from experts.v1 import experts_pb2 as pb
from experts.wire import COMPUTE_METHOD, DESCRIBE_METHOD
from router.errors import CallTimeout, ConnectionLost
from router.expert_connection import ExpertConnection
from router.expert_table import ReplicaEntry
from tests.router.in_process import DEADLINE_S

HIDDEN_SIZE = 8
# More than HTTP/2's flow control lets a peer buffer that reads nothing.
LARGE_FRAME = b"x" * (16 * 1024 * 1024)


class DeafReplica(grpc.GenericRpcHandler):
    """Says who it is and opens streams, but never reads a frame. garble: answers nonsense, unasked."""

    def __init__(self) -> None:
        self.garble = threading.Event()
        self.stopped = threading.Event()
        self._server = grpc.server(ThreadPoolExecutor(8))
        self._server.add_generic_rpc_handlers((self,))
        port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        self.entry = ReplicaEntry("r0", f"127.0.0.1:{port}", 1, "digest", "numerics")

    def stop(self) -> None:
        self.stopped.set()
        self.garble.set()
        self._server.stop(0).wait(DEADLINE_S)

    def service(self, handler_call_details: Any) -> Any:
        if handler_call_details.method == DESCRIBE_METHOD:
            return grpc.unary_unary_rpc_method_handler(
                self._describe, pb.DescribeRequest.FromString, pb.DescribeResponse.SerializeToString
            )
        assert handler_call_details.method == COMPUTE_METHOD
        return grpc.stream_stream_rpc_method_handler(self._compute)

    def _describe(self, request: Any, context: Any) -> Any:
        entry = self.entry
        return pb.DescribeResponse(
            replica_id=entry.replica_id,
            incarnation=entry.incarnation,
            weight_digest=entry.weight_digest,
            hidden_size=HIDDEN_SIZE,
        )

    def _compute(self, requests: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
        context.send_initial_metadata(())
        self.garble.wait(DEADLINE_S)
        self.garble.clear()
        if not self.stopped.is_set():
            yield b"\xff\xff\xff"


@pytest.fixture
def deaf() -> Iterator[DeafReplica]:
    replica = DeafReplica()
    yield replica
    replica.stop()


class Watched:
    """A connection and the number of times it became ready."""

    def __init__(self, entry: ReplicaEntry) -> None:
        self.num_connected = 0
        self._changed = asyncio.Event()
        self.connection = ExpertConnection(entry, HIDDEN_SIZE, self._note)

    def _note(self) -> None:
        self.num_connected += self.connection.ready
        self._changed.set()

    async def wait_connected(self, times: int) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while self.num_connected < times:
                self._changed.clear()
                await self._changed.wait()

    def call(self, timeout_s: float) -> "asyncio.Task[Any]":
        connection = self.connection
        return asyncio.create_task(connection.call(connection.next_frame_id(), [LARGE_FRAME], timeout_s))


@contextlib.asynccontextmanager
async def connected(entry: ReplicaEntry) -> AsyncIterator[Watched]:
    watched = Watched(entry)
    try:
        await watched.wait_connected(1)
        yield watched
    finally:
        await watched.connection.close()


async def test_a_write_that_times_out_fails_what_is_outstanding_and_dials_again(deaf: DeafReplica) -> None:
    async with connected(deaf.entry) as watched:
        first, second = watched.call(0.3), watched.call(DEADLINE_S)
        with pytest.raises(CallTimeout):
            await first
        with pytest.raises(ConnectionLost):
            await asyncio.wait_for(second, DEADLINE_S)
        await watched.wait_connected(2)
        assert watched.connection.outstanding == 0


async def test_a_write_that_is_cancelled_does_not_end_the_connection_for_good(deaf: DeafReplica) -> None:
    async with connected(deaf.entry) as watched:
        calls = [watched.call(DEADLINE_S), watched.call(DEADLINE_S)]
        await asyncio.wait(calls, timeout=0.1)  # until the first one is in the middle of its write
        calls[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await calls[0]
        with pytest.raises(ConnectionLost):
            await asyncio.wait_for(calls[1], DEADLINE_S)
        await watched.wait_connected(2)


async def test_a_stream_that_is_dropped_under_a_write_is_a_lost_connection(
    deaf: DeafReplica, caplog: pytest.LogCaptureFixture
) -> None:
    """Not a cancellation: that would end the engine, which waits for the call, in silence."""
    async with connected(deaf.entry) as watched:
        calls = [watched.call(DEADLINE_S) for _ in range(3)]
        await asyncio.wait(calls, timeout=0.1)
        deaf.garble.set()
        for call in calls:
            with pytest.raises(ConnectionLost):
                await asyncio.wait_for(call, DEADLINE_S)
        await watched.wait_connected(2)
    assert [record for record in caplog.records if record.name == "asyncio" and record.levelno >= logging.ERROR] == []


async def test_closing_fails_what_is_outstanding(deaf: DeafReplica) -> None:
    async with connected(deaf.entry) as watched:
        calls = [watched.call(DEADLINE_S) for _ in range(2)]
        await asyncio.wait(calls, timeout=0.1)
        await asyncio.wait_for(watched.connection.close(), DEADLINE_S)
        for call in calls:
            with pytest.raises(ConnectionLost):
                await asyncio.wait_for(call, DEADLINE_S)
