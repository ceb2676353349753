"""How models write tool calls, and what they are told about their tools.

The formats of DeepSeek, as their published chat templates write the calls of earlier turns:

    V3, R1   CALLS_BEGIN CALL_BEGIN function SEPARATOR NAME \\n```json\\n ARGUMENTS \\n``` CALL_END ... CALLS_END
    V3.1     CALLS_BEGIN CALL_BEGIN NAME SEPARATOR ARGUMENTS CALL_END ... CALLS_END

(huggingface.co/deepseek-ai/DeepSeek-V3-0324 and DeepSeek-V3.1, tokenizer_config.json and README.) Their markers are
tokens of their own. A model whose vocabulary has none is asked for TAGS, in plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from router.api.form_types import Tool
from router.llguidance_grammars import schema_options
from router.schema_dates import bind_dates

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
TOOL_MARKERS = (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR)


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """The texts around the names and arguments of calls. opening, closing: of the whole list; may be empty."""

    opening: str
    before_name: str
    before_arguments: str
    after_arguments: str
    between: str
    closing: str

    def write_call(self, name: str, arguments: str) -> str:
        return f"{self.before_name}{name}{self.before_arguments}{arguments}{self.after_arguments}"

    def write_calls(self, calls: Sequence[str]) -> str:
        return f"{self.opening}{self.between.join(calls)}{self.closing}"

    @property
    def has_markers(self) -> bool:
        return self.opening != ""


V3 = ToolFormat(
    CALLS_BEGIN, f"{CALL_BEGIN}function{SEPARATOR}", "\n```json\n", f"\n```{CALL_END}", "\n", CALLS_END
)  # fmt: skip
V3_1 = ToolFormat(CALLS_BEGIN, CALL_BEGIN, SEPARATOR, CALL_END, "", CALLS_END)
TAGS = ToolFormat("", '<tool_call>{"name": "', '", "arguments": ', "}</tool_call>", "\n", "")


def find_format(template: str | None, marker_ids: Mapping[str, int]) -> ToolFormat:
    """The format of a checkpoint: its template shows how it writes calls."""
    if not all(marker in marker_ids for marker in TOOL_MARKERS):
        return TAGS
    return V3 if template is not None and "```json" in template else V3_1


def texts_of_tool(tool: Tool) -> list[str]:
    """Everything in it that a client wrote."""
    function = tool.function
    return [function.name, function.description or "", json.dumps(function.parameters or {}, ensure_ascii=False)]


def describe_tools(tools: Sequence[Tool], tool_format: ToolFormat, protect: Callable[[str], str]) -> str:
    """The text for the system prompt of a model whose template says nothing of tools, in the layout of DeepSeek-V3.1's
    README. protect: keeps what clients wrote from being markers."""
    parts = ["## Tools\nYou have access to the following tools:\n"]
    for tool in tools:
        name, description, parameters = map(protect, texts_of_tool(tool))
        parts.append(f"### {name}\nDescription: {description}\n\nParameters: {parameters}\n")
    example = tool_format.write_calls([tool_format.write_call("TOOL_NAME", "ARGUMENTS")])
    parts.append(
        f"To use tools, write exactly this:\n{example}\nTOOL_NAME is the name of one of the tools, ARGUMENTS a JSON "
        f"object that fits its parameters. Several calls follow one another before the end."
    )
    return "\n".join(parts)


def write_grammar(
    tools: Sequence[Tool],
    tool_format: ToolFormat,
    marker_ids: Mapping[str, int],
    *,
    allows_parallel: bool,
    is_open: bool = False,
    otherwise: Any = None,
) -> str:
    """A Lark grammar (llguidance's dialect) of calls to these tools. is_open: the opening has been written already.
    otherwise: a JSON schema that the answer may match instead of being calls; None: it must be calls."""
    literal = _Literals(marker_ids).write
    call = f"{literal(tool_format.before_name)} call {literal(tool_format.after_arguments)}"
    more = f" ({literal(tool_format.between)} {call})*" if allows_parallel else ""
    opening = "" if is_open else literal(tool_format.opening)
    calls = f"{opening} {call}{more} {literal(tool_format.closing)}"
    rules = [f"start: calls{'' if otherwise is None else ' | otherwise'}", f"calls: {calls}"]
    rules.append(f"call: {' | '.join(f'call_{index}' for index in range(len(tools)))}")
    for index, tool in enumerate(tools):
        function = tool.function
        schema = _with_options({"type": "object", **(function.parameters or {})}, is_lenient=not function.strict)
        rules.append(f"call_{index}: {literal(function.name + tool_format.before_arguments)} arguments_{index}")
        rules.append(f"arguments_{index}: %json {json.dumps(schema)}")
    if otherwise is not None:
        rules.append(f"otherwise: %json {json.dumps(_with_options(otherwise, is_lenient=False))}")
    return "\n".join(rules)


def _with_options(schema: Mapping[str, Any], *, is_lenient: bool) -> dict[str, Any]:
    """A client's schema with our own options for the library, whatever it may say itself."""
    return {**bind_dates(schema), "x-guidance": schema_options(is_lenient=is_lenient)}


class _Literals:
    """Text as terminals of a grammar: markers by their ids, all else in quotes."""

    def __init__(self, marker_ids: Mapping[str, int]) -> None:
        self._marker_ids = marker_ids
        self._pattern = re.compile("|".join(re.escape(marker) for marker in TOOL_MARKERS))

    def write(self, text: str) -> str:
        parts: list[str] = []
        start = 0
        for match in self._pattern.finditer(text):
            parts.append(self._quote(text[start : match.start()]))
            parts.append(f"<[{self._marker_ids[match.group()]}]>")
            start = match.end()
        parts.append(self._quote(text[start:]))
        return " ".join(part for part in parts if part)

    @staticmethod
    def _quote(text: str) -> str:
        return json.dumps(text) if text else ""
