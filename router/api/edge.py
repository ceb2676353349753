"""The outermost layer of the app: a request id for everything, an answer to everything, and a limit on the number
of requests at once. Plain ASGI, because middleware that wraps streams hides the client's disconnect from them."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.api.errors import ClientGone, InternalError, Overloaded, error_response
from router.api.settings import ApiSettings

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Edge:
    """Takes X-Request-Id from the client where it is well-formed, makes one otherwise, and returns it."""

    def __init__(self, app: ASGIApp, settings: ApiSettings) -> None:
        self._app = app
        self._settings = settings
        self._num_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        is_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        # Health and model lists are answered however full it is.
        is_counted = scope["method"] == "POST"
        if is_counted and self._num_requests >= self._settings.max_concurrent_requests:
            error = Overloaded("Too many requests at once.", retry_after_s=self._settings.retry_after_s)
            await error_response(error)(scope, receive, send_with_id)
            return
        self._num_requests += is_counted
        try:
            await self._app(scope, receive, send_with_id)
        except ClientGone:
            logger.info("client gone request_id=%s", request_id)
        except Exception:
            logger.exception("request failed request_id=%s", request_id)
            if not is_started:
                await error_response(InternalError())(scope, receive, send_with_id)
        finally:
            self._num_requests -= is_counted
