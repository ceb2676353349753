"""Field types and checks shared by the request models.

Everything is strict: "3" is no number and true no count. Lists whose items are checked here by hand (token ids,
stop strings) give one short error instead of pydantic's one per item.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from router.api.errors import BadRequest, NotSupported

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_LENGTH = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 1024
_MAX_LOGIT_BIAS = 100
# Sizes of integers on the wire: uint32 for counts and ids, int64 for seeds (as the OpenAI API says).
MAX_UINT32 = 2**32 - 1
_MIN_INT64 = -(2**63)
_MAX_INT64 = 2**63 - 1
# Beyond this a count cannot fit any context; far below what float or uint32 arithmetic could lose.
MAX_TOKEN_COUNT = 2**31 - 1

_TOKEN_ID = re.compile("0|[1-9][0-9]{0,8}")
_SURROGATE = re.compile("[\ud800-\udfff]")


class UnsupportedField(ValueError):
    """Raised by validators for what is understood, but not offered."""

    code = "unsupported_parameter"


class WrongField(ValueError):
    """Raised by validators of a whole model for one of its fields."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field = field


class UnsupportedValue(WrongField, UnsupportedField):
    """A value of a field that is understood, but not offered."""


def check_text(value: str) -> str:
    """Return value. Raises ValueError if it holds what no tokenizer and no UTF-8 encoder takes, or NUL."""
    if _SURROGATE.search(value) is not None:
        raise ValueError("must not contain unpaired surrogates")
    if "\0" in value:
        raise ValueError("must not contain NUL characters")
    return value


def check_token_ids(value: Any, *, max_length: int | None = None) -> list[int]:
    """Return value, a list of token ids. Raises ValueError otherwise."""
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item <= MAX_UINT32 for item in value):
        raise ValueError("must be a list of token ids (integers of at least 0)")
    if max_length is not None and len(value) > max_length:
        raise ValueError(f"must not have more than {max_length} items")
    return value


def check_stop(value: Any) -> tuple[str, ...]:
    """Normalise `stop`: null, a string or a list of strings. Raises ValueError."""
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or a list of strings")
    if len(stops) > MAX_STOP_STRINGS:
        raise ValueError(f"must not have more than {MAX_STOP_STRINGS} strings")
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP_STRING_LENGTH:
            raise ValueError(f"strings must have between 1 and {MAX_STOP_STRING_LENGTH} characters")
        check_text(stop)
    return tuple(stops)


def check_stop_token_ids(value: Any) -> tuple[int, ...]:
    """Normalise `stop_token_ids`: null or a short list of ids. Raises ValueError."""
    return () if value is None else tuple(check_token_ids(value, max_length=MAX_STOP_TOKEN_IDS))


def check_logit_bias(value: Any) -> dict[int, float]:
    """Normalise `logit_bias`: null, or an object of token id to bias. Raises ValueError, which repeats no key."""
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(_TOKEN_ID.fullmatch(key) for key in value):
        raise ValueError("must be an object whose keys are token ids")
    if len(value) > MAX_LOGIT_BIASES:
        raise ValueError(f"must not have more than {MAX_LOGIT_BIASES} entries")
    for bias in value.values():
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not abs(bias) <= _MAX_LOGIT_BIAS:
            raise ValueError(f"values must be numbers from -{_MAX_LOGIT_BIAS} to {_MAX_LOGIT_BIAS}")
    return {int(key): float(bias) for key, bias in value.items()}


Text = Annotated[StrictStr, AfterValidator(check_text)]
ShortText = Annotated[StrictStr, Field(max_length=512), AfterValidator(check_text)]
TokenCount = Annotated[StrictInt, Field(ge=0, le=MAX_TOKEN_COUNT)]
Seed = Annotated[StrictInt, Field(ge=_MIN_INT64, le=_MAX_INT64)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class StrictModel(BaseModel):
    """Fields are strict, unknown ones are ignored (as OpenAI-compatible servers do), input stays out of errors."""

    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True, frozen=True)


class StreamOptions(StrictModel):
    include_usage: StrictBool | None = None


class ModelField(StrictModel):
    """What every request for text carries."""

    model: ShortText | None = None
    """None: the first of the names served."""


RequestT = TypeVar("RequestT", bound=BaseModel)


def parse_request(request_type: type[RequestT], value: Any, *, forbids_unknown: bool = False) -> RequestT:
    """Check a decoded body. forbids_unknown: fields without meaning are refused instead of ignored. Raises BadRequest
    naming the first field at fault, without its value."""
    if not isinstance(value, dict):
        raise BadRequest("The request body must be a JSON object.")
    try:
        return request_type.model_validate(value, extra="forbid" if forbids_unknown else None)
    except ValidationError as error:
        raise translate_error(error) from None


def translate_error(error: ValidationError) -> BadRequest:
    """The first field at fault, without its value."""
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "extra_forbidden":
        # The last part of the path is the client's own word.
        param = ".".join(str(part) for part in first["loc"][:-1]) or None
        where = "The request" if param is None else param
        return BadRequest(f"{where} has a field that is not known here.", param=param, code="unknown_parameter")
    # Dictionary keys of the client never become part of a path: no model has open dictionaries.
    cause = first.get("ctx", {}).get("error")
    loc = (*first["loc"], cause.field) if isinstance(cause, WrongField) else first["loc"]
    param = ".".join(str(part) for part in loc) or None
    reason = str(cause) if isinstance(cause, ValueError) else first["msg"][:1].lower() + first["msg"][1:]
    message = f"{param}: {reason}." if param else f"{reason[:1].upper()}{reason[1:]}."
    if isinstance(cause, UnsupportedField):
        return NotSupported(message, param=param, code=cause.code)
    return BadRequest(message, param=param, code="missing_required_parameter" if first["type"] == "missing" else None)
