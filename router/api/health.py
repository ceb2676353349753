"""Health: /health and /health/live say that this process answers, /health/ready that a request would be served.

Ready means that a router says so and moves: a process that answers while its step loop is stuck is the worst kind
of dead, so a step that runs longer than max_step_s counts as not ready.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from router.api.context import get_context
from router.api.errors import Unavailable
from router.api.router_client import RouterStatus

routes = APIRouter()


@routes.get("/health")
@routes.get("/health/live")
async def get_live() -> dict[str, str]:
    return {"status": "ok"}


@routes.get("/health/ready")
async def get_ready(request: Request) -> JSONResponse:
    """200 if at least one router serves; else 503. The body lists the routers and what each waits for."""
    context = get_context(request)
    statuses = await context.routers.fetch_statuses()
    routers = [_describe(status, context.settings.max_step_s) for status in statuses]
    ready = any(router["ready"] for router in routers)
    body: dict[str, Any] = {"ready": ready, "model": context.model_names[0], "routers": routers}
    if ready:
        return JSONResponse({"status": "ok", **body})
    waiting_for = [router["waiting_for"] for router in routers] or ["a router that has announced itself"]
    error = Unavailable(
        f"Not ready: waiting for {'; '.join(waiting_for)}.", retry_after_s=context.settings.retry_after_s
    )
    content = {"status": "not ready", **body, "waiting_for": waiting_for, **error.body()}
    return JSONResponse(content, status_code=error.status, headers=error.headers)


def _describe(router: RouterStatus, max_step_s: float) -> dict[str, Any]:
    status = router.status
    if status is None:
        return {"id": None, "ready": False, "waiting_for": "a router that does not answer"}
    is_stuck = status.current_step_ms > max_step_s * 1000
    waiting_for = None
    if is_stuck:
        waiting_for = f"a step that has been running for {status.current_step_ms / 1000:.0f} s"
    elif status.draining:
        waiting_for = "a router that is draining"
    elif not status.ready:
        waiting_for = status.message or "a router that is starting"
    return {
        "id": status.router_id,
        "ready": waiting_for is None,
        "waiting_for": waiting_for,
        "load_progress": round(status.load_progress, 4),
        "table_version": status.table_version,
        "num_running": status.num_running,
        "num_waiting": status.num_waiting,
        "num_steps": status.num_steps,
        "current_step_ms": status.current_step_ms,
    }
