"""Errors of the HTTP front, each of which knows the answer that a client gets for it.

    ApiError
    |- BadRequest            400  a field, or the body as a whole, cannot be served
    |  |- ContextLengthExceeded   prompt and answer do not fit the context
    |  `- NotSupported            understood, but not offered
    |- NotAuthenticated      401  no key, or none of ours
    |- NotAllowed            403  the key may not do that
    |- RequestTimedOut       408  a deadline passed: the client's body, or the answer
    |- NotFound              404  unknown route
    |  `- ModelNotFound
    |- BodyTooLarge          413
    |- WrongContentType      415
    |- HeadTooLarge          431
    |- Overloaded            429  queues are full
    |- RateLimited           429  a limit of the key or its team is reached
    |- NotOffered            501  a known route of the API that is not served here
    |- Unavailable           503  no router can take the request now
    `- InternalError         500

    ClientGone                    nobody is left to answer: work is cancelled, nothing is sent
    TokenizerError                the checkpoint's tokenizer files cannot be served (at start only)

Bodies follow OpenAI: {"error": {"message", "type", "param", "code"}}. A message never repeats what the client
sent: its input may be no number, no text, or somebody's secret (NaN in an echoed body even turned FastAPI's own
answer into a 500).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from router.api.lingering_response import LingeringResponse


class ApiError(Exception):
    """An answer with an error status."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """message: for the client, without its input. param: the field at fault, None when it is not one field."""
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class BadRequest(ApiError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ContextLengthExceeded(BadRequest):
    code = "context_length_exceeded"


class NotSupported(BadRequest):
    code = "unsupported_parameter"


class NotAuthenticated(ApiError):
    """Says the same whatever is wrong with a key, so that nobody learns which keys there are."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"

    def __init__(self) -> None:
        super().__init__(
            "A valid API key is needed: send it as `Authorization: Bearer KEY`.",
            headers={"WWW-Authenticate": "Bearer"},
        )


class NotAllowed(ApiError):
    status = 403
    type = "permission_error"
    code = "not_allowed"


class RequestTimedOut(ApiError):
    status = 408
    type = "timeout_error"
    code = "request_timeout"


class NotFound(ApiError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class NotOffered(ApiError):
    """Clients repeat answers of 500 and above unless they are told that it does not help."""

    status = 501
    type = "invalid_request_error"
    code = "not_offered"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"x-should-retry": "false"})


class BodyTooLarge(ApiError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class WrongContentType(ApiError):
    status = 415
    type = "invalid_request_error"
    code = "unsupported_content_type"


class HeadTooLarge(ApiError):
    status = 431
    type = "invalid_request_error"
    code = "header_too_large"


class Overloaded(ApiError):
    status = 429
    type = "rate_limit_exceeded"
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message, headers={"Retry-After": str(retry_after_s)})


class RateLimited(ApiError):
    status = 429
    type = "rate_limit_exceeded"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message, headers={"Retry-After": str(max(1, math.ceil(retry_after_s)))})


class Unavailable(ApiError):
    status = 503
    type = "service_unavailable"
    code = "unavailable"

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message, headers={"Retry-After": str(retry_after_s)})


class InternalError(ApiError):
    code = "internal_error"

    def __init__(self, message: str = "The server failed to process the request.") -> None:
        super().__init__(message)


class ClientGone(Exception):
    """The client closed its connection, or stopped reading, before its answer was complete."""


class TokenizerError(Exception):
    """The checkpoint's tokenizer or chat template cannot be used; names the file and what was expected."""


# Statuses that Starlette and FastAPI raise by themselves (routing, mostly).
_STATUS_MESSAGES = {
    400: ("The request cannot be read.", "invalid_request"),
    404: ("Unknown route.", "not_found"),
    405: ("This route does not answer this HTTP method.", "method_not_allowed"),
    413: ("The request body is too large.", "request_too_large"),
    415: ("The content type must be application/json.", "unsupported_content_type"),
}


def error_response(error: ApiError) -> JSONResponse:
    is_last = error.headers.get("Connection") == "close"
    response = LingeringResponse if is_last else JSONResponse
    return response(error.body(), status_code=error.status, headers=error.headers)


def install_error_handlers(app: FastAPI) -> None:
    """Give every error of the app, also the framework's own, the OpenAI shape."""

    async def answer_api_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        # For the edge, which counts and logs what was turned away.
        request.state.error_code = error.code or "error"
        return error_response(error)

    async def answer_http_exception(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message, code = _STATUS_MESSAGES.get(error.status_code, ("The request was refused.", "refused"))
        translated = ApiError(message, code=code, headers=error.headers)
        translated.status = error.status_code
        translated.type = "invalid_request_error" if error.status_code < 500 else "server_error"
        return error_response(translated)

    async def answer_validation_error(_request: Request, _error: Exception) -> JSONResponse:
        # Only path and query parameters are left to FastAPI; bodies are read in json_body.py.
        return error_response(BadRequest("The request's parameters are not valid."))

    app.add_exception_handler(ApiError, answer_api_error)
    app.add_exception_handler(HTTPException, answer_http_exception)
    app.add_exception_handler(RequestValidationError, answer_validation_error)
