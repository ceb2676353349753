"""langchain-openai against the served demo. Needs the `compat` extra."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from tests.compat.conftest import MODEL
from tests.compat.test_openai import PERSON
from tests.local_stack import LocalStack

langchain_openai = pytest.importorskip("langchain_openai", reason="needs the compat extra: make compat")

SCHEMA = {"title": "set_person", "description": "A person.", **PERSON}


@pytest.fixture(scope="module")
def model(stack: LocalStack) -> Any:
    return langchain_openai.ChatOpenAI(
        base_url=f"{stack.base_url}/v1", api_key="none", model=MODEL, temperature=1, seed=7, max_tokens=400, timeout=60
    )


def test_invoke_and_stream(model: Any) -> None:
    short = model.bind(max_tokens=8)
    assert short.invoke("def is_empty(self):").usage_metadata["output_tokens"] <= 8
    chunks = list(short.stream("def is_empty(self):"))
    assert sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chunks) <= 8


async def test_ainvoke(model: Any) -> None:
    assert (await model.bind(max_tokens=4).ainvoke("def")).response_metadata["finish_reason"]


def test_a_bound_tool_is_called(model: Any) -> None:
    answer = model.bind_tools([SCHEMA], tool_choice="set_person", parallel_tool_calls=False).invoke("def")
    (call,) = answer.tool_calls
    jsonschema.validate(call["args"], PERSON)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(model: Any, method: str) -> None:
    jsonschema.validate(model.with_structured_output(SCHEMA, method=method).invoke("def"), PERSON)
