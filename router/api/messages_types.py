"""The body of POST /v1/messages, and its translation to a chat.

Anthropic's Messages API (docs.anthropic.com/en/api/messages): text, tools and their results, thinking. Images,
documents and tools that run on a server are refused.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, StrictBool, StrictInt, ValidationError, model_validator

from router.api.chat_types import (
    MAX_MESSAGES,
    MAX_TOOLS,
    ChatRequest,
    FunctionCall,
    Message,
    ToolCall,
    UnsupportedContent,
)
from router.api.fields import (
    MAX_TOKEN_COUNT,
    Number,
    ShortText,
    StrictModel,
    Text,
    WrongField,
    check_stop,
    check_text,
    translate_error,
)
from router.api.form_types import Function, Schema, Tool, ToolName

_MAX_BLOCKS = 1024


class TextBlock(StrictModel):
    type: Literal["text"]
    text: Text


class ThinkingBlock(StrictModel):
    type: Literal["thinking"]
    thinking: Text
    signature: Text | None = None
    """Of another server; nothing here is signed."""


class ToolUseBlock(StrictModel):
    type: Literal["tool_use"]
    id: ShortText
    name: ShortText
    input: Schema = None


def _check_result(value: Any) -> str:
    """The content of a tool's result: a string, or text blocks."""
    if value is None:
        return ""
    if isinstance(value, str):
        return check_text(value)
    return "\n".join(block.text for block in _check_blocks(value) if isinstance(block, TextBlock))


class ToolResultBlock(StrictModel):
    type: Literal["tool_result"]
    tool_use_id: ShortText
    content: Annotated[str, PlainValidator(_check_result, json_schema_input_type=str | list[TextBlock] | None)] = ""
    is_error: StrictBool | None = None


Block = TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock
_BLOCKS: dict[str, type[Block]] = {
    "text": TextBlock,
    "thinking": ThinkingBlock,
    "tool_use": ToolUseBlock,
    "tool_result": ToolResultBlock,
}


def _check_blocks(value: Any) -> list[Block]:
    if not isinstance(value, list) or len(value) > _MAX_BLOCKS:
        raise ValueError(f"must be a string or a list of at most {_MAX_BLOCKS} blocks")
    return [_check_block(block) for block in value]


def _check_block(value: Any) -> Block:
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise ValueError("blocks must be objects with a type")
    block_type = _BLOCKS.get(value["type"])
    if block_type is None:
        raise UnsupportedContent(f"only blocks of type {', '.join(_BLOCKS)} are supported")
    try:
        return block_type.model_validate(value)
    except ValidationError as error:
        raise ValueError(f"block of type {value['type']}: {translate_error(error).message}") from None


def _check_content(value: Any) -> list[Block]:
    return [TextBlock(type="text", text=check_text(value))] if isinstance(value, str) else _check_blocks(value)


def _check_system(value: Any) -> str | None:
    return None if value is None else _check_result(value)


Content = Annotated[list[Block], PlainValidator(_check_content, json_schema_input_type=str | list[Block])]
System = Annotated[str | None, PlainValidator(_check_system, json_schema_input_type=str | list[TextBlock] | None)]


class InputMessage(StrictModel):
    role: Literal["user", "assistant"]
    content: Content


class MessagesTool(StrictModel):
    type: Literal["custom"] | None = None
    name: ToolName
    description: Text | None = None
    input_schema: Schema = None
    strict: StrictBool | None = None


class MessagesToolChoice(StrictModel):
    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: StrictBool | None = None

    @model_validator(mode="after")
    def _check_together(self) -> MessagesToolChoice:
        if (self.type == "tool") != (self.name is not None):
            raise WrongField("name", "goes with type tool")
        return self


class Thinking(StrictModel):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[StrictInt, Field(ge=1, le=MAX_TOKEN_COUNT)] | None = None
    """Most tokens of thinking."""


class CountTokensRequest(StrictModel):
    model: ShortText | None = None
    messages: Annotated[list[InputMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: System = None
    tools: Annotated[list[MessagesTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: Thinking | None = None

    def to_chat(self, **fields: Any) -> ChatRequest:
        """fields: further ones of the chat. Raises BadRequest."""
        choice = self.tool_choice
        try:
            return ChatRequest(
                model=self.model,
                messages=_translate_messages(self.system, self.messages),
                tools=[_translate_tool(tool) for tool in self.tools or ()] or None,
                tool_choice=None if choice is None else _translate_choice(choice),
                parallel_tool_calls=not (choice is not None and choice.disable_parallel_tool_use),
                reasoning_effort=None if self.thinking is None else _EFFORTS[self.thinking.type],
                thinking_token_budget=None if self.thinking is None else self.thinking.budget_tokens,
                **fields,
            )
        except ValidationError as error:
            raise translate_error(error) from None


class MessagesRequest(CountTokensRequest):
    max_tokens: Annotated[StrictInt, Field(ge=1, le=MAX_TOKEN_COUNT)]
    temperature: Annotated[Number, Field(ge=0.0, le=1.0)] | None = None
    top_p: Annotated[Number, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[StrictInt, Field(ge=0, le=MAX_TOKEN_COUNT)] | None = None
    stop_sequences: Annotated[tuple[str, ...], PlainValidator(check_stop, json_schema_input_type=list[str] | None)] = ()
    stream: StrictBool | None = None

    def to_full_chat(self) -> ChatRequest:
        return self.to_chat(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=list(self.stop_sequences),
        )


_EFFORTS: dict[str, Literal["none", "medium"]] = {"enabled": "medium", "adaptive": "medium", "disabled": "none"}


def _translate_choice(choice: MessagesToolChoice) -> Any:
    if choice.name is not None:
        return {"type": "function", "function": {"name": choice.name}}
    return "required" if choice.type == "any" else choice.type


def _translate_tool(tool: MessagesTool) -> Tool:
    function = Function(name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict)
    return Tool(type="function", function=function)


def _translate_messages(system: str | None, messages: list[InputMessage]) -> list[Message]:
    """One message may become several: results of tools are messages of their own in a chat."""
    translated = [] if system is None else [Message(role="system", content=system)]
    for message in messages:
        texts = [block.text for block in message.content if isinstance(block, TextBlock)]
        if message.role == "assistant":
            thoughts = [block.thinking for block in message.content if isinstance(block, ThinkingBlock)]
            calls = [block for block in message.content if isinstance(block, ToolUseBlock)]
            translated.append(
                Message(
                    role="assistant",
                    content="\n".join(texts) if texts else None,
                    reasoning_content="\n".join(thoughts) if thoughts else None,
                    tool_calls=[_translate_call(call) for call in calls] or None,
                )
            )
            continue
        for block in message.content:
            if isinstance(block, ToolResultBlock):
                translated.append(Message(role="tool", tool_call_id=block.tool_use_id, content=block.content))
        if texts or not any(isinstance(block, ToolResultBlock) for block in message.content):
            translated.append(Message(role="user", content="\n".join(texts)))
    return translated


def _translate_call(block: ToolUseBlock) -> ToolCall:
    arguments = json.dumps(block.input or {}, ensure_ascii=False)
    return ToolCall(id=block.id, function=FunctionCall(name=block.name, arguments=arguments))
