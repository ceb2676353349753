"""Calls to routers: which router gets a sequence, what is tried again elsewhere, and what a failure means.

A sequence that loses its router, or that no router takes for the moment, is offered again within a bound (attempts);
what it has got so far becomes part of the prompt (continuation), so the client's stream just goes on. Where routers are
is the business of RouterEndpoints, which one suits a prompt that of router_choice, whether one lives that of
router_link.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import NamedTuple, Protocol

import grpc
import grpc.aio

from experts.tls import load_cluster_tls
from router.api.api_metrics import ApiMetrics
from router.api.attempts import Attempts, Failure, FailureKind
from router.api.continuation import Continuation, WeightsPin
from router.api.errors import ApiError, BadRequest, InternalError, RequestTimedOut
from router.api.request_scope import current_request
from router.api.router_choice import Candidate, PrefixDirectory, choose_router, compute_blocks
from router.api.router_link import RouterLink, RouterSilent
from router.api.sequence_observation import SequenceObservation
from router.api.settings import ApiSettings
from router.api.thinking_budget import ThinkingBudget
from router.cancellation import is_task_cancelled
from router.v1 import router_pb2

logger = logging.getLogger(__name__)

# The address list is at most this old when a request picks a router; it is renewed beside requests, not by them.
_REFRESH_INTERVAL_S = 1.0
_MAX_DETAILS_LENGTH = 300


class RouterEndpoint(NamedTuple):
    """address: host:port. weights_version: of the checkpoint; 0: not known. takes_new: False while a cluster is
    upgraded, for routers whose turn has not come yet or is over: these only finish what they have begun."""

    address: str
    weights_version: int = 0
    takes_new: bool = True


class RouterEndpoints(Protocol):
    """Knows where routers listen."""

    async def get(self) -> Sequence[RouterEndpoint]:
        """Of the live routers; may be empty. May raise when it cannot tell."""
        ...


class StaticEndpoints:
    """A fixed list of addresses."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._endpoints = tuple(RouterEndpoint(address) for address in addresses)

    async def get(self) -> Sequence[RouterEndpoint]:
        return self._endpoints


class RouterStatus(NamedTuple):
    endpoint: str
    status: router_pb2.StatusResponse | None
    """None: the router did not answer in time."""


class RouterClient:
    """Use it on one event loop only; channels are opened on first use. Raises ConfigError for unusable certificates."""

    def __init__(
        self, endpoints: RouterEndpoints, settings: ApiSettings, eos_token_ids: Sequence[int], metrics: ApiMetrics
    ) -> None:
        self._endpoints = endpoints
        self._settings = settings
        self._tls = load_cluster_tls(settings.cluster_tls_dir)
        self._eos_token_ids = frozenset(eos_token_ids)
        self._metrics = metrics
        self._routers: dict[str, RouterLink] = {}
        self._retired: list[RouterLink] = []
        self._prefixes = PrefixDirectory()
        self._refreshed_at_s: float | None = None
        self._refresh_task: asyncio.Task[None] | None = None

    async def generate(
        self, request: router_pb2.GenerateRequest, thinking: ThinkingBudget | None = None
    ) -> AsyncGenerator[router_pb2.GenerateResponse, None]:
        """Yield the responses for one sequence up to and including the one with finish_reason. thinking: None: no
        limit.

        Close the generator (aclosing) to cancel the work. Raises ApiError.
        """
        observation = SequenceObservation(self._metrics, request)
        scope = current_request.get()
        span = None if scope is None or scope.span is None else scope.span.add_child("generate", time.time_ns())
        if span is not None:
            request.traceparent = span.traceparent
        try:
            pin = WeightsPin() if scope is None else scope.weights
            async with aclosing(self._generate(request, pin, thinking)) as responses:
                async for response in responses:
                    observation.note(response)
                    yield response
        except ApiError as error:
            observation.fail(error.code or "error")
            raise
        except asyncio.CancelledError:
            observation.fail("abort")
            raise
        except GeneratorExit:
            # The client left between two responses, or the front found a stop string.
            if is_task_cancelled():
                observation.fail("abort")
            else:
                observation.end("stop")
            raise
        except Exception:
            observation.fail("internal_error")
            raise
        finally:
            if span is not None:
                span.end()

    async def _generate(
        self, request: router_pb2.GenerateRequest, pin: WeightsPin, thinking: ThinkingBudget | None
    ) -> AsyncGenerator[router_pb2.GenerateResponse, None]:
        now_s = asyncio.get_running_loop().time
        scope = current_request.get()
        age_s = 0.0 if scope is None else time.monotonic() - scope.arrived_s
        deadline_s = now_s() + self._settings.request_timeout_s - age_s
        continuation = Continuation(request, self._eos_token_ids, pin, thinking)
        attempts = Attempts(self._settings.router_wait_s)
        while True:
            router = await self._pick(request, attempts.tried, pin.version)
            if router is None:
                if await attempts.pause(now_s()):
                    continue
                raise attempts.error(self._settings.retry_after_s)
            was_connected = router.is_connected()
            remaining = continuation.begin_attempt()
            reason = "the stream ended early"
            try:
                async with aclosing(router.generate(remaining, deadline_s - now_s())) as responses:
                    async for response in responses:
                        if continuation.is_foreign(response):
                            reason = "its weights are not those of the other choices"
                            break
                        if continuation.note_(response):
                            attempts.progressed()
                        yield response
                        if response.finish_reason != router_pb2.FINISH_REASON_UNSPECIFIED:
                            return
                        if continuation.is_cut:
                            break
                if continuation.is_cut:
                    continue
                failure = Failure(FailureKind.REFUSED, reason, now_s())
            except RouterSilent as error:
                failure = Failure(FailureKind.LOST, str(error), router.silent_since_s or now_s())
            except grpc.aio.AioRpcError as error:
                found = _classify(error, router, was_connected=was_connected, failed_at_s=now_s())
                if found is None:
                    raise _translate(error) from error
                failure = found
            logger.log(
                logging.WARNING if attempts.is_first else logging.DEBUG,
                "router failed request_id=%s endpoint=%s tokens=%d kind=%s reason=%s",
                request.request_id, router.endpoint, continuation.num_tokens, failure.kind.value, failure.reason,
            )  # fmt: skip
            if failure.kind in (FailureKind.LOST, FailureKind.UNREACHED):
                self._prefixes.forget(router.endpoint)
            attempts.failed(router.endpoint, failure, continuation.num_tokens)
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

    async def exchange_tallies(self, tallies: Sequence[router_pb2.Tally], timeout_s: float) -> list[router_pb2.Tally]:
        """Give tallies to every router that answers. Returns what they all know."""
        if not self._routers:
            await self._refresh()
        routers = [router for router in self._routers.values() if router.silent_since_s is None]
        answers = await asyncio.gather(*(router.exchange_tallies(tallies, timeout_s) for router in routers))
        return [tally for answer in answers for tally in answer]

    async def _fetch_status(self, router: RouterLink) -> RouterStatus:
        return RouterStatus(router.endpoint, await router.fetch_status(self._settings.status_timeout_s))

    async def _find_other(self, silent: RouterLink) -> bool:
        """Whether a router is ready for the streams of one that does not answer."""
        await self._refresh()
        others = [
            router
            for router in self._routers.values()
            if router is not silent
            and router.silent_since_s is None
            and router.weights_version == silent.weights_version
        ]
        statuses = await asyncio.gather(*(self._fetch_status(router) for router in others))
        return any(status is not None and status.ready for _, status in statuses)

    async def _pick(
        self, request: router_pb2.GenerateRequest, tried: set[str], weights_version: int
    ) -> RouterLink | None:
        """The router that suits request best among those not tried; None if all were. weights_version: of the answer so
        far, which only routers of the same weights may go on with; 0: nothing was answered yet."""
        now_s = asyncio.get_running_loop().time()
        if tried or self._refreshed_at_s is None or now_s - self._refreshed_at_s > _REFRESH_INTERVAL_S:
            self._start_refresh()
        candidates = self._list_candidates(tried, weights_version)
        if not candidates:
            await self._refresh()
            candidates = self._list_candidates(tried, weights_version)
            if not candidates:
                return None
        if len(self._routers) == 1:
            return candidates[0]
        # A lost one may stay in the address list for a while; it must not cost every request an attempt.
        answering = [router for router in candidates if router.silent_since_s is None]
        candidates = [router for router in answering if not router.is_unreachable()] or answering or candidates
        blocks = compute_blocks(request.prompt_token_ids, request.cache_salt)
        endpoint = choose_router(
            [Candidate(router.endpoint, router.num_in_flight, router.last_used) for router in candidates],
            blocks,
            self._prefixes.count_held(blocks),
        )
        # From now on, so that requests that come together go together.
        self._prefixes.note(blocks, endpoint)
        return self._routers[endpoint]

    def _list_candidates(self, tried: set[str], weights_version: int) -> list[RouterLink]:
        return [
            router
            for router in self._routers.values()
            if router.endpoint not in tried
            and (router.weights_version == weights_version if weights_version else router.takes_new)
        ]

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
                endpoints = {endpoint.address: endpoint for endpoint in await self._endpoints.get()}
        except Exception as error:  # Whatever the lookup raises: without an answer the known routers keep serving.
            logger.warning("router addresses unknown reason=%r", error)
            return
        self._refreshed_at_s = asyncio.get_running_loop().time()
        for address, endpoint in endpoints.items():
            if address not in self._routers:
                self._routers[address] = RouterLink(address, self._settings, self._tls, self._find_other)
            self._routers[address].weights_version = endpoint.weights_version
            self._routers[address].takes_new = endpoint.takes_new
        for address in [address for address in self._routers if address not in endpoints]:
            self._retired.append(self._routers.pop(address))
        idle = [router for router in self._retired if router.num_in_flight == 0]
        self._retired = [router for router in self._retired if router.num_in_flight > 0]
        await asyncio.gather(*(router.close() for router in idle))


def _classify(
    error: grpc.aio.AioRpcError, router: RouterLink, *, was_connected: bool, failed_at_s: float
) -> Failure | None:
    """What an attempt came to; None: it is not to be repeated. was_connected: before the attempt; a router that could
    not even be reached was not lost through it. Our own cancellation never gets here."""
    code, reason = error.code(), f"{error.code().name}: {error.details()}"
    if code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.DEADLINE_EXCEEDED):
        return None
    if not router.is_connected():
        since_s = failed_at_s if router.silent_since_s is None else router.silent_since_s
        return Failure(FailureKind.LOST if was_connected else FailureKind.UNREACHED, reason, since_s)
    kind = _KIND_OF_CODE.get(code)
    return None if kind is None else Failure(kind, reason, failed_at_s)


_KIND_OF_CODE = {
    grpc.StatusCode.UNAVAILABLE: FailureKind.REFUSED,
    grpc.StatusCode.CANCELLED: FailureKind.REFUSED,  # by a router that is being stopped
    grpc.StatusCode.RESOURCE_EXHAUSTED: FailureKind.OVERLOADED,
    grpc.StatusCode.FAILED_PRECONDITION: FailureKind.NO_EXPERTS,
}


def _translate(error: grpc.aio.AioRpcError) -> ApiError:
    code = error.code()
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        details = " ".join((error.details() or "The router refused the request.").split())
        return BadRequest(details[:_MAX_DETAILS_LENGTH])
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return RequestTimedOut("The request took longer than the server allows.")
    logger.error("router error code=%s details=%s", code.name, error.details())
    return InternalError()
