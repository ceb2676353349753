"""The admin API on its own port, behind its own token: what `shoal status` and the other commands talk to."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

MAX_BODY_BYTES = 1 << 20
MAX_DRAIN_TIMEOUT_S = 86_400.0


class Administered(Protocol):
    """What the API may ask of the controller."""

    def get_status(self) -> dict[str, Any]: ...

    async def drain(self, timeout_s: float) -> int: ...


def hash_token(token: str) -> str:
    """The token itself stays with the user; everything else keeps this."""
    return hashlib.sha256(token.encode()).hexdigest()


def create_admin_app(controller: Administered, token_hash: str) -> ASGIApp:
    """token_hash: of the only token accepted, by hash_token."""

    async def status(_: Request) -> Response:
        return JSONResponse(controller.get_status())

    async def drain(request: Request) -> Response:
        timeout_s = _read_timeout(await _read_object(request))
        return JSONResponse({"num_running": await controller.drain(timeout_s)})

    app = Starlette(
        routes=[Route("/status", status, methods=["GET"]), Route("/drain", drain, methods=["POST"])],
        exception_handlers={HTTPException: _answer_http_error, Exception: _answer_bug},
    )
    return _TokenGuard(app, token_hash)


class _TokenGuard:
    """Nothing is reachable without the token, unknown paths included."""

    def __init__(self, app: ASGIApp, token_hash: str) -> None:
        self._app = app
        self._token_hash = token_hash

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_allowed(scope):
            response = _error(401, "invalid_api_key", "a valid admin token is needed: Authorization: Bearer TOKEN")
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, token = given.partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        # Hashes have one length, so the comparison tells nothing about the token.
        return hmac.compare_digest(hashlib.sha256(token.strip()).hexdigest(), self._token_hash)


async def _read_object(request: Request) -> dict[str, Any]:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
    if not body:
        return {}
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(400, "the body is not valid JSON") from None
    if not isinstance(document, dict):
        raise HTTPException(400, "the body must be a JSON object")
    return document


def _read_timeout(document: dict[str, Any]) -> float:
    value = document.get("timeout_s", 0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise HTTPException(400, "timeout_s must be a number of seconds")
    if not 0 <= value <= MAX_DRAIN_TIMEOUT_S:
        raise HTTPException(400, f"timeout_s must be from 0 to {MAX_DRAIN_TIMEOUT_S:.0f}")
    return float(value)


async def _answer_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}.get(error.status_code, "bad_request")
    return _error(error.status_code, code, str(error.detail))


async def _answer_bug(_: Request, __: Exception) -> Response:
    return _error(500, "internal_error", "the controller failed; see its log")


def _error(status: int, code: str, message: str) -> Response:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status)
