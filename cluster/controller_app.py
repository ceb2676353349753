"""What a controller serves on its admin port: health for probes, and the admin API, of its own or of whoever leads.

Several controllers stand behind one Kubernetes Service. Only one leads, and the others forward to it, so that a client
need not know which; the token is checked by the leader alone.
"""

from __future__ import annotations

from collections.abc import Callable

import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.admin_app import MAX_BODY_BYTES, MAX_DRAIN_TIMEOUT_S
from cluster.admin_tls import get_scheme, list_client_options, list_request_options
from experts.errors import ConfigError

_FORWARDED = "x-shoal-forwarded"
_CONNECT_TIMEOUT_S = 3.0


class ControllerApp:
    """An ASGI application. `admin` is None until this controller leads."""

    def __init__(
        self,
        is_live: Callable[[], bool],
        is_ready: Callable[[], bool],
        find_leader: Callable[[], str | None],
        tls_dir: str | None = None,
    ) -> None:
        """find_leader: host:port of the leader's admin port; None if it is not known. tls_dir: of the certificates that
        all controllers serve with; None: http."""
        self._tls_dir = tls_dir
        self.admin: ASGIApp | None = None
        self._is_live = is_live
        self._is_ready = is_ready
        self._find_leader = find_leader

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        match scope["path"]:
            case "/health/live":
                response = _answer_health(self._is_live())
            case "/health/ready":
                response = _answer_health(self._is_ready())
            case _ if self.admin is not None:
                await self.admin(scope, receive, send)
                return
            case _:
                response = await self._forward(Request(scope, receive))
        await response(scope, receive, send)

    async def _forward(self, request: Request) -> Response:
        leader = self._find_leader()
        if leader is None or _FORWARDED in request.headers:
            return _error("no controller leads at the moment: try again in a few seconds")
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                return JSONResponse({"error": {"message": "the body is too large", "code": "body_too_large"}}, 413)
        headers = {name: value for name in ("authorization", "content-type") if (value := request.headers.get(name))}
        url = f"{get_scheme(self._tls_dir)}://{leader}{request.url.path}" + (
            f"?{request.url.query}" if request.url.query else ""
        )
        timeout = httpx.Timeout(MAX_DRAIN_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
        try:
            options = list_client_options(self._tls_dir)
            async with httpx.AsyncClient(timeout=timeout, trust_env=False, **options) as client:
                answer = await client.request(
                    request.method,
                    url,
                    headers={**headers, _FORWARDED: "1"},
                    content=body,
                    **list_request_options(self._tls_dir),
                )
        except (httpx.HTTPError, ConfigError) as error:
            return _error(f"the controller that leads, {leader}, does not answer: {type(error).__name__}")
        return Response(answer.content, answer.status_code, media_type=answer.headers.get("content-type"))


def _answer_health(is_good: bool) -> Response:
    return JSONResponse({"status": "ok" if is_good else "failing"}, 200 if is_good else 503)


def _error(message: str) -> Response:
    error = {"message": message, "type": "server_error", "param": None, "code": "control_plane_unavailable"}
    return JSONResponse({"error": error}, 503)
