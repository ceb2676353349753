"""The body of POST /v1/responses, and its translation to a chat.

OpenAI's Responses API (platform.openai.com/docs/api-reference/responses), as far as it goes without a memory: nothing
is stored, so whatever refers to an earlier answer is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, StrictBool, StrictInt, ValidationError, field_validator

from router.api.chat_types import MAX_TOOLS, ChatRequest, FunctionCall, Message, ToolCall, UnsupportedContent
from router.api.fields import (
    MAX_LOGPROBS,
    MAX_TOKEN_COUNT,
    Number,
    ShortText,
    StrictModel,
    Text,
    UnsupportedField,
    check_text,
    translate_error,
)
from router.api.form_types import Function, Schema, Tool, ToolName

_MAX_ITEMS = 4096
_MAX_PARTS = 1024
_TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


def _join_parts(value: Any) -> str:
    """A text, or the texts of parts."""
    if isinstance(value, str):
        return check_text(value)
    if not isinstance(value, list) or len(value) > _MAX_PARTS:
        raise ValueError("must be a string or a list of text parts")
    texts: list[str] = []
    for part in value:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise ValueError("parts must be objects with a type")
        if part["type"] not in _TEXT_PARTS:
            raise UnsupportedContent("only text parts are supported")
        if not isinstance(part.get("text"), str):
            raise ValueError("text parts must have a text")
        texts.append(check_text(part["text"]))
    return "\n".join(texts)


JoinedText = Annotated[str, PlainValidator(_join_parts, json_schema_input_type=str | list[dict[str, str]])]


class MessageItem(StrictModel):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: JoinedText


class FunctionCallItem(StrictModel):
    type: Literal["function_call"]
    call_id: ShortText
    name: ShortText
    arguments: Text


class FunctionOutputItem(StrictModel):
    type: Literal["function_call_output"]
    call_id: ShortText
    output: JoinedText


class ReasoningItem(StrictModel):
    type: Literal["reasoning"]
    content: JoinedText | None = None
    summary: JoinedText | None = None


Item = MessageItem | FunctionCallItem | FunctionOutputItem | ReasoningItem
_ITEMS: dict[str, type[Item]] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "function_call_output": FunctionOutputItem,
    "reasoning": ReasoningItem,
}


def _check_input(value: Any) -> list[Item]:
    if isinstance(value, str):
        return [MessageItem(role="user", content=value)]
    if not isinstance(value, list) or not 1 <= len(value) <= _MAX_ITEMS:
        raise ValueError(f"must be a string or a list of 1 to {_MAX_ITEMS} items")
    return [_check_item(item) for item in value]


def _check_item(value: Any) -> Item:
    if not isinstance(value, dict):
        raise ValueError("items must be objects")
    item_type = _ITEMS.get(value.get("type", "message")) if isinstance(value.get("type", ""), str) else None
    if item_type is None:
        raise UnsupportedContent(f"only items of type {', '.join(_ITEMS)} are supported")
    try:
        return item_type.model_validate(value)
    except ValidationError as error:
        raise ValueError(f"an item is not valid: {translate_error(error).message}") from None


class ResponsesTool(StrictModel):
    type: Literal["function"]
    name: ToolName
    description: Text | None = None
    parameters: Schema = None
    strict: StrictBool | None = None


class TextFormat(StrictModel):
    type: Literal["text", "json_object", "json_schema"]
    name: ToolName | None = None
    description: Text | None = None
    json_schema: Annotated[Schema, Field(alias="schema")] = None
    strict: StrictBool | None = None


class TextOptions(StrictModel):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningOptions(StrictModel):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: ShortText | None = None


class ResponsesRequest(StrictModel):
    model: ShortText | None = None
    input: Annotated[list[Item], PlainValidator(_check_input, json_schema_input_type=str | list[Item])]
    instructions: Text | None = None
    max_output_tokens: Annotated[StrictInt, Field(ge=1, le=MAX_TOKEN_COUNT)] | None = None
    temperature: Annotated[Number, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[Number, Field(gt=0.0, le=1.0)] | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[ResponsesTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Any = None
    parallel_tool_calls: StrictBool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    stream: StrictBool | None = None
    user: ShortText | None = None
    metadata: dict[ShortText, ShortText] | None = Field(default=None, max_length=16)
    store: StrictBool | None = None
    previous_response_id: Any = None
    conversation: Any = None
    background: Any = None

    @field_validator("store", "background", mode="after")
    @classmethod
    def _refuse_storing(cls, value: Any) -> Any:
        if value:
            raise UnsupportedField("nothing is stored here")
        return value

    @field_validator("previous_response_id", "conversation", mode="after")
    @classmethod
    def _refuse_memory(cls, value: Any) -> Any:
        if value is not None:
            raise UnsupportedField("nothing is stored here; send the earlier items as input")
        return value

    def to_chat(self) -> ChatRequest:
        """Raises BadRequest."""
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": _translate_items(self.instructions, self.input),
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "tools": [_translate_tool(tool) for tool in self.tools or ()] or None,
            "tool_choice": _translate_choice(self.tool_choice),
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": _translate_format(self.text),
            "reasoning_effort": None if self.reasoning is None else self.reasoning.effort,
            "logprobs": self.top_logprobs is not None or None,
            "top_logprobs": self.top_logprobs,
        }
        try:
            return ChatRequest.model_validate(fields)
        except ValidationError as error:
            raise translate_error(error) from None


def _translate_items(instructions: str | None, items: list[Item]) -> list[Message]:
    """Reasoning and calls belong to the message of the assistant that they come with."""
    messages = [] if instructions is None else [Message(role="system", content=instructions)]
    reasoning: str | None = None
    for item in items:
        if isinstance(item, ReasoningItem):
            reasoning = item.content or item.summary
            continue
        if isinstance(item, FunctionCallItem):
            call = ToolCall(id=item.call_id, function=FunctionCall(name=item.name, arguments=item.arguments))
            last = messages[-1] if messages and messages[-1].role == "assistant" else None
            if last is not None:
                messages[-1] = last.model_copy(update={"tool_calls": [*(last.tool_calls or ()), call]})
            else:
                messages.append(Message(role="assistant", tool_calls=[call], reasoning_content=reasoning))
        elif isinstance(item, FunctionOutputItem):
            messages.append(Message(role="tool", tool_call_id=item.call_id, content=item.output))
        elif item.role == "assistant":
            messages.append(Message(role="assistant", content=item.content, reasoning_content=reasoning))
        else:
            messages.append(Message(role=item.role, content=item.content))
        reasoning = None
    return messages


def _translate_tool(tool: ResponsesTool) -> Tool:
    function = Function(name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict)
    return Tool(type="function", function=function)


def _translate_choice(value: Any) -> Any:
    """{"type": "function", "name": ...} is the name in an object of its own in a chat."""
    if isinstance(value, dict) and value.get("type") == "function":
        return {"type": "function", "function": {"name": value.get("name")}}
    return value


def _translate_format(options: TextOptions | None) -> dict[str, Any] | None:
    if options is None or options.format is None:
        return None
    wanted = options.format
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    schema = {"name": wanted.name, "schema": wanted.json_schema, "strict": wanted.strict}
    return {"type": "json_schema", "json_schema": schema}
