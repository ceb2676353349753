"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, StrictBool, StrictInt, field_validator, model_validator

from router.api.fields import MAX_LOGPROBS, MAX_TOKEN_COUNT, ShortText, StrictModel, Text, UnsupportedField, check_text
from router.api.sampling_types import SamplingFields

_MAX_PARTS = 1024
_MAX_TOOL_CALLS = 128
# What a client may pass on to the template: switches that published templates know, nothing open-ended.
_TEMPLATE_SWITCHES = ("thinking", "enable_thinking")

Role = Literal["system", "developer", "user", "assistant", "tool"]


class UnsupportedContent(UnsupportedField):
    """A content part that is no text; its URL, if any, is never looked at."""

    code = "unsupported_content_type"


def _check_content(value: Any) -> str | None:
    """Normalise message content: a string, null, or text parts, which are joined by newlines."""
    if value is None:
        return None
    if isinstance(value, str):
        return check_text(value)
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    if len(value) > _MAX_PARTS:
        raise ValueError(f"must not have more than {_MAX_PARTS} parts")
    return "\n".join(_check_part(part) for part in value)


def _check_part(part: Any) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise ValueError("parts must be objects with a type")
    if part["type"] != "text":
        raise UnsupportedContent("only text parts are supported")
    if not isinstance(part.get("text"), str):
        raise ValueError("text parts must have a text")
    return check_text(part["text"])


class FunctionCall(StrictModel):
    name: ShortText
    arguments: Text


class ToolCall(StrictModel):
    id: ShortText | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(StrictModel):
    role: Role
    content: Annotated[str | None, PlainValidator(_check_content)] = None
    name: ShortText | None = None
    tool_call_id: ShortText | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=_MAX_TOOL_CALLS)] | None = None
    reasoning_content: Text | None = None

    @model_validator(mode="after")
    def _check_content_present(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError("content is required")
        return self


def _check_template_switches(value: Any) -> dict[str, bool]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    if not set(value) <= set(_TEMPLATE_SWITCHES):
        raise UnsupportedField(f"only {' and '.join(_TEMPLATE_SWITCHES)} are supported")
    if not all(isinstance(switch, bool) for switch in value.values()):
        raise ValueError("values must be true or false")
    return value


class ChatRequest(SamplingFields):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[StrictInt, Field(ge=1, le=MAX_TOKEN_COUNT)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1, le=MAX_TOKEN_COUNT)] | None = None
    """The newer name of max_tokens, which it overrides."""
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: StrictBool | None = None
    chat_template_kwargs: Annotated[dict[str, bool], BeforeValidator(_check_template_switches)] = Field(
        default_factory=dict
    )
    chat_template: Any = None
    response_format: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None

    @field_validator("chat_template", mode="before")
    @classmethod
    def _refuse_template(cls, value: Any) -> None:
        if value is not None:
            raise UnsupportedField("templates in a request are not accepted; the model's own is used")

    @field_validator("response_format", mode="before")
    @classmethod
    def _refuse_format(cls, value: Any) -> None:
        if value is not None and value != {"type": "text"}:
            raise UnsupportedField('only {"type": "text"} is supported; other formats are not supported yet')

    @field_validator("tools", "functions", "audio", mode="before")
    @classmethod
    def _refuse_tools(cls, value: Any) -> None:
        if value is not None and value != []:
            raise UnsupportedField("not supported yet")

    @field_validator("tool_choice", "function_call", mode="before")
    @classmethod
    def _refuse_tool_choice(cls, value: Any) -> None:
        if value not in (None, "none", "auto"):
            raise UnsupportedField("not supported yet")

    @field_validator("modalities", mode="before")
    @classmethod
    def _refuse_modalities(cls, value: Any) -> None:
        if value not in (None, ["text"]):
            raise UnsupportedField("only text is supported")

    @model_validator(mode="after")
    def _check_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self

    @property
    def token_limit(self) -> int | None:
        """Most tokens to generate; None where the request does not say: until the context is full."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
