"""GET /v1/models: what is served here. Answers at once, whether or not routers are ready."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from router.api.context import ApiContext, get_context
from router.api.request_use import get_current_use

routes = APIRouter()


@routes.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    context = get_context(request)
    allowed = [name for name in context.model_names if get_current_use().may_use(name)]
    return {"object": "list", "data": [_describe(context, name) for name in allowed]}


@routes.get("/v1/models/{name:path}")
async def get_model(request: Request, name: str) -> dict[str, Any]:
    context = get_context(request)
    context.resolve_model(name)
    return _describe(context, name)


def _describe(context: ApiContext, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": context.created_at_s,
        "owned_by": "shoal",
        "root": context.model_names[0],
        "parent": None,
        "max_model_len": context.max_model_len,
    }
