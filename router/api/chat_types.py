"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, StrictBool, StrictInt, field_validator, model_validator

from router.api.fields import (
    MAX_LOGPROBS,
    MAX_TOKEN_COUNT,
    ShortText,
    StrictModel,
    Text,
    UnsupportedField,
    WrongField,
    check_text,
)
from router.api.form_types import NamedTool, ResponseFormat, StructuredOutputs, Tool, ToolChoice, check_tool_choice
from router.api.sampling_types import SamplingFields

MAX_MESSAGES = 4096
_MAX_PARTS = 1024
_MAX_TOOL_CALLS = 128
MAX_TOOLS = 128
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
    """JSON text, as the model wrote it."""


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
    reasoning: Text | None = None
    """The newer name of reasoning_content with some servers."""

    @model_validator(mode="after")
    def _check_content_present(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise WrongField("content", "is required")
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


TemplateSwitches = Annotated[dict[str, bool], BeforeValidator(_check_template_switches)]


# One error is enough: an error of each of a million messages took a gigabyte and half a minute.
Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatRequest(SamplingFields):
    messages: Messages
    max_tokens: Annotated[StrictInt, Field(ge=1, le=MAX_TOKEN_COUNT)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1, le=MAX_TOKEN_COUNT)] | None = None
    """The newer name of max_tokens, which it overrides."""
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: StrictBool | None = None
    chat_template_kwargs: TemplateSwitches = Field(default_factory=dict)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[ToolChoice | None, PlainValidator(check_tool_choice)] = None
    """None: auto."""
    parallel_tool_calls: StrictBool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    """none and minimal turn a switchable model's reasoning off, the others on."""
    thinking_token_budget: Annotated[StrictInt, Field(ge=1, le=MAX_TOKEN_COUNT)] | None = None
    """Most tokens of reasoning; None: as many as the answer may have. Nothing to a model without a marker for it."""
    chat_template: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None

    @field_validator("chat_template", mode="before")
    @classmethod
    def _refuse_template(cls, value: Any) -> None:
        if value is not None:
            raise UnsupportedField("templates in a request are not accepted; the model's own is used")

    @field_validator("functions", "function_call", mode="before")
    @classmethod
    def _refuse_functions(cls, value: Any) -> None:
        if value not in (None, "none", "auto", []):
            raise UnsupportedField("replaced by tools and tool_choice")

    @field_validator("audio", mode="before")
    @classmethod
    def _refuse_audio(cls, value: Any) -> None:
        if value is not None:
            raise UnsupportedField("only text is supported")

    @field_validator("modalities", mode="before")
    @classmethod
    def _refuse_modalities(cls, value: Any) -> None:
        if value not in (None, ["text"]):
            raise UnsupportedField("only text is supported")

    @model_validator(mode="after")
    def _check_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise WrongField("top_logprobs", "needs logprobs to be true")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) != len(names):
            raise WrongField("tools", "must have different names")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.name not in names:
            raise WrongField("tool_choice", "must name one of the tools")
        if self.tool_choice == "required" and not names:
            raise WrongField("tool_choice", "required needs tools")
        if self.is_bound and self.ignore_eos:
            raise WrongField("ignore_eos", "an answer that has a form ends where that is complete")
        return self

    @property
    def must_call(self) -> bool:
        """Whether the answer must be calls of tools."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def is_bound(self) -> bool:
        """Whether the answer must have a form of its own."""
        has_format = self.response_format is not None and self.response_format.type != "text"
        return has_format or self.structured_outputs is not None or bool(self.tools)

    @property
    def usable_tools(self) -> list[Tool]:
        """Those that the model may call."""
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.tools or () if tool.function.name == self.tool_choice.name]
        return [] if self.tool_choice == "none" else list(self.tools or ())

    @property
    def template_switches(self) -> dict[str, bool]:
        """What the template is told besides the messages."""
        if self.reasoning_effort is None:
            return self.chat_template_kwargs
        is_thinking = self.reasoning_effort not in ("none", "minimal")
        return {**dict.fromkeys(_TEMPLATE_SWITCHES, is_thinking), **self.chat_template_kwargs}

    @property
    def token_limit(self) -> int | None:
        """Most tokens to generate; None where the request does not say: until the context is full."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
