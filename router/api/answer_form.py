"""From what a request asks of its answer's form to the grammar that the router follows, and how to read the answer.

Pure: what the answer may be depends on the request, on the checkpoint's way to write tool calls, and on whether its
prompt ends inside of a reasoning part, which is free.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from router.api.answer_parser import THINK_BEGIN, THINK_END
from router.api.chat_types import ChatRequest
from router.api.form_types import StructuredOutputs
from router.api.tool_formats import CALLS_BEGIN, ToolFormat, write_grammar
from router.v1 import router_pb2

# Tokens from the end of a prompt within which a template opens a reasoning part.
_OPENING_LENGTH = 8


class BoundForm(NamedTuple):
    """param: the field that asks for it, for refusals."""

    grammar: router_pb2.Grammar
    param: str


def is_reasoning_open(prompt_token_ids: Sequence[int], marker_ids: Mapping[str, int]) -> bool:
    """Whether the prompt ends inside of a reasoning part: its template has just opened one."""
    begin, end = marker_ids.get(THINK_BEGIN), marker_ids.get(THINK_END)
    for token_id in reversed(prompt_token_ids[-_OPENING_LENGTH:]):
        if token_id == end:
            return False
        if token_id == begin:
            return True
    return False


def bind_answer(
    body: ChatRequest, tool_format: ToolFormat, marker_ids: Mapping[str, int], *, is_reasoning: bool
) -> BoundForm | None:
    """None: any text will do."""
    form = _bind(body, tool_format, marker_ids)
    if form is not None and is_reasoning and not form.grammar.start_after:
        form.grammar.start_after.append(marker_ids[THINK_END])
    return form


def bind_text(outputs: StructuredOutputs) -> BoundForm:
    """For an answer that is all text."""
    param = "structured_outputs"
    if outputs.regex is not None:
        return BoundForm(router_pb2.Grammar(regex=outputs.regex), f"{param}.regex")
    if outputs.grammar is not None:
        return BoundForm(router_pb2.Grammar(lark=outputs.grammar), f"{param}.grammar")
    if outputs.choice is not None:
        rule = " | ".join(json.dumps(choice) for choice in outputs.choice)
        return BoundForm(router_pb2.Grammar(lark=f"start: {rule}"), f"{param}.choice")
    return BoundForm(router_pb2.Grammar(json_schema=json.dumps(outputs.json_schema)), f"{param}.json")


def _bind(body: ChatRequest, tool_format: ToolFormat, marker_ids: Mapping[str, int]) -> BoundForm | None:
    tools = body.usable_tools
    is_parallel = body.parallel_tool_calls is not False
    must_call = body.must_call
    text_form = _bind_content(body)
    if not tools or (text_form is not None and not must_call and text_form.grammar.WhichOneof("kind") != "json_schema"):
        return text_form
    if must_call or text_form is not None:
        otherwise = None if must_call or text_form is None else json.loads(text_form.grammar.json_schema)
        lark = write_grammar(tools, tool_format, marker_ids, allows_parallel=is_parallel, otherwise=otherwise)
        return BoundForm(router_pb2.Grammar(lark=lark), "tools")
    if not tool_format.has_markers:
        return None  # nothing says when a call begins
    lark = write_grammar(tools, tool_format, marker_ids, allows_parallel=is_parallel, is_open=True)
    return BoundForm(router_pb2.Grammar(lark=lark, start_after=[marker_ids[CALLS_BEGIN]]), "tools")


def _bind_content(body: ChatRequest) -> BoundForm | None:
    if body.structured_outputs is not None:
        return bind_text(body.structured_outputs)
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object" or wanted.json_schema is None:
        return BoundForm(router_pb2.Grammar(json_schema='{"type":"object"}'), "response_format")
    schema = wanted.json_schema
    grammar = router_pb2.Grammar(json_schema=json.dumps(schema.json_schema), lenient=schema.strict is False)
    return BoundForm(grammar, "response_format.json_schema.schema")
