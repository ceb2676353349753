"""/ui: the status page, a folder of static files, and the JSON that it shows.

The files are public and say nothing; the data is behind whatever the front asks for (a key, once there are any). The
page loads nothing from elsewhere and its policy lets it reach nothing else, so a text that a model wrote can at worst
look odd.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, RedirectResponse, Response

from router.api.connection import encode_json
from router.api.context import get_context
from router.api.errors import BadRequest, NotFound, Unavailable
from router.api.request_use import get_current_use
from router.api.status_page import build_page
from router.api.version import find_version

routes = APIRouter()

_FOLDER = Path(__file__).parent / "ui_files"
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # A newer version's page must not run with an older one's scripts.
    "Cache-Control": "no-cache",
}
_MAX_SEQUENCE_DIGITS = 18


@routes.get("/ui")
async def get_page() -> Response:
    return _send_file("index.html")


@routes.get("/ui/")
async def redirect() -> Response:
    return RedirectResponse("/ui")


@routes.get("/ui/static/{name}")
async def get_static(name: str) -> Response:
    return _send_file(name)


@routes.get("/ui/state")
async def get_state(request: Request) -> Response:
    context = get_context(request)
    statuses, cluster = await asyncio.gather(context.statuses.get(), context.cluster.fetch_status())
    page = build_page(
        model=context.model_names[0],
        version=find_version(),
        activity=context.metrics.recent.snapshot(time.monotonic()),
        statuses={status.endpoint: status.status for status in statuses},
        cluster=cluster,
        max_step_s=context.settings.max_step_s,
        only_team=get_current_use().only_team,
    )
    return _send_json(page)


@routes.get("/ui/events")
async def get_events(request: Request) -> Response:
    """Events with a greater sequence number than the parameter `after`."""
    after = request.query_params.get("after", "0")
    if not (after.isascii() and after.isdigit() and len(after) <= _MAX_SEQUENCE_DIGITS):
        raise BadRequest("after: must be the sequence number of an event.", param="after")
    events = await get_context(request).cluster.fetch_events(int(after))
    if events is None:
        raise _no_controller(request)
    return _send_json({"events": list(events)})


@routes.get("/ui/experts")
async def get_experts(request: Request) -> Response:
    load = await get_context(request).cluster.fetch_expert_load()
    if load is None:
        raise _no_controller(request)
    return _send_json(load)


def _no_controller(request: Request) -> Unavailable:
    retry_after_s = get_context(request).settings.retry_after_s
    return Unavailable("No controller answers here.", retry_after_s=retry_after_s)


def _send_file(name: str) -> Response:
    """Raises NotFound."""
    # Compared with what is there: no path of a client's making is ever opened.
    path = next((path for path in _FOLDER.iterdir() if path.name == name and path.suffix in _MEDIA_TYPES), None)
    if path is None:
        raise NotFound("Unknown file.")
    return FileResponse(path, media_type=_MEDIA_TYPES[path.suffix], headers=_HEADERS)


def _send_json(value: Any) -> Response:
    return Response(encode_json(value), media_type="application/json", headers={"Cache-Control": "no-store"})
