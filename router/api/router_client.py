"""Calls to routers: which router gets a sequence, what is tried again elsewhere, and what a failure means.

A sequence that loses its router, or that no router takes for the moment, is offered again within a bound; what it
has produced so far becomes part of the prompt, so the client's stream just goes on (the sampler's noise depends on
seed and position only). Where routers are is the business of RouterEndpoints, which one suits a prompt that of
router_choice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import NamedTuple, Protocol

import grpc
import grpc.aio

from router.api.errors import ApiError, BadRequest, InternalError, Overloaded, RequestTimedOut, Unavailable
from router.api.router_choice import Candidate, PrefixDirectory, choose_router, compute_blocks
from router.api.settings import ApiSettings
from router.cancellation import is_task_cancelled
from router.v1 import router_pb2, router_pb2_grpc

logger = logging.getLogger(__name__)

# The address list is at most this old when a request picks a router; it is renewed beside requests, not by them.
_REFRESH_INTERVAL_S = 1.0
# Pause before a request is offered again to routers that have all turned it away.
_FIRST_PAUSE_S = 0.05
_LAST_PAUSE_S = 1.0
_MAX_DETAILS_LENGTH = 300
# A request that has cost this many routers their connection may be what kills them.
_MAX_ROUTERS_LOST = 3

_CHANNEL_OPTIONS = (
    # The largest response is a chunk of prompt logprobs.
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
    # A silent peer is found within keepalive_time + keepalive_timeout.
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


class RouterEndpoints(Protocol):
    """Knows where routers listen."""

    async def get(self) -> Sequence[str]:
        """The addresses (host:port) of the live routers; may be empty. May raise when it cannot tell."""
        ...


class StaticEndpoints:
    """A fixed list of addresses."""

    def __init__(self, endpoints: Sequence[str]) -> None:
        self._endpoints = tuple(endpoints)

    async def get(self) -> Sequence[str]:
        return self._endpoints


class RouterStatus(NamedTuple):
    endpoint: str
    status: router_pb2.StatusResponse | None
    """None: the router did not answer in time."""


class RouterClient:
    """Use it on one event loop only; channels are opened on first use."""

    def __init__(self, endpoints: RouterEndpoints, settings: ApiSettings, eos_token_ids: Sequence[int]) -> None:
        self._endpoints = endpoints
        self._settings = settings
        self._eos_token_ids = frozenset(eos_token_ids)
        self._routers: dict[str, _Router] = {}
        self._retired: list[_Router] = []
        self._prefixes = PrefixDirectory()
        self._refreshed_at_s: float | None = None
        self._refresh_task: asyncio.Task[None] | None = None

    async def generate(self, request: router_pb2.GenerateRequest) -> AsyncGenerator[router_pb2.GenerateResponse, None]:
        """Yield the responses for one sequence up to and including the one with finish_reason.

        Close the generator (aclosing) to cancel the work. Raises ApiError.
        """
        now_s = asyncio.get_running_loop().time
        deadline_s = now_s() + self._settings.request_timeout_s
        sequence = _Sequence(request, self._eos_token_ids)
        attempts = _Attempts(self._settings.router_retry_s)
        while True:
            local_finish = sequence.local_finish()
            if local_finish is not None:
                yield local_finish
                return
            router = await self._pick(request, attempts.tried)
            if router is None:
                if await attempts.pause(now_s()):
                    continue
                raise attempts.error(self._settings.retry_after_s)
            started_s = now_s()
            was_connected = router.is_connected()
            sequence.begin_attempt()
            try:
                async with aclosing(router.generate(sequence.remaining(), deadline_s - started_s)) as responses:
                    async for response in responses:
                        if sequence.note(response):
                            attempts.succeeded()
                        yield response
                        if response.finish_reason != router_pb2.FINISH_REASON_UNSPECIFIED:
                            return
                failure = _Failure("the stream ended early", is_connection_lost=False)
            except grpc.aio.AioRpcError as error:
                if not _may_repeat(error):
                    raise _translate(error, self._settings.retry_after_s) from error
                failure = _Failure(
                    f"{error.code().name}: {error.details()}",
                    is_connection_lost=not router.is_connected(),
                    was_connected=was_connected,
                    is_overload=error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED,
                )
            logger.log(
                logging.WARNING if attempts.is_first else logging.DEBUG,
                "router failed request_id=%s endpoint=%s tokens=%d reason=%s",
                request.request_id, router.endpoint, sequence.num_tokens, failure.reason,
            )  # fmt: skip
            if failure.is_connection_lost:
                self._prefixes.forget(router.endpoint)
            attempts.failed(router.endpoint, failure, started_s, now_s())
            if attempts.is_dangerous:
                raise attempts.error(self._settings.retry_after_s)

    async def fetch_statuses(self) -> list[RouterStatus]:
        """Ask every router for its status, all at once, within status_timeout_s."""
        await self._refresh()
        routers = list(self._routers.values())
        return list(await asyncio.gather(*(self._fetch_status(router) for router in routers)))

    async def close(self) -> None:
        """Cancel what runs and close all channels."""
        if self._refresh_task is not None:
            self._refresh_task.cancel()
        routers = [*self._routers.values(), *self._retired]
        self._routers.clear()
        self._retired.clear()
        await asyncio.gather(*(router.close() for router in routers))

    async def _fetch_status(self, router: _Router) -> RouterStatus:
        try:
            return RouterStatus(router.endpoint, await router.fetch_status(self._settings.status_timeout_s))
        except grpc.aio.AioRpcError:
            return RouterStatus(router.endpoint, None)
        except asyncio.CancelledError:
            if is_task_cancelled():
                raise
            return RouterStatus(router.endpoint, None)  # it left the address list meanwhile

    async def _pick(self, request: router_pb2.GenerateRequest, tried: set[str]) -> _Router | None:
        """The router that suits request best among those not tried; None if all were."""
        now_s = asyncio.get_running_loop().time()
        if tried or not self._routers or self._refreshed_at_s is None:
            await self._refresh()
        elif now_s - self._refreshed_at_s > _REFRESH_INTERVAL_S:
            self._start_refresh()
        candidates = [router for router in self._routers.values() if router.endpoint not in tried]
        if not candidates:
            return None
        if len(self._routers) == 1:
            return candidates[0]
        # A lost one may stay in the address list for a while; it must not cost every request an attempt.
        candidates = [router for router in candidates if not router.is_unreachable()] or candidates
        blocks = compute_blocks(request.prompt_token_ids)
        endpoint = choose_router(
            [Candidate(router.endpoint, router.num_in_flight, router.last_used) for router in candidates],
            blocks,
            self._prefixes.count_held(blocks),
        )
        # From now on, so that requests that come together go together.
        self._prefixes.note(blocks, endpoint)
        return self._routers[endpoint]

    def _start_refresh(self) -> asyncio.Task[None]:
        if self._refresh_task is None or self._refresh_task.done():
            self._refresh_task = asyncio.create_task(self._fetch_endpoints())
        return self._refresh_task

    async def _refresh(self) -> None:
        """Renew the address list, but do not wait long for it: the old one may still do."""
        await asyncio.wait({self._start_refresh()}, timeout=self._settings.status_timeout_s)

    async def _fetch_endpoints(self) -> None:
        try:
            async with asyncio.timeout(self._settings.status_timeout_s):
                endpoints = list(dict.fromkeys(await self._endpoints.get()))
        except Exception as error:  # Whatever the lookup raises: without an answer the known routers keep serving.
            logger.warning("router addresses unknown reason=%r", error)
            return
        self._refreshed_at_s = asyncio.get_running_loop().time()
        for endpoint in endpoints:
            if endpoint not in self._routers:
                self._routers[endpoint] = _Router(endpoint)
        for endpoint in [endpoint for endpoint in self._routers if endpoint not in endpoints]:
            self._retired.append(self._routers.pop(endpoint))
        idle = [router for router in self._retired if router.num_in_flight == 0]
        self._retired = [router for router in self._retired if router.num_in_flight > 0]
        await asyncio.gather(*(router.close() for router in idle))


class _Router:
    """One router's channel and what this process runs on it."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.num_in_flight = 0
        self.last_used = 0.0
        self._channel = grpc.aio.insecure_channel(endpoint, options=_CHANNEL_OPTIONS)
        self._stub = router_pb2_grpc.RouterServiceStub(self._channel)

    async def generate(
        self, request: router_pb2.GenerateRequest, timeout_s: float
    ) -> AsyncGenerator[router_pb2.GenerateResponse, None]:
        """Yield responses; closing the generator cancels the call. Raises grpc.aio.AioRpcError."""
        self.num_in_flight += 1
        self.last_used = asyncio.get_running_loop().time()
        call = self._stub.Generate(request, timeout=max(timeout_s, 0.0))
        try:
            async for response in call:
                yield response
        except asyncio.CancelledError as error:
            if is_task_cancelled():
                raise
            raise Unavailable("The server is shutting down.", retry_after_s=1) from error
        finally:
            self.num_in_flight -= 1
            call.cancel()

    async def fetch_status(self, timeout_s: float) -> router_pb2.StatusResponse:
        return await self._stub.Status(router_pb2.StatusRequest(), timeout=timeout_s)

    def is_connected(self) -> bool:
        """Whether a failure just now came from the router itself rather than from losing it."""
        return self._channel.get_state() is grpc.ChannelConnectivity.READY

    def is_unreachable(self) -> bool:
        """Whether the last attempt to connect failed; the channel keeps trying by itself."""
        return self._channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.TRANSIENT_FAILURE

    async def close(self) -> None:
        await self._channel.close()


class _Failure(NamedTuple):
    reason: str
    is_connection_lost: bool
    was_connected: bool = True
    """Before the attempt; a router that could not even be reached was not lost through it."""
    is_overload: bool = False


class _Attempts:
    """Decides how long a sequence is offered again. Starts anew with every token that arrives."""

    def __init__(self, retry_s: float) -> None:
        self._retry_s = retry_s
        self.tried: set[str] = set()
        self._failures: list[_Failure] = []
        self._give_up_at_s: float | None = None
        self._pause_s = _FIRST_PAUSE_S
        self._num_lost = 0

    @property
    def is_first(self) -> bool:
        """Whether nothing has failed since the last token."""
        return self._give_up_at_s is None

    @property
    def is_dangerous(self) -> bool:
        """Whether routers keep dying of this sequence."""
        return self._num_lost >= _MAX_ROUTERS_LOST

    def succeeded(self) -> None:
        self.tried.clear()
        self._failures.clear()
        self._give_up_at_s = None
        self._pause_s = _FIRST_PAUSE_S

    def failed(self, endpoint: str, failure: _Failure, started_s: float, failed_s: float) -> None:
        self.tried.add(endpoint)
        self._failures.append(failure)
        self._num_lost += failure.is_connection_lost and failure.was_connected
        if self._give_up_at_s is None:
            # A router that says no has already waited for experts to come back; a lost one says nothing of them.
            self._give_up_at_s = (failed_s if failure.is_connection_lost else started_s) + self._retry_s

    async def pause(self, now_s: float) -> bool:
        """All known routers were tried: wait a moment and forget about it. False: give up instead."""
        if self._give_up_at_s is None:
            self._give_up_at_s = now_s + self._retry_s
        if self._is_overload() or now_s + self._pause_s > self._give_up_at_s:
            return False
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, _LAST_PAUSE_S)
        self.tried.clear()
        self._failures.clear()
        return True

    def error(self, retry_after_s: int) -> ApiError:
        if self._is_overload():
            return Overloaded("The server is at its limit of waiting requests.", retry_after_s=retry_after_s)
        return Unavailable("No router can take the request at the moment.", retry_after_s=retry_after_s)

    def _is_overload(self) -> bool:
        """Every router is full: waiting here would only be another queue."""
        return bool(self._failures) and all(failure.is_overload for failure in self._failures)


class _Sequence:
    """What one sequence has got so far, and what is left to ask for."""

    def __init__(self, request: router_pb2.GenerateRequest, eos_token_ids: frozenset[int]) -> None:
        self._request = request
        self._end_ids = frozenset(request.stop_token_ids) | (frozenset() if request.ignore_eos else eos_token_ids)
        self._token_ids: list[int] = []
        self._num_prompt_tokens = 0
        self._num_to_skip = 0

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids)

    def begin_attempt(self) -> None:
        self._num_to_skip = 0 if self._token_ids else self._num_prompt_tokens

    def note(self, response: router_pb2.GenerateResponse) -> bool:
        """Count response in, removing prompt tokens that an earlier attempt has already brought. Whether it brings
        anything new."""
        if self._num_to_skip > 0 and response.prompt_tokens:
            num_dropped = min(self._num_to_skip, len(response.prompt_tokens))
            self._num_to_skip -= num_dropped
            del response.prompt_tokens[:num_dropped]
        self._num_prompt_tokens += len(response.prompt_tokens)
        self._token_ids.extend(token.token_id for token in response.tokens)
        return bool(response.prompt_tokens or response.tokens)

    def remaining(self) -> router_pb2.GenerateRequest:
        """The request that goes on behind the tokens received."""
        if not self._token_ids:
            return self._request
        request = router_pb2.GenerateRequest()
        request.CopyFrom(self._request)
        request.prompt_token_ids.extend(self._token_ids)
        request.num_answer_tokens = self.num_tokens
        request.max_tokens -= self.num_tokens
        request.min_tokens = max(0, request.min_tokens - self.num_tokens)
        request.ClearField("prompt_logprobs")
        return request

    def local_finish(self) -> router_pb2.GenerateResponse | None:
        """The closing response where a router was lost between the last token and saying so; None before."""
        if not self._token_ids:
            return None
        last = self._token_ids[-1]
        if last in self._end_ids and self.num_tokens > self._request.min_tokens:
            return router_pb2.GenerateResponse(finish_reason=router_pb2.FINISH_REASON_STOP, stop_token_id=last)
        if self.num_tokens >= self._request.max_tokens:
            return router_pb2.GenerateResponse(finish_reason=router_pb2.FINISH_REASON_LENGTH)
        return None


def _may_repeat(error: grpc.aio.AioRpcError) -> bool:
    """CANCELLED comes from a router that is being stopped; our own cancellation never gets here."""
    return error.code() in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.CANCELLED,
    )


def _translate(error: grpc.aio.AioRpcError, retry_after_s: int) -> ApiError:
    code = error.code()
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        details = " ".join((error.details() or "The router refused the request.").split())
        return BadRequest(details[:_MAX_DETAILS_LENGTH])
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return RequestTimedOut("The request took longer than the server allows.")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Overloaded("The server is at its limit of waiting requests.", retry_after_s=retry_after_s)
    logger.error("router error code=%s details=%s", code.name, error.details())
    return InternalError()
