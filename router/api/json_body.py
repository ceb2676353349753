"""Reading a JSON body that nobody vouches for.

Bounded while it arrives (a Content-Length may lie), decoded strictly: what JSON does not define (NaN, Infinity),
what two readers could understand differently (duplicate keys), and what only costs memory (depth, huge integers)
is refused. What the fields mean is the request models' business.
"""

from __future__ import annotations

import asyncio
import json
import math
from concurrent.futures import Executor
from typing import Any, NoReturn

from fastapi import Request
from starlette.requests import ClientDisconnect

from router.api.errors import BadRequest, BodyTooLarge, ClientGone, RequestTimedOut, WrongContentType

# Bodies up to here are decoded on the event loop: about a millisecond at most.
_INLINE_BYTES = 64 * 1024
# No field takes more than 64 bits; Python would otherwise spend quadratic time on the digits.
_MAX_DIGITS = 20


async def read_json(request: Request, *, max_bytes: int, timeout_s: float, executor: Executor) -> Any:
    """Read and decode the body.

    Raises BodyTooLarge, RequestTimedOut, WrongContentType, BadRequest, or ClientGone.
    """
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise WrongContentType("The content type must be application/json.")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise WrongContentType("Compressed request bodies are not supported.")
    try:
        async with asyncio.timeout(timeout_s):
            body = await _read_bounded(request, max_bytes)
    except TimeoutError:
        raise RequestTimedOut("The request body did not arrive in time.", headers={"Connection": "close"}) from None
    except ClientDisconnect as error:
        raise ClientGone from error
    if len(body) <= _INLINE_BYTES:
        return decode_json(body)
    return await asyncio.get_running_loop().run_in_executor(executor, decode_json, body)


async def _read_bounded(request: Request, max_bytes: int) -> bytes:
    too_large = BodyTooLarge(
        f"The request body must not be larger than {max_bytes} bytes.", headers={"Connection": "close"}
    )
    claimed = request.headers.get("content-length", "")
    if claimed.isdecimal() and (len(claimed) > _MAX_DIGITS or int(claimed) > max_bytes):
        raise too_large
    chunks: list[bytes] = []
    num_bytes = 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)


def decode_json(body: bytes) -> Any:
    """Decode one JSON document strictly. Raises BadRequest."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise BadRequest("The request body is not valid UTF-8.", code="invalid_json") from None
    try:
        return _DECODER.decode(text)
    except _Refused as error:
        raise BadRequest(str(error), code="invalid_json") from None
    except RecursionError:
        raise BadRequest("The request body is nested too deeply.", code="invalid_json") from None
    except ValueError:
        raise BadRequest("The request body is not valid JSON.", code="invalid_json") from None


class _Refused(ValueError):
    """Valid for a lenient reader, refused here."""


def _refuse_constant(_name: str) -> NoReturn:
    raise _Refused("Numbers must be finite.")


def _parse_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _Refused("Numbers must be finite.")
    return value


def _parse_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise _Refused("Integers must fit 64 bits.")
    return int(digits)


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _Refused("An object has the same key twice.")
    return value


_DECODER = json.JSONDecoder(
    object_pairs_hook=_build_object, parse_constant=_refuse_constant, parse_float=_parse_float, parse_int=_parse_int
)
