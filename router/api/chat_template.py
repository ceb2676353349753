"""The checkpoint's own chat template: messages to the text of a prompt.

Only the template that ships with the checkpoint is ever compiled, never one from a request, and it runs in jinja's
sandbox without access to attributes that change anything. The sandbox bounds neither time nor memory, so the output
is bounded here and callers render outside the event loop.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from router.api.chat_types import Message
from router.api.errors import BadRequest, TokenizerError
from router.api.form_types import Tool
from router.api.markers import MarkerGuard
from router.api.tokenizer import TextTokenizer
from router.api.tool_formats import describe_tools, find_format, texts_of_tool

# Most characters a rendered chat may have: what escaping can make of the messages, and roles and markers around them.
_MAX_ESCAPED_LENGTH = 6
_MAX_OVERHEAD_PER_MESSAGE = 4096
# A refusal's text comes from the template; longer ones are cut.
_MAX_REFUSAL_LENGTH = 300
# Markers that an assistant's turn may bring back: templates cut earlier turns at them.
_REASONING_MARKERS = frozenset({"<think>", "</think>"})


class ChatTemplate:
    """The compiled template. Safe to use from several threads."""

    def __init__(self, source: str, tokenizer: TextTokenizer) -> None:
        """Raises TokenizerError if the template does not compile."""
        self._source = source
        self._tokenizer = tokenizer
        # A template that does not know the role would drop its messages in silence.
        self._knows_developer = "developer" in source
        self._knows_calls = "tool_calls" in source
        self.tool_format = find_format(source, tokenizer.vocabulary.marker_ids)
        try:
            environment = _environment()
            self._template = environment.from_string(source)
            self._knows_tools = "tools" in find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            raise TokenizerError(f"chat template: does not compile: {error}") from error

    @staticmethod
    def from_checkpoint(folder: Path, tokenizer: TextTokenizer) -> ChatTemplate | None:
        """The template of the folder: chat_template.jinja, or the one in tokenizer_config.json; None without one."""
        path = folder / "chat_template.jinja"
        if path.exists():
            try:
                return ChatTemplate(path.read_text(encoding="utf-8"), tokenizer)
            except (OSError, UnicodeDecodeError) as error:
                raise TokenizerError(f"{path.name}: cannot be read: {error}") from error
        source = tokenizer.config.get("chat_template")
        if isinstance(source, list):
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
        return ChatTemplate(source, tokenizer) if isinstance(source, str) else None

    @property
    def source(self) -> str:
        return self._source

    def encode(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        switches: Mapping[str, bool],
        tools: Sequence[Tool] = (),
    ) -> list[int]:
        """Render and tokenise a chat. Takes time: call it outside the event loop.

        switches: further variables of the template. tools: that the model may call; a template that says nothing of
        them has them described in the system message. Raises BadRequest where the template refuses the messages.
        """
        typed = [text for message in messages for text in _texts_of(message)]
        typed += [text for tool in tools for text in texts_of_tool(tool)]
        guard = self._tokenizer.guard([*typed, self._source])
        variables = [self._template_message(message, guard) for message in messages]
        if tools and not self._knows_tools:
            _add_to_system(variables, describe_tools(tools, self.tool_format, guard.protect))
        max_characters = (
            len(self._source)
            + _MAX_ESCAPED_LENGTH * sum(map(len, typed))
            + _MAX_OVERHEAD_PER_MESSAGE * (len(messages) + 1)
        )
        rendered = self._render(
            max_characters,
            messages=variables,
            add_generation_prompt=add_generation_prompt,
            bos_token=self._tokenizer.bos_token or "",
            eos_token=self._tokenizer.eos_token or "",
            pad_token=self._tokenizer.pad_token or "",
            tools=[_template_tool(tool, guard) for tool in tools] if tools and self._knows_tools else None,
            **switches,
        )
        return self._tokenizer.encode_guarded(rendered, guard)

    def _render(self, max_characters: int, **variables: Any) -> str:
        pieces: list[str] = []
        num_characters = 0
        try:
            for piece in self._template.generate(**variables):
                num_characters += len(piece)
                if num_characters > max_characters:
                    raise BadRequest("The chat template's output is too long.", param="messages")
                pieces.append(piece)
        except _RefusedByTemplate as error:
            reason = str(error)[:_MAX_REFUSAL_LENGTH]
            raise BadRequest(f"The model's chat template refuses these messages: {reason}", param="messages") from error
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise BadRequest("The model's chat template cannot render these messages.", param="messages") from error
        return "".join(pieces)

    def _template_message(self, message: Message, guard: MarkerGuard) -> dict[str, Any]:
        role = "system" if message.role == "developer" and not self._knows_developer else message.role
        allowed = _REASONING_MARKERS if role == "assistant" else frozenset[str]()
        variables: dict[str, Any] = {"role": role, "content": None}
        if message.content is not None:
            variables["content"] = guard.protect(message.content, allowed=allowed)
        for name in ("name", "tool_call_id"):
            value = getattr(message, name)
            if value is not None:
                variables[name] = guard.protect(value)
        reasoning = message.reasoning_content or message.reasoning
        if reasoning is not None:
            variables["reasoning_content"] = guard.protect(reasoning)
        if not self._knows_calls:
            self._write_as_text(variables, message, guard)
        elif message.tool_calls:
            variables["tool_calls"] = [
                {
                    "type": call.type,
                    "id": guard.protect(call.id or ""),
                    "function": {
                        "name": guard.protect(call.function.name),
                        "arguments": guard.protect(call.function.arguments),
                    },
                }
                for call in message.tool_calls
            ]
        return variables

    def _write_as_text(self, variables: dict[str, Any], message: Message, guard: MarkerGuard) -> None:
        """Calls and their results for a template that would leave them out."""
        if message.role == "tool":
            variables["role"] = "user"
            variables["content"] = f"<tool_response>\n{variables['content']}\n</tool_response>"
        elif message.tool_calls:
            calls = [
                self.tool_format.write_call(guard.protect(call.function.name), guard.protect(call.function.arguments))
                for call in message.tool_calls
            ]
            variables["content"] = (variables["content"] or "") + self.tool_format.write_calls(calls)


class _RefusedByTemplate(jinja2.TemplateError):
    """The template called raise_exception; its message is the checkpoint's own text."""


def _texts_of(message: Message) -> list[str]:
    texts = [message.content, message.name, message.tool_call_id, message.reasoning_content, message.reasoning]
    for call in message.tool_calls or ():
        texts += [call.id, call.function.name, call.function.arguments]
    return [text for text in texts if text is not None]


def _add_to_system(messages: list[dict[str, Any]], text: str) -> None:
    """Behind what the system message says, or as one."""
    if messages and messages[0]["role"] == "system":
        messages[0]["content"] = f"{messages[0]['content']}\n\n{text}"
    else:
        messages.insert(0, {"role": "system", "content": text})


def _template_tool(tool: Tool, guard: MarkerGuard) -> dict[str, Any]:
    function = tool.function
    return {
        "type": "function",
        "function": {
            "name": guard.protect(function.name),
            "description": guard.protect(function.description or ""),
            "parameters": _protect_all(function.parameters or {}, guard),
        },
    }


def _protect_all(value: Any, guard: MarkerGuard) -> Any:
    """The same with every text protected; as deep as form_types allows."""
    if isinstance(value, str):
        return guard.protect(value)
    if isinstance(value, dict):
        return {guard.protect(key): _protect_all(inner, guard) for key, inner in value.items()}
    return [_protect_all(inner, guard) for inner in value] if isinstance(value, list) else value


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that published templates are written for (as transformers sets it up)."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _format_now
    return environment


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, sort_keys: bool = False) -> str:
    """Without the HTML escapes of jinja's own filter."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedByTemplate(message)


def _format_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
