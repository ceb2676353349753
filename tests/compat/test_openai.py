"""openai-python against the served demo: what docs/compatibility.md promises of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import jsonschema
import openai
import pytest

from tests.compat.conftest import MODEL
from tests.local_stack import LocalStack

MESSAGES: list[Any] = [{"role": "user", "content": "def is_empty(self):"}]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "set_person", "parameters": PERSON, "strict": True}}


@pytest.fixture(scope="module")
def client(stack: LocalStack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.base_url}/v1", api_key="none", timeout=60.0, max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_chat_is_the_same_in_one_piece_and_streamed(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**fields)
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert whole.usage is not None and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert whole.usage.prompt_tokens_details is not None and whole.usage.completion_tokens_details is not None


async def test_the_async_client_streams(stack: LocalStack) -> None:
    async with openai.AsyncOpenAI(base_url=f"{stack.base_url}/v1", api_key="none", timeout=60.0) as client:
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8, stream=True)
        reasons = [chunk.choices[0].finish_reason async for chunk in stream]
    assert reasons[-1] in ("length", "stop")


def test_completions_with_echo_and_logprobs(client: openai.OpenAI) -> None:
    completion = client.completions.create(model=MODEL, prompt="import os", max_tokens=2, echo=True, logprobs=2)
    choice = completion.choices[0]
    assert choice.text.startswith("import os")
    assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
    assert len(choice.logprobs.tokens or ()) == len(choice.logprobs.token_logprobs)


def test_json_schema(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    completion = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, response_format=form, max_tokens=400, temperature=1, seed=5
    )
    assert completion.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(completion.choices[0].message.content or ""), PERSON)


@pytest.mark.parametrize("is_named", [True, False])
def test_a_tool_is_called(client: openai.OpenAI, is_named: bool) -> None:
    choice: Any = {"type": "function", "function": {"name": "set_person"}} if is_named else "required"
    completion = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False,
        max_tokens=400, temperature=1, seed=7,
    )  # fmt: skip
    assert completion.choices[0].finish_reason == "tool_calls"
    (call,) = completion.choices[0].message.tool_calls or []
    assert call.type == "function" and call.function.name == "set_person"
    jsonschema.validate(json.loads(call.function.arguments), PERSON)


def test_a_tool_call_streams(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, tools=[TOOL], tool_choice="required", parallel_tool_calls=False,
        max_tokens=400, temperature=1, seed=7,
    ) as stream:  # fmt: skip
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or []
    jsonschema.validate(json.loads(call.function.arguments), PERSON)


def test_responses(client: openai.OpenAI) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "person", "schema": PERSON, "strict": True}}
    response = client.responses.create(
        model=MODEL, input="x", text=form, max_output_tokens=400, temperature=1, extra_body={"seed": 5}
    )
    assert response.status == "completed"
    jsonschema.validate(json.loads(response.output_text), PERSON)
    with client.responses.stream(model=MODEL, input="def", max_output_tokens=8) as stream:
        assert list(stream)[-1].type in ("response.completed", "response.incomplete")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model": "nobody"}, openai.NotFoundError),
        ({"temperature": 9}, openai.BadRequestError),
        ({"messages": [{"role": "user", "content": "x " * 9000}]}, openai.BadRequestError),
    ],
)
def test_errors_have_the_clients_own_classes(
    client: openai.OpenAI, change: dict[str, Any], error: type[openai.APIStatusError]
) -> None:
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, "max_tokens": 4, **change})
    assert caught.value.code and caught.value.type
    assert caught.value.response.headers["x-request-id"]


def test_a_refusal_for_the_moment_is_repeated(stack: LocalStack) -> None:
    """The first two attempts meet a server that is overloaded, as this one says it."""
    refusals = [429, 503]

    class Busy(httpx2.HTTPTransport):
        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            if refusals:
                body = {"error": {"message": "busy", "type": "x", "param": None, "code": "overloaded"}}
                return httpx2.Response(refusals.pop(), json=body, headers={"Retry-After": "0"}, request=request)
            return super().handle_request(request)

    with httpx2.Client(transport=Busy()) as http:
        client = openai.OpenAI(base_url=f"{stack.base_url}/v1", api_key="none", http_client=http, timeout=60.0)
        assert client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=2).choices
    assert refusals == []
