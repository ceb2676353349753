"""The admin API on its own port, behind its own token: what `shoal status` and the other commands talk to."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.cluster_metrics import build_cluster_metrics
from cluster.errors import ChangeRefused, StoreUnavailable
from cluster.upgrade import DEFAULT_DRAIN_TIMEOUT_S, DEFAULT_TIMEOUT_S

MAX_BODY_BYTES = 1 << 20
MAX_DRAIN_TIMEOUT_S = 86_400.0
MAX_NAME_CHARACTERS = 256
MAX_EXTRA_SHARE = 10.0
MAX_PATH_CHARACTERS = 4096


class Administered(Protocol):
    """What the API may ask of the controller."""

    def get_status(self) -> dict[str, Any]: ...

    def get_plan_view(self) -> dict[str, Any]: ...

    def get_events(self, after: int) -> list[dict[str, Any]]: ...

    def get_event_counts(self) -> Mapping[tuple[str, str], int]: ...

    async def fetch_expert_load(self) -> dict[str, Any]: ...

    async def plan_rebalancing(self, extra_share: float) -> dict[str, Any]: ...

    async def rebalance(self, extra_share: float) -> dict[str, Any]: ...

    def get_balancer_view(self) -> dict[str, Any]: ...

    async def scale(self, counts: Mapping[str, int], force: bool) -> int: ...

    async def replace_replica(self, replica_id: str) -> int: ...

    async def restart_groups(self, names: Sequence[str]) -> int: ...

    async def upgrade(self, checkpoint: str, timeout_s: float, drain_timeout_s: float) -> dict[str, Any]: ...

    async def abort_upgrade(self) -> dict[str, Any] | None: ...

    def get_upgrade_view(self) -> dict[str, Any] | None: ...

    async def drain(self, timeout_s: float) -> int: ...


def hash_token(token: str) -> str:
    """The token itself stays with the user; everything else keeps this."""
    return hashlib.sha256(token.encode()).hexdigest()


def create_admin_app(controller: Administered, token_hash: str, viewer_hash: str | None = None) -> ASGIApp:
    """Hashes by hash_token. token_hash: of the token that may do everything; viewer_hash: of one that may look (GET);
    None: there is none."""
    process = CollectorRegistry()
    ProcessCollector(registry=process)

    async def status(_: Request) -> Response:
        return JSONResponse(controller.get_status())

    async def drain(request: Request) -> Response:
        timeout_s = _read_number(await _read_object(request), "timeout_s", 0.0, MAX_DRAIN_TIMEOUT_S)
        return JSONResponse({"num_running": await controller.drain(timeout_s)})

    async def plan(_: Request) -> Response:
        return JSONResponse(controller.get_plan_view())

    async def events(request: Request) -> Response:
        return JSONResponse({"events": controller.get_events(_read_after(request))})

    async def expert_load(_: Request) -> Response:
        return JSONResponse(await controller.fetch_expert_load())

    async def metrics(_: Request) -> Response:
        families = build_cluster_metrics(
            controller.get_status(), await controller.fetch_expert_load(), controller.get_event_counts()
        )
        text = generate_latest(_Families([*families, *process.collect()]))  # pyright: ignore[reportArgumentType]
        return Response(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)

    async def plan_rebalancing(request: Request) -> Response:
        extra_share = _read_number(await _read_object(request), "extra_share", 0.12, MAX_EXTRA_SHARE)
        return JSONResponse(await controller.plan_rebalancing(extra_share))

    async def rebalance(request: Request) -> Response:
        extra_share = _read_number(await _read_object(request), "extra_share", 0.12, MAX_EXTRA_SHARE)
        return JSONResponse(await controller.rebalance(extra_share))

    async def balancer(_: Request) -> Response:
        return JSONResponse(controller.get_balancer_view())

    async def scale(request: Request) -> Response:
        document = await _read_object(request)
        version = await controller.scale(_read_counts(document), _read_flag(document, "force"))
        return JSONResponse({"desired_version": version})

    async def drain_replica(request: Request) -> Response:
        version = await controller.replace_replica(_read_text(await _read_object(request), "replica"))
        return JSONResponse({"desired_version": version})

    async def restart(request: Request) -> Response:
        version = await controller.restart_groups(_read_names(await _read_object(request), "groups"))
        return JSONResponse({"desired_version": version})

    async def upgrade(request: Request) -> Response:
        document = await _read_object(request)
        timeout_s = _read_number(document, "timeout_s", DEFAULT_TIMEOUT_S, MAX_DRAIN_TIMEOUT_S)
        drain_timeout_s = _read_number(document, "drain_timeout_s", DEFAULT_DRAIN_TIMEOUT_S, MAX_DRAIN_TIMEOUT_S)
        checkpoint = _read_text(document, "checkpoint", MAX_PATH_CHARACTERS)
        return JSONResponse({"upgrade": await controller.upgrade(checkpoint, timeout_s, drain_timeout_s)})

    async def abort_upgrade(_: Request) -> Response:
        return JSONResponse({"upgrade": await controller.abort_upgrade()})

    async def upgrade_view(_: Request) -> Response:
        return JSONResponse({"upgrade": controller.get_upgrade_view()})

    app = Starlette(
        routes=[
            Route("/status", status, methods=["GET"]),
            Route("/plan", plan, methods=["GET"]),
            Route("/events", events, methods=["GET"]),
            Route("/load", expert_load, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
            Route("/rebalance/plan", plan_rebalancing, methods=["POST"]),
            Route("/rebalance", rebalance, methods=["POST"]),
            Route("/rebalance", balancer, methods=["GET"]),
            Route("/scale", scale, methods=["POST"]),
            Route("/replicas/drain", drain_replica, methods=["POST"]),
            Route("/restart", restart, methods=["POST"]),
            Route("/upgrade", upgrade, methods=["POST"]),
            Route("/upgrade", upgrade_view, methods=["GET"]),
            Route("/upgrade/abort", abort_upgrade, methods=["POST"]),
            Route("/drain", drain, methods=["POST"]),
        ],
        exception_handlers={
            HTTPException: _answer_http_error,
            ChangeRefused: _answer_refusal,
            StoreUnavailable: _answer_unavailable,
            Exception: _answer_bug,
        },
    )
    return _TokenGuard(app, token_hash, viewer_hash)


class _Families:
    """As prometheus-client wants what it writes."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Sequence[Metric]:
        return self._families


class _TokenGuard:
    """Nothing is reachable without a token, unknown paths included."""

    def __init__(self, app: ASGIApp, token_hash: str, viewer_hash: str | None) -> None:
        self._app = app
        self._token_hash = token_hash
        self._viewer_hash = viewer_hash

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
        given_hash = hashlib.sha256(token.strip()).hexdigest()
        if hmac.compare_digest(given_hash, self._token_hash):
            return True
        return (
            self._viewer_hash is not None
            and hmac.compare_digest(given_hash, self._viewer_hash)
            and scope["method"] == "GET"
        )


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


def _read_number(document: dict[str, Any], name: str, default: float, maximum: float) -> float:
    value = document.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise HTTPException(400, f"{name} must be a number")
    if not 0 <= value <= maximum:
        raise HTTPException(400, f"{name} must be from 0 to {maximum:g}")
    return float(value)


def _read_counts(document: dict[str, Any]) -> dict[str, int]:
    counts = document.get("groups")
    if not isinstance(counts, dict) or not counts:
        raise HTTPException(400, "groups must be an object of group names and numbers of replicas")
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int):
            raise HTTPException(400, f"groups: the number of replicas of {name[:100]!r} must be a whole number")
    return counts


def _read_flag(document: dict[str, Any], name: str) -> bool:
    value = document.get(name, False)
    if not isinstance(value, bool):
        raise HTTPException(400, f"{name} must be true or false")
    return value


def _read_text(document: dict[str, Any], name: str, max_characters: int = MAX_NAME_CHARACTERS) -> str:
    value = document.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= max_characters:
        raise HTTPException(400, f"{name} must be a text of 1 to {max_characters} characters")
    return value


def _read_names(document: dict[str, Any], name: str) -> list[str]:
    values = document.get(name, [])
    if not isinstance(values, list) or not all(
        isinstance(value, str) and len(value) <= MAX_NAME_CHARACTERS for value in values
    ):
        raise HTTPException(400, f"{name} must be a list of names")
    return values


def _read_after(request: Request) -> int:
    value = request.query_params.get("after", "0")
    if not (value.isascii() and value.isdigit() and len(value) <= 18):
        raise HTTPException(400, "after must be the sequence number of an event")
    return int(value)


async def _answer_refusal(_: Request, error: Exception) -> Response:
    return _error(400, "change_refused", str(error))


async def _answer_unavailable(_: Request, error: Exception) -> Response:
    return _error(503, "control_plane_unavailable", str(error))


async def _answer_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}.get(error.status_code, "bad_request")
    return _error(error.status_code, code, str(error.detail))


async def _answer_bug(_: Request, __: Exception) -> Response:
    return _error(500, "internal_error", "the controller failed; see its log")


def _error(status: int, code: str, message: str) -> Response:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status)
