"""Around Ray Serve's proxy, in its process: clients see the front's API and nothing of Serve's own.

Serve has routes without a key (/-/routes), takes orders in header fields (a timeout, not to notice that the client has
left), and answers in plain text when it cannot reach the front: before that has started, or when its process dies.
"""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.api.connection import NAMED, UNNAMED
from router.api.edge import is_request_id
from router.api.errors import ApiError, Unavailable, error_response

_RETRY_AFTER_S = 2
_SERVE_PREFIX = "/-/"
# The front knows no route that begins so: it asks for a key, and knows none.
_INSTEAD = "/_/"
_SERVE_FIELDS = frozenset(
    {b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"serve_multiplexed_model_id"}
)
_NAMED_ROUTES = frozenset({"/v1/messages", "/v1/responses"})


class ProxyGuard:
    """The outermost layer; the front's own errors are JSON and pass through."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        cleaned = _clean(scope)
        await self._app(cleaned, receive, answer.forward)
        if answer.error is not None or not answer.has_started:
            error = answer.error or _lost()
            # The client's, or the one that Serve has put there.
            if request_id := Headers(scope=cleaned).get("x-request-id"):
                error.headers["X-Request-Id"] = request_id
            await error_response(error)(scope, receive, send)
        elif not answer.has_ended and answer.is_stream:
            events = NAMED if scope["path"] in _NAMED_ROUTES else UNNAMED
            body = events.prefix + events.write_error(_lost()) + b"\n\n" + events.ending
            await send({"type": "http.response.body", "body": body, "more_body": False})


class _Answer:
    """What became of one answer. error: to be sent instead of it."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.error: ApiError | None = None
        self.has_started = False
        self.has_ended = False
        self.is_stream = False

    async def forward(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            content_type = Headers(raw=message["headers"]).get("content-type", "")
            if message["status"] >= 400 and content_type.startswith("text/plain"):
                # 404: there is no front yet. Everything else that Serve says itself will be over as well.
                self.error = _starting() if message["status"] == 404 else _lost()
            self.has_started = True
            self.is_stream = content_type.startswith("text/event-stream")
        elif message["type"] == "http.response.body":
            self.has_ended = not message.get("more_body", False)
        if self.error is None:
            await self._send(message)


def _starting() -> ApiError:
    return Unavailable("Starting.", retry_after_s=_RETRY_AFTER_S)


def _lost() -> ApiError:
    return Unavailable("The server was interrupted while it worked on this request.", retry_after_s=_RETRY_AFTER_S)


def _clean(scope: Scope) -> Scope:
    """Without what only Serve understands, and with a request id that may stand in a log and an answer."""
    cleaned = {**scope, "headers": [(name, value) for name, value in scope["headers"] if name not in _SERVE_FIELDS]}
    headers = MutableHeaders(scope=cleaned)
    if not is_request_id(headers.get("x-request-id", "")):
        del headers["x-request-id"]
    if cleaned["path"].startswith(_SERVE_PREFIX):
        cleaned["path"] = _INSTEAD + cleaned["path"].removeprefix(_SERVE_PREFIX)
        cleaned["raw_path"] = cleaned["path"].encode()
    return cleaned
