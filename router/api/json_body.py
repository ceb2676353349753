"""Reading a JSON body that nobody vouches for.

Bounded while it arrives (a Content-Length may lie), decoded strictly: what JSON does not define (NaN, Infinity),
what two readers could understand differently (duplicate keys), and what only costs memory and time (depth, huge
integers, millions of empty lists) is refused. What the fields mean is the request models' business.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable, Collection
from typing import Any, NoReturn

from fastapi import Request
from starlette.requests import ClientDisconnect

from router.api.errors import BadRequest, BodyTooLarge, ClientGone, RequestTimedOut, WrongContentType

# Strings, lists and objects in one body: 64 for each message of the longest chat. Each costs ten times its bytes in
# memory, and no other thread runs while the decoder makes them: 8 MB of "[]," took 200 MB and over a second.
MAX_PARTS = 64 * 4096
# No field takes more than 64 bits; Python would otherwise spend quadratic time on the digits.
_MAX_DIGITS = 20


async def read_body(request: Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """Receive a body that says it is JSON. Raises BodyTooLarge, RequestTimedOut, WrongContentType, or ClientGone."""
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise WrongContentType("The content type must be application/json.")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise WrongContentType("Compressed request bodies are not supported.")
    try:
        async with asyncio.timeout(timeout_s):
            return await _read_bounded(request, max_bytes)
    except TimeoutError:
        raise RequestTimedOut("The request body did not arrive in time.", headers={"Connection": "close"}) from None
    except ClientDisconnect as error:
        raise ClientGone from error


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


def decode_json(body: bytes, names: Collection[str] = ()) -> Any:
    """Decode one JSON document strictly. names: of its fields, for errors, which repeat no other word of the client.

    Raises BadRequest, with the field at fault if it is one of names.
    """
    if _has_too_many_parts(body):
        raise BadRequest(
            f"The request body has more than {MAX_PARTS} strings, lists and objects.", code="request_too_large"
        )
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise BadRequest("The request body is not valid UTF-8.", code="invalid_json") from None
    try:
        return _DECODER.decode(text)
    except _Refused as error:
        reason, name = str(error), _find_field(text)
        if name not in names:
            raise BadRequest(f"{reason}.", code="invalid_json") from None
        message = f"{name}: {reason[:1].lower()}{reason[1:]}."
        raise BadRequest(message, param=name, code="invalid_json") from None
    except RecursionError:
        raise BadRequest("The request body is nested too deeply.", code="invalid_json") from None
    except ValueError:
        raise BadRequest("The request body is not valid JSON.", code="invalid_json") from None


def _has_too_many_parts(body: bytes) -> bool:
    # A bound that is quick to have, and enough for nearly all bodies: what stands in texts counts, too.
    if body.count(b'"') // 2 + body.count(b"[") + body.count(b"{") <= MAX_PARTS:
        return False
    return any(number > MAX_PARTS for number, _ in enumerate(_PART.finditer(body), start=1))


# Possessive: nothing of a string is ever tried again, nor remembered for it.
_PART = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?+|[\[{]', re.DOTALL)


class _Refused(ValueError):
    """Valid for a lenient reader, refused here."""


def _refuse_constant(_name: str) -> NoReturn:
    raise _Refused("Numbers must be finite")


def _parse_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _Refused("Numbers must be finite")
    return value


def _parse_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise _Refused("Integers must fit 64 bits")
    return int(digits)


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _Refused("An object has the same key twice")
    return value


_DECODER = json.JSONDecoder(
    object_pairs_hook=_build_object, parse_constant=_refuse_constant, parse_float=_parse_float, parse_int=_parse_int
)


class _Fault:
    """In place of a value that was refused, or that holds one. name: of the field, None where it is in no object."""

    def __init__(self, name: str | None = None) -> None:
        self.name = name


def _find_field(text: str) -> str | None:
    """The field of the whole document that holds what was refused. None: it is none, or what follows is no JSON."""
    try:
        document = _FAULT_FINDER.decode(text)
    except (ValueError, RecursionError):
        return None
    return document.name if isinstance(document, _Fault) else None


def _mark_object(pairs: list[tuple[str, Any]]) -> Any:
    seen: set[str] = set()
    for name, value in pairs:
        if name in seen or _holds_fault(value):
            return _Fault(name)
        seen.add(name)
    return dict(pairs)


def _holds_fault(value: Any) -> bool:
    """Objects within it are faults themselves, or hold none."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, _Fault):
            return True
        if isinstance(each, list):
            waiting.extend(each)
    return False


def _or_fault(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse_or_mark(digits: str) -> Any:
        try:
            return parse(digits)
        except _Refused:
            return _Fault()

    return parse_or_mark


# Slower, and only for documents that are refused anyway.
_FAULT_FINDER = json.JSONDecoder(
    object_pairs_hook=_mark_object,
    parse_constant=_or_fault(_refuse_constant),
    parse_float=_or_fault(_parse_float),
    parse_int=_or_fault(_parse_int),
)
