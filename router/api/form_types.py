"""Request types for the form of an answer: tools, and schemas and grammars that it must match."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field, PlainValidator, StrictBool, StrictStr, model_validator

from router.api.fields import StrictModel, Text, UnsupportedField, WrongField, check_text

# Of a grammar's text: generous for schemas that people write, small enough to compile within the time.
MAX_GRAMMAR_BYTES = 256 * 1024
# Deeper schemas are not written by people, and recursion is what breaks compilers.
_MAX_SCHEMA_DEPTH = 64
_MAX_CHOICES = 256
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def check_schema(value: Any) -> dict[str, Any] | None:
    """A JSON schema as an object. Raises ValueError if it is none, too deep or too large, or has text that no encoder
    takes."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("must be a JSON schema, an object")
    pending: list[tuple[Any, int]] = [(value, 1)]
    num_characters = 0  # at least so many
    while pending:
        part, depth = pending.pop()
        num_characters += len(part) if isinstance(part, str) else 1
        if num_characters > MAX_GRAMMAR_BYTES:
            raise ValueError(f"must not have more than {MAX_GRAMMAR_BYTES} bytes as JSON")
        if isinstance(part, str):
            check_text(part)
        elif isinstance(part, dict | list):
            if depth > _MAX_SCHEMA_DEPTH:
                raise ValueError(f"must not be nested more than {_MAX_SCHEMA_DEPTH} deep")
            if isinstance(part, dict):
                pending.extend((key, depth) for key in part)
                part = list(part.values())
            pending.extend((inner, depth + 1) for inner in part)
    return value


Schema = Annotated[dict[str, Any] | None, PlainValidator(check_schema, json_schema_input_type=dict[str, Any] | None)]


def _check_tool_name(value: str) -> str:
    if not _TOOL_NAME.fullmatch(value):
        raise ValueError("must have 1 to 64 letters, digits, underscores, dots or dashes")
    return value


ToolName = Annotated[StrictStr, AfterValidator(_check_tool_name)]


class Function(StrictModel):
    name: ToolName
    description: Text | None = None
    parameters: Schema = None
    """Of its arguments, an object; None: any object."""
    strict: StrictBool | None = None
    """True: a schema that cannot be enforced to the letter is refused."""


class Tool(StrictModel):
    type: Literal["function"]
    function: Function


class NamedTool(NamedTuple):
    """The one tool that must be called."""

    name: str


ToolChoice = Literal["auto", "none", "required"] | NamedTool


def check_tool_choice(value: Any) -> ToolChoice | None:
    """Raises ValueError."""
    if value is None or value in ("auto", "none", "required"):
        return value
    if isinstance(value, dict) and value.get("type") == "function" and isinstance(value.get("function"), dict):
        name = value["function"].get("name")
        if isinstance(name, str):
            return NamedTool(name)
    if isinstance(value, dict) and isinstance(value.get("type"), str) and value["type"] != "function":
        raise UnsupportedField("only functions are supported")
    raise ValueError('must be "auto", "none", "required" or {"type": "function", "function": {"name": ...}}')


class JsonSchemaFormat(StrictModel):
    name: ToolName | None = None
    description: Text | None = None
    json_schema: Annotated[Schema, Field(alias="schema")] = None
    strict: StrictBool | None = None
    """False: what cannot be enforced is left out. Otherwise such a schema is refused."""


class ResponseFormat(StrictModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check_together(self) -> ResponseFormat:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.json_schema is None):
            raise WrongField("json_schema", "type json_schema needs one with a schema")
        return self


def _check_choices(value: Any) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(choice, str) and choice for choice in value):
        raise ValueError("must be a list of texts that are not empty")
    if not 1 <= len(value) <= _MAX_CHOICES:
        raise ValueError(f"must have 1 to {_MAX_CHOICES} items")
    return [check_text(choice) for choice in value]


class StructuredOutputs(StrictModel):
    """The same by other means, as vLLM names them: exactly one of the fields."""

    json_schema: Annotated[Schema, Field(alias="json")] = None
    regex: Text | None = None
    choice: Annotated[list[str] | None, PlainValidator(_check_choices, json_schema_input_type=list[str] | None)] = None
    grammar: Text | None = None
    """Context-free, in Lark's notation."""

    @model_validator(mode="after")
    def _check_together(self) -> StructuredOutputs:
        if sum(value is not None for value in (self.json_schema, self.regex, self.choice, self.grammar)) != 1:
            raise ValueError("give exactly one of json, regex, choice and grammar")
        return self
