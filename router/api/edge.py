"""The outermost layer of the app: a request id for everything, an answer to everything, and a limit on the number
of requests at once. Plain ASGI, because middleware that wraps streams hides the client's disconnect from them."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from experts.logs import logged_request_id
from router.api.api_metrics import ApiMetrics
from router.api.errors import ClientGone, InternalError, Overloaded, error_response
from router.api.request_scope import RequestScope, current_request
from router.api.settings import ApiSettings
from router.tracing import Tracer

logger = logging.getLogger(__name__)

# Machines ask for these every few seconds.
_QUIET_ROUTES = frozenset({"/health", "/health/live", "/health/ready", "/metrics", "/ui/state"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def is_request_id(text: str) -> bool:
    """Whether a client's X-Request-Id may stand in logs and answers."""
    return _REQUEST_ID.fullmatch(text) is not None


class Edge:
    """Takes X-Request-Id from the client where it is well-formed, makes one otherwise, and returns it."""

    def __init__(self, app: ASGIApp, settings: ApiSettings, metrics: ApiMetrics, tracer: Tracer | None = None) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._tracer = tracer
        self._num_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if is_request_id(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        request = RequestScope(request_id)
        if self._tracer is not None and scope["method"] == "POST":
            request.span = self._tracer.start("request", Headers(scope=scope).get("traceparent", ""))
        current_request.set(request)
        logged_request_id.set(request_id)
        is_started = False
        # Of a client that leaves before there is a status.
        status = 499

        async def send_with_id(message: Message) -> None:
            nonlocal is_started, status
            if message["type"] == "http.response.start":
                is_started = True
                status = message["status"]
                if not self._settings.host_sends_request_id:
                    MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        # Health and model lists are answered however full it is.
        is_counted = scope["method"] == "POST"
        is_full = is_counted and self._num_requests >= self._settings.max_concurrent_requests
        self._num_requests += is_counted
        try:
            if is_full:
                error = Overloaded("Too many requests at once.", retry_after_s=self._settings.retry_after_s)
                state["error_code"] = error.code
                await error_response(error)(scope, receive, send_with_id)
                return
            await self._app(scope, receive, send_with_id)
        except ClientGone:
            logger.info("client gone request_id=%s", request_id)
        except Exception:
            logger.exception("request failed request_id=%s", request_id)
            if not is_started:
                await error_response(InternalError())(scope, receive, send_with_id)
        finally:
            self._num_requests -= is_counted
            self._note_end(scope, request, status)

    def _note_end(self, scope: Scope, request: RequestScope, status: int) -> None:
        # Of the routing, so that there are as many as there are routes, whatever clients ask for.
        route = getattr(scope.get("route"), "path", "unknown")
        error_code = scope["state"].get("error_code")
        if request.span is not None:
            request.span.set("http.route", route)
            request.span.set("http.request.method", scope["method"])
            request.span.set("http.response.status_code", status)
            request.span.set("shoal.request_id", request.request_id)
            request.span.end(error=error_code)
        self._metrics.count_http(route, status, request.arrived_s, error_code)
        logger.log(
            logging.DEBUG if route in _QUIET_ROUTES else logging.INFO,
            "request request_id=%s method=%s route=%s status=%d duration_ms=%.1f code=%s",
            request.request_id, scope["method"], route, status, (time.monotonic() - request.arrived_s) * 1000,
            error_code,
        )  # fmt: skip
