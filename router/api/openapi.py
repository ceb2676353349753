"""GET /openapi.json: the routes for text and their bodies, for client generators and for the fuzzer.

Written from the request types, since the routes read their bodies themselves (json_body.py) and FastAPI knows nothing
of them.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic.json_schema import models_json_schema

from router.api.chat_types import ChatRequest
from router.api.completions_types import CompletionRequest
from router.api.fields import StrictModel
from router.api.messages_types import CountTokensRequest, MessagesRequest
from router.api.responses_types import ResponsesRequest
from router.api.tokenize import DetokenizeRequest, TokenizeRequest

routes = APIRouter()

BODIES: dict[str, type[StrictModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
    "/v1/responses": ResponsesRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
_READS = ("/v1/models", "/health/live", "/version", "/tokenizer_info")
_ERRORS = {
    "400": "a field, or the body, cannot be served", "401": "no valid key", "403": "not with this key",
    "404": "unknown model", "408": "not in time", "413": "body too large", "415": "not JSON",
    "429": "try again later", "503": "try again later",
}  # fmt: skip


def build_document(version: str) -> dict[str, Any]:
    """OpenAPI 3.1."""
    _, definitions = models_json_schema(
        [(body, "validation") for body in BODIES.values()], ref_template="#/components/schemas/{model}"
    )
    errors = {status: _describe(text, {"$ref": "#/components/schemas/Error"}) for status, text in _ERRORS.items()}
    paths: dict[str, Any] = {
        path: {
            "post": {
                "operationId": path.strip("/").replace("/", "_"),
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}},
                },
                "responses": {"200": _describe("the answer, or a stream of its events", {}), **errors},
            }
        }
        for path, body in BODIES.items()
    }
    for path in _READS:
        paths[path] = {"get": {"responses": {"200": _describe("as it is now", {})}}}
    schemas = {**definitions.get("$defs", {}), "Error": _ERROR_SCHEMA}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Shoal", "version": version},
        "paths": paths,
        "components": {"schemas": schemas},
    }


@routes.get("/openapi.json")
async def get_document(request: Request) -> dict[str, Any]:
    return request.app.state.openapi_document


def _describe(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": schema}, "text/event-stream": {"schema": {"type": "string"}}}
    return {"description": text, "content": content}


_NULLABLE_TEXT = {"type": ["string", "null"]}
_ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _NULLABLE_TEXT,
                "code": _NULLABLE_TEXT,
            },
        }
    },
}
