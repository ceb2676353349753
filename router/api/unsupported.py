"""Routes of the OpenAI API that are known and not offered, so that clients learn more than that a route is unknown."""

from __future__ import annotations

from fastapi import APIRouter, Request

from router.api.errors import NotOffered

routes = APIRouter()

_PATHS = (
    "/v1/embeddings", "/v1/score", "/v1/rerank", "/v1/moderations", "/v1/audio/{rest:path}", "/v1/images/{rest:path}",
    "/v1/files", "/v1/files/{rest:path}", "/v1/fine_tuning/{rest:path}", "/v1/assistants", "/v1/assistants/{rest:path}",
    "/v1/threads", "/v1/threads/{rest:path}", "/v1/vector_stores", "/v1/vector_stores/{rest:path}", "/v1/batches",
    "/v1/batches/{rest:path}", "/v1/responses/{rest:path}", "/v1/messages/batches", "/v1/messages/batches/{rest:path}",
)  # fmt: skip


async def refuse(_request: Request) -> None:
    """Raises NotOffered."""
    raise NotOffered("This part of the API is not offered here: chat, completions, responses and messages are.")


for _path in _PATHS:
    routes.add_api_route(_path, refuse, methods=["GET", "POST", "DELETE"], include_in_schema=False)
