"""One router as this process sees it: its channel, the streams that run there, and whether it is alive.

A router that dies breaks its streams. One that is stopped, or hangs, does not, and a stream that is silent says nothing
either: a long prompt takes its time. So the router of a silent stream is asked for its status, and a router that does
not answer loses its streams as soon as another one is ready to go on with them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

import grpc
import grpc.aio

from experts.channels import LastingChannel
from experts.tls import ClusterTls
from router.api.errors import Unavailable
from router.api.settings import ApiSettings
from router.cancellation import is_task_cancelled
from router.v1 import router_pb2, router_pb2_grpc

logger = logging.getLogger(__name__)

_CHANNEL_OPTIONS = (
    # The largest response is a chunk of prompt logprobs.
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
    # A silent peer is found within keepalive_time + keepalive_timeout, also where there is no other router.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # By default a channel waits up to two minutes before it tries a lost address again.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Retrying is done here; gRPC's own stops silently above 256 KiB.
    ("grpc.enable_retries", 0),
)


class RouterSilent(Exception):
    """A stream was given up because its router does not answer."""


class RouterLink:
    """Use it on one event loop only.

    silent_since_s: since when (the loop's time) the router has not answered; None: it does, as far as is known.
    weights_version, takes_new: as its RouterEndpoint says.
    """

    def __init__(
        self,
        endpoint: str,
        settings: ApiSettings,
        tls: ClusterTls | None,
        find_other: Callable[[RouterLink], Awaitable[bool]],
    ) -> None:
        """tls: None: unencrypted. find_other: whether another router than this one is ready for its streams."""
        self.endpoint = endpoint
        self.weights_version = 0
        self.takes_new = True
        self.last_used = 0.0
        self.silent_since_s: float | None = None
        self._settings = settings
        self._find_other = find_other
        self._streams: set[_Stream] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._channel = LastingChannel(endpoint, tls, _CHANNEL_OPTIONS, router_pb2_grpc.RouterServiceStub)

    @property
    def num_in_flight(self) -> int:
        return len(self._streams)

    async def generate(
        self, request: router_pb2.GenerateRequest, timeout_s: float
    ) -> AsyncGenerator[router_pb2.GenerateResponse, None]:
        """Yield responses; closing the generator cancels the call. Raises grpc.aio.AioRpcError, RouterSilent."""
        loop = asyncio.get_running_loop()
        self.last_used = loop.time()
        stream = _Stream(self._channel.stub.Generate(request, timeout=max(timeout_s, 0.0)), loop.time())
        self._streams.add(stream)
        if self._watcher is None or self._watcher.done():
            self._watcher = loop.create_task(self._watch())
        try:
            async for response in stream.call:
                stream.heard_at_s = loop.time()
                yield response
        except asyncio.CancelledError as error:
            if is_task_cancelled():
                raise
            if stream.is_given_up:
                raise RouterSilent(f"no answer for {self._settings.router_dead_s:g} s") from error
            raise Unavailable("The server is shutting down.", retry_after_s=1) from error
        finally:
            self._streams.discard(stream)
            stream.call.cancel()

    async def fetch_status(self, timeout_s: float) -> router_pb2.StatusResponse | None:
        """None: no answer in time."""
        try:
            return await self._channel.stub.Status(router_pb2.StatusRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError:
            return None
        except asyncio.CancelledError:
            if is_task_cancelled():
                raise
            return None  # it left the address list meanwhile

    async def exchange_tallies(
        self, tallies: Sequence[router_pb2.Tally], timeout_s: float
    ) -> Sequence[router_pb2.Tally]:
        """What the router knows; nothing if it does not answer in time."""
        try:
            request = router_pb2.ExchangeTalliesRequest(tallies=tallies)
            return (await self._channel.stub.ExchangeTallies(request, timeout=timeout_s)).tallies
        except grpc.aio.AioRpcError:
            return ()
        except asyncio.CancelledError:
            if is_task_cancelled():
                raise
            return ()  # it left the address list meanwhile

    def is_connected(self) -> bool:
        """Whether a failure just now came from the router itself rather than from losing it."""
        return self._channel.get_state() is grpc.ChannelConnectivity.READY

    def is_unreachable(self) -> bool:
        """Whether the last attempt to connect failed; the channel keeps trying by itself."""
        return self._channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.TRANSIENT_FAILURE

    async def close(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        await self._channel.close()

    async def _watch(self) -> None:
        """Runs as long as there are streams, or until a router that was silent answers again."""
        loop = asyncio.get_running_loop()
        while self._streams or self.silent_since_s is not None:
            await asyncio.sleep(self._settings.router_silence_s)
            asked_at_s = loop.time()
            heard_at_s = min((stream.heard_at_s for stream in self._streams), default=asked_at_s)
            if self.silent_since_s is None and asked_at_s - heard_at_s < self._settings.router_silence_s:
                continue
            if await self._is_alive():
                if self.silent_since_s is not None:
                    logger.info("router answers again endpoint=%s", self.endpoint)
                self.silent_since_s = None
                continue
            if self.silent_since_s is None:
                self.silent_since_s = asked_at_s
                logger.warning("router silent endpoint=%s num_streams=%d", self.endpoint, len(self._streams))
            waited_s = loop.time() - self.silent_since_s
            # Without another router there is nothing to gain: it may only be slow, and would start all over.
            if waited_s >= self._settings.router_wait_s or await self._find_other(self):
                for stream in self._streams:
                    if stream.heard_at_s < asked_at_s:
                        stream.is_given_up = True
                        stream.call.cancel()

    async def _is_alive(self) -> bool:
        """Whether it answers, and its steps end. A broken connection is no silence: it ends the streams by itself."""
        try:
            status = await self._channel.stub.Status(router_pb2.StatusRequest(), timeout=self._settings.router_dead_s)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return self.silent_since_s is None
            return error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
        except asyncio.CancelledError:
            if is_task_cancelled():
                raise
            return True  # its channel was closed, which ends the streams too
        # A step that waits for experts ends by itself, after the router's own expert_wait_s.
        return status.unserved_ms > 0 or status.current_step_ms <= self._settings.max_step_s * 1000


class _Stream:
    """heard_at_s: when the last response was taken, or the call made."""

    def __init__(
        self, call: grpc.aio.UnaryStreamCall[router_pb2.GenerateRequest, router_pb2.GenerateResponse], now_s: float
    ) -> None:
        self.call = call
        self.heard_at_s = now_s
        self.is_given_up = False
