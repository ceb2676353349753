"""The anthropic client against the served demo."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import jsonschema
import pytest

from tests.compat.conftest import MODEL
from tests.compat.test_openai import PERSON
from tests.local_stack import LocalStack

MESSAGES: list[Any] = [{"role": "user", "content": "def is_empty(self):"}]


@pytest.fixture(scope="module")
def claude(stack: LocalStack) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=stack.base_url, api_key="none", timeout=60.0, max_retries=0) as client:
        yield client


def test_messages_are_the_same_in_one_piece_and_streamed(claude: anthropic.Anthropic) -> None:
    fields: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 16, "extra_body": {"temperature": 0}}
    whole = claude.messages.create(**fields)
    with claude.messages.stream(**fields) as stream:
        streamed = stream.get_final_message()
    assert [block.to_dict() for block in whole.content] == [block.to_dict() for block in streamed.content]
    assert whole.stop_reason == streamed.stop_reason
    assert whole.usage.output_tokens == streamed.usage.output_tokens


def test_a_tool_is_used(claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(
        model=MODEL, messages=MESSAGES, max_tokens=400, extra_body={"temperature": 1},
        tools=[{"name": "set_person", "input_schema": PERSON}],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
    ) as stream:  # fmt: skip
        message = stream.get_final_message()
    if message.stop_reason == "tool_use":  # else it was cut off: there is no seed in this API
        (use,) = message.content
        assert use.type == "tool_use"
        jsonschema.validate(use.input, PERSON)
    else:
        assert message.stop_reason == "max_tokens"


def test_count_tokens(claude: anthropic.Anthropic) -> None:
    counted = claude.messages.count_tokens(model=MODEL, messages=MESSAGES)
    used = claude.messages.create(model=MODEL, messages=MESSAGES, max_tokens=1).usage
    assert counted.input_tokens == used.input_tokens + (used.cache_read_input_tokens or 0)


def test_errors(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="nobody", messages=MESSAGES, max_tokens=1)
    with pytest.raises(anthropic.BadRequestError):
        claude.messages.create(model=MODEL, messages=MESSAGES, max_tokens=100_000)
