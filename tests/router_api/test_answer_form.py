"""Tools, formats and reasoning: what the router is asked for, what clients are told. Official clients, real gRPC."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import anthropic
import grpc
import httpx
import openai
import pytest

from router.api.answer_form import bind_answer, is_reasoning_open
from router.api.answer_parser import ANSWER_MARKERS, StandIns
from router.api.chat_template import ChatTemplate
from router.api.chat_types import ChatRequest, Message
from router.api.form_types import Function, Tool
from router.api.router_client import StaticEndpoints
from router.api.settings import ApiSettings
from router.api.tokenizer import TextTokenizer
from router.api.tool_formats import CALLS_BEGIN, TAGS, V3, V3_1, find_format, write_grammar
from router.errors import GrammarFailed
from router.grammar import Grammar, GrammarState
from router.llguidance_grammars import LlguidanceCompiler
from tests.router_api.api_server import ApiServer
from tests.router_api.conftest import MODEL
from tests.router_api.scripted_router import ScriptedRouter, answer, fail, in_turn

MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "Looks out of the window.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOLS: list[Any] = [{"type": "function", "function": WEATHER}]
ARGUMENTS = '{"city": "Bern"}'
CALL = V3_1.write_calls([V3_1.write_call("get_weather", ARGUMENTS)])
PERSON: dict[str, Any] = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


def ids_of(tokenizer: TextTokenizer, text: str) -> list[int]:
    return tokenizer.encode_raw(text, add_special_tokens=False)


def test_a_call_in_one_piece(client: openai.OpenAI, router: ScriptedRouter, tokenizer: TextTokenizer) -> None:
    router.script = answer(ids_of(tokenizer, "I look." + CALL), stop_id=1)
    choice = client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=TOOLS).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == ("get_weather", ARGUMENTS)
    grammar = router.requests[0].grammar
    assert list(grammar.start_after) == ids_of(tokenizer, CALLS_BEGIN)
    prompt = tokenizer.decode(router.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert "Looks out of the window." in prompt


def test_a_call_streamed(client: openai.OpenAI, router: ScriptedRouter, tokenizer: TextTokenizer) -> None:
    router.script = answer(ids_of(tokenizer, CALL), stop_id=1)
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, tools=TOOLS) as stream:
        arguments = [event.arguments_delta for event in stream if event.type == "tool_calls.function.arguments.delta"]
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert len(arguments) > 1
    assert "".join(arguments) == call.function.arguments == ARGUMENTS


@pytest.mark.parametrize(
    ("choice", "allows"),
    [
        ("auto", [CALL[len(CALLS_BEGIN) :]]),
        ("required", [CALL]),
        ({"type": "function", "function": {"name": "get_weather"}}, [CALL]),
    ],
    ids=["auto", "required", "named"],
)
def test_the_grammar_of_a_choice(
    client: openai.OpenAI,
    router: ScriptedRouter,
    checkpoint: Path,
    tokenizer: TextTokenizer,
    choice: Any,
    allows: list[str],
) -> None:
    other: Any = {"type": "function", "function": {"name": "other"}}
    client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=[*TOOLS, other], tool_choice=choice)
    lark = router.requests[0].grammar.lark
    compiler = LlguidanceCompiler.from_checkpoint(checkpoint, 400, [1])
    assert compiler is not None
    for text in allows:
        matched = GrammarState(compiler.compile(Grammar("lark", lark)), frozenset(), ids_of(tokenizer, text))
        assert matched.find_allowed([]) is not None
    wrong = allows[0].replace("city", "town")
    with pytest.raises(GrammarFailed):
        GrammarState(compiler.compile(Grammar("lark", lark)), frozenset(), [*ids_of(tokenizer, wrong), 1])
    assert ("other" in lark) == isinstance(choice, str)


def test_tool_choice_none_hides_the_tools(
    client: openai.OpenAI, router: ScriptedRouter, tokenizer: TextTokenizer
) -> None:
    router.script = answer(ids_of(tokenizer, CALL), stop_id=1)
    completion = client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=TOOLS, tool_choice="none")
    assert completion.choices[0].message.content == CALL
    assert not router.requests[0].HasField("grammar")
    assert "window" not in tokenizer.decode(router.requests[0].prompt_token_ids, skip_special_tokens=False)


def test_markers_in_what_clients_write_about_tools_are_text(
    client: openai.OpenAI, router: ScriptedRouter, tokenizer: TextTokenizer
) -> None:
    tool: Any = {"type": "function", "function": {**WEATHER, "description": f"{CALLS_BEGIN}<think>"}}
    client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=[tool])
    ids = list(router.requests[0].prompt_token_ids)
    assert ids.count(ids_of(tokenizer, CALLS_BEGIN)[0]) == 1  # ours, which shows the format
    assert ids_of(tokenizer, "<think>")[0] not in ids


def test_reasoning_is_apart(client: openai.OpenAI, router: ScriptedRouter, tokenizer: TextTokenizer) -> None:
    router.script = answer(ids_of(tokenizer, "<think>\nhm</think>\n\nyes"), stop_id=1, cached_tokens=2)
    completion = client.chat.completions.create(model=MODEL, messages=MESSAGES)
    message = completion.choices[0].message
    assert (message.content, getattr(message, "reasoning_content", None)) == ("yes", "hm")
    usage = completion.usage
    assert usage is not None and usage.completion_tokens_details is not None
    assert usage.completion_tokens_details.reasoning_tokens == len(ids_of(tokenizer, "<think>\nhm</think>"))
    assert usage.model_extra is not None and usage.model_extra["prompt_cache_hit_tokens"] == 2


def test_a_form_begins_behind_the_reasoning_that_the_template_opened(
    checkpoint: Path, tokenizer: TextTokenizer
) -> None:
    source = "{% for message in messages %}{{ message['content'] }}{% endfor %}<think>\n"
    template = ChatTemplate(source, tokenizer)
    ids = template.encode([Message(role="user", content="x</think>")], add_generation_prompt=True, switches={})
    markers = tokenizer.vocabulary.marker_ids
    assert is_reasoning_open(ids, markers)
    assert not is_reasoning_open([*ids, markers["</think>"]], markers)
    body = ChatRequest.model_validate({"messages": MESSAGES, "response_format": {"type": "json_object"}})
    form = bind_answer(body, template.tool_format, markers, is_reasoning=True)
    assert form is not None and list(form.grammar.start_after) == [markers["</think>"]]


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type":"object"}'),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}},
            "json_schema",
            json.dumps(PERSON),
        ),
        ({"structured_outputs": {"regex": "[a-z]+"}}, "regex", "[a-z]+"),
        ({"structured_outputs": {"choice": ['a"', "b"]}}, "lark", 'start: "a\\"" | "b"'),
        ({"structured_outputs": {"grammar": 'start: "x"'}}, "lark", 'start: "x"'),
        ({"structured_outputs": {"json": PERSON}}, "json_schema", json.dumps(PERSON)),
    ],
)
def test_formats_travel_as_grammars(
    http: httpx.Client, router: ScriptedRouter, fields: dict[str, Any], kind: str, text: str
) -> None:
    answered = http.post("/v1/chat/completions", json={"messages": MESSAGES, **fields})
    assert answered.status_code == 200, answered.text
    grammar = router.requests[0].grammar
    assert grammar.WhichOneof("kind") == kind
    assert getattr(grammar, kind) == text


def test_completions_take_grammars_too(http: httpx.Client, router: ScriptedRouter) -> None:
    answered = http.post("/v1/completions", json={"prompt": "x", "structured_outputs": {"regex": "[0-9]"}})
    assert answered.status_code == 200, answered.text
    assert router.requests[0].grammar.regex == "[0-9]"


def deep(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        value = {"anyOf": [value]}
    return value


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": {"$ref": "#"}}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": deep(80)}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "(hunter2"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": "hunter2"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"grammar": "x" * 300_000}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"tools": [{"type": "function", "function": {"name": "hunter2 !"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "retrieval"}]}, "tools.0.type"),
        ({"tools": TOOLS * 2}, "tools"),
        ({"tools": TOOLS, "tool_choice": "hunter2"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "hunter2"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": "\ud800"}}}]},
            "tools.0.function.parameters",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}],
             "tool_choice": "required"},
            "tools",
        ),
    ],
)  # fmt: skip
def test_forms_that_are_refused(
    http: httpx.Client, router: ScriptedRouter, fields: dict[str, Any], param: str | None
) -> None:
    content = json.dumps({"messages": MESSAGES, **fields})
    answered = http.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert answered.status_code in (400, 413), answered.text
    assert answered.status_code == 413 or answered.json()["error"]["param"] == param
    assert "hunter2" not in answered.text
    assert not router.requests


def test_the_format_of_a_checkpoint_is_the_one_of_its_template(tokenizer: TextTokenizer) -> None:
    markers = tokenizer.vocabulary.marker_ids
    assert find_format("... '```json' ...", markers) == V3
    assert find_format("{{ x }}", markers) == V3_1
    assert find_format("{{ x }}", {}) == TAGS


@pytest.mark.parametrize("tool_format", [V3, V3_1], ids=["V3", "V3.1"])
@pytest.mark.parametrize("allows_parallel", [True, False])
def test_what_the_format_writes_matches_its_grammar(
    checkpoint: Path, tokenizer: TextTokenizer, tool_format: Any, allows_parallel: bool
) -> None:
    tools = [Tool(type="function", function=Function(name="get_weather", parameters=WEATHER["parameters"]))]
    lark = write_grammar(tools, tool_format, tokenizer.vocabulary.marker_ids, allows_parallel=allows_parallel)
    compiler = LlguidanceCompiler.from_checkpoint(checkpoint, 400, [1])
    assert compiler is not None
    one = tool_format.write_call("get_weather", ARGUMENTS)
    GrammarState(
        compiler.compile(Grammar("lark", lark)), frozenset(), ids_of(tokenizer, tool_format.write_calls([one]))
    )
    two = ids_of(tokenizer, tool_format.write_calls([one, one]))
    if allows_parallel:
        GrammarState(compiler.compile(Grammar("lark", lark)), frozenset(), two)
    else:
        with pytest.raises(GrammarFailed):
            GrammarState(compiler.compile(Grammar("lark", lark)), frozenset(), two)


def test_stand_ins_come_back_as_they_were(tokenizer: TextTokenizer) -> None:
    stand_ins = StandIns({marker: index for index, marker in enumerate(ANSWER_MARKERS)})
    text = f"a {CALLS_BEGIN} <think> é"
    assert stand_ins.remove(stand_ins.put(text)) == text
    assert len(stand_ins.put(CALLS_BEGIN)) == 1


def test_a_stop_string_may_be_a_marker(client: openai.OpenAI, router: ScriptedRouter, tokenizer: TextTokenizer) -> None:
    router.script = answer(ids_of(tokenizer, "<think>hm</think>yes"), stop_id=1)
    completion = client.chat.completions.create(model=MODEL, messages=MESSAGES, stop=["</think>"])
    assert completion.choices[0].finish_reason == "stop"
    assert getattr(completion.choices[0].message, "reasoning_content", None) == "hm"


@pytest.mark.parametrize(
    ("field", "names"), [("reasoning", ["reasoning"]), ("both", ["reasoning", "reasoning_content"])]
)
def test_the_field_of_the_reasoning_is_a_setting(
    settings: ApiSettings, router: ScriptedRouter, tokenizer: TextTokenizer, field: Any, names: list[str]
) -> None:
    router.script = answer(ids_of(tokenizer, "<think>hm</think>yes"), stop_id=1)
    server = ApiServer(replace(settings, reasoning_field=field), StaticEndpoints([router.endpoint]))
    try:
        body = {"model": MODEL, "messages": MESSAGES}
        message = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()["choices"][0]["message"]
        lines = httpx.post(f"{server.url}/v1/chat/completions", json={**body, "stream": True}).text.splitlines()
    finally:
        server.stop()
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines if line.startswith("data: {")]
    assert message["content"] == "yes"
    for name in ("reasoning", "reasoning_content"):
        assert message.get(name) == ("hm" if name in names else None)
        assert "".join(delta.get(name, "") for delta in deltas) == ("hm" if name in names else "")


@pytest.fixture(scope="module")
def claude(api: ApiServer) -> Any:
    with anthropic.Anthropic(base_url=api.url, api_key="none", timeout=10.0, max_retries=0) as client:
        yield client


CLAUDE_TOOLS: list[Any] = [{"name": "get_weather", "description": "x", "input_schema": WEATHER["parameters"]}]


def test_a_thinking_budget(
    client: openai.OpenAI, claude: anthropic.Anthropic, router: ScriptedRouter, tokenizer: TextTokenizer
) -> None:
    """By either API; the router is asked again behind the marker, and usage counts what the client got."""
    begin, end = ids_of(tokenizer, "<think>")[0], ids_of(tokenizer, "</think>")[0]
    thought, rest = ids_of(tokenizer, "hello hello hello hello"), ids_of(tokenizer, "yes")
    budget = len(thought) - 2

    def play() -> Any:
        return in_turn(answer([begin, *thought, end, *rest], per_response=4, stop_id=1), answer(rest, stop_id=1))

    router.script = play()
    completion = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, extra_body={"thinking_token_budget": budget}
    )
    message, usage = completion.choices[0].message, completion.usage
    assert message.content == "yes"
    assert (
        getattr(message, "reasoning_content", None)
        == tokenizer.decode(thought[:budget], skip_special_tokens=True).strip()
    )
    assert usage is not None and usage.completion_tokens == budget + 2 + len(rest) + 1
    first, second = router.requests
    assert list(second.prompt_token_ids) == [*first.prompt_token_ids, begin, *thought[:budget], end]
    router.script = play()
    thinking: Any = {"type": "enabled", "budget_tokens": budget}
    sent = claude.messages.create(model=MODEL, max_tokens=100, messages=MESSAGES, thinking=thinking)
    assert [block.type for block in sent.content] == ["thinking", "text"]
    assert len(router.requests) == 4


def test_messages(claude: anthropic.Anthropic, router: ScriptedRouter, tokenizer: TextTokenizer) -> None:
    router.script = answer(ids_of(tokenizer, "<think>hm</think>hello" + CALL), stop_id=1, cached_tokens=3)
    message = claude.messages.create(
        model=MODEL, max_tokens=100, messages=MESSAGES, system="Be kind.", tools=CLAUDE_TOOLS
    )
    thinking, text, use = message.content
    assert thinking.type == "thinking" and thinking.thinking == "hm"
    assert text.type == "text" and text.text == "hello"
    assert use.type == "tool_use" and (use.name, use.input) == ("get_weather", {"city": "Bern"})
    assert message.stop_reason == "tool_use"
    num_prompt = len(router.requests[0].prompt_token_ids)
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (num_prompt - 3, 3)
    counted = claude.messages.count_tokens(model=MODEL, messages=MESSAGES, system="Be kind.", tools=CLAUDE_TOOLS)
    assert counted.input_tokens == num_prompt


def test_messages_streamed(claude: anthropic.Anthropic, router: ScriptedRouter, tokenizer: TextTokenizer) -> None:
    router.script = answer(ids_of(tokenizer, "<think>hm</think>hello" + CALL), stop_id=1)
    with claude.messages.stream(model=MODEL, max_tokens=100, messages=MESSAGES, tools=CLAUDE_TOOLS) as stream:
        assert "".join(stream.text_stream) == "hello"
        message = stream.get_final_message()
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    use = message.content[-1]
    assert use.type == "tool_use" and use.input == {"city": "Bern"}
    assert message.usage.output_tokens == len(ids_of(tokenizer, "<think>hm</think>hello" + CALL)) + 1


def test_messages_end_where_a_stop_sequence_begins(
    claude: anthropic.Anthropic, router: ScriptedRouter, tokenizer: TextTokenizer
) -> None:
    router.script = answer(ids_of(tokenizer, "hello world"), stop_id=1)
    message = claude.messages.create(model=MODEL, max_tokens=100, messages=MESSAGES, stop_sequences=["wor"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "wor")


def test_a_conversation_with_results_of_tools(
    claude: anthropic.Anthropic, router: ScriptedRouter, tokenizer: TextTokenizer
) -> None:
    use = {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Bern"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "Fog."}]}
    messages: Any = [*MESSAGES, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    claude.messages.create(model=MODEL, max_tokens=5, messages=messages, tools=CLAUDE_TOOLS)
    prompt = tokenizer.decode(router.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert CALL in prompt and "Fog." in prompt.partition(CALL)[2]


def test_an_error_behind_the_first_event_of_messages(
    claude: anthropic.Anthropic, router: ScriptedRouter, tokenizer: TextTokenizer
) -> None:
    router.script = fail(grpc.StatusCode.INTERNAL, after=ids_of(tokenizer, "hello"))
    with pytest.raises(anthropic.APIStatusError):
        with claude.messages.stream(model=MODEL, max_tokens=100, messages=MESSAGES) as stream:
            stream.get_final_message()


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": "hunter2"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages.0.content"),
        ({"messages": [{"role": "system", "content": "hunter2"}]}, "messages.0.role"),
        ({"tool_choice": {"type": "tool", "name": "hunter2"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"temperature": 1.5}, "temperature"),
    ],
)
def test_messages_that_are_refused(http: httpx.Client, change: dict[str, Any], param: str | None) -> None:
    answered = http.post("/v1/messages", json={"max_tokens": 5, "messages": MESSAGES, **change})
    assert answered.status_code == 400, answered.text
    assert answered.json()["error"]["param"] == param
    assert "hunter2" not in answered.text


RESPONSE_TOOLS: list[Any] = [{"type": "function", **WEATHER}]


def test_responses(client: openai.OpenAI, router: ScriptedRouter, tokenizer: TextTokenizer) -> None:
    router.script = answer(ids_of(tokenizer, "<think>hm</think>hello" + CALL), stop_id=1)
    response = client.responses.create(model=MODEL, input="hello", instructions="Be kind.", tools=RESPONSE_TOOLS)
    assert (response.status, response.output_text) == ("completed", "hello")
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
    call = response.output[-1]
    assert call.type == "function_call" and (call.name, call.arguments) == ("get_weather", ARGUMENTS)
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens == len(ids_of(tokenizer, "<think>hm</think>"))


def test_responses_streamed(client: openai.OpenAI, router: ScriptedRouter, tokenizer: TextTokenizer) -> None:
    router.script = answer(ids_of(tokenizer, "hello" + CALL), stop_id=1)
    with client.responses.stream(model=MODEL, input="hello", tools=RESPONSE_TOOLS) as stream:
        events = list(stream)
        response = stream.get_final_response()
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "hello"
    assert [item.type for item in response.output] == ["message", "function_call"]
    assert events[-1].type == "response.completed"


def test_responses_that_are_cut_off_say_so(
    client: openai.OpenAI, router: ScriptedRouter, tokenizer: TextTokenizer
) -> None:
    router.script = answer(ids_of(tokenizer, "hello"))
    response = client.responses.create(model=MODEL, input="hello", max_output_tokens=1)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None and response.incomplete_details.reason == "max_output_tokens"


def test_responses_take_a_whole_conversation(
    client: openai.OpenAI, router: ScriptedRouter, tokenizer: TextTokenizer
) -> None:
    items: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
        {"type": "reasoning", "id": "r", "summary": []},
        {"type": "function_call", "call_id": "c", "name": "get_weather", "arguments": ARGUMENTS},
        {"type": "function_call_output", "call_id": "c", "output": "Fog."},
    ]
    form: Any = {"format": {"type": "json_schema", "name": "p", "schema": PERSON, "strict": True}}
    client.responses.create(model=MODEL, input=items, text=form)
    prompt = tokenizer.decode(router.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert CALL in prompt and "Fog." in prompt.partition(CALL)[2]
    assert json.loads(router.requests[0].grammar.json_schema) == PERSON


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "hunter2"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"input": []}, "input"),
        ({"input": [{"type": "hunter2"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "hunter2"}]}]}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ],
)
def test_responses_that_are_refused(http: httpx.Client, change: dict[str, Any], param: str) -> None:
    answered = http.post("/v1/responses", json={"input": "hello", **change})
    assert answered.status_code == 400, answered.text
    assert answered.json()["error"]["param"] == param
    assert "hunter2" not in answered.text


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/audio/speech", "/v1/responses/resp_1", "/v1/batches"])
def test_known_routes_that_are_not_offered(http: httpx.Client, path: str) -> None:
    answered = http.post(path, json={})
    assert answered.status_code == 501
    assert answered.headers["x-should-retry"] == "false"
    assert answered.json()["error"]["code"] == "not_offered"
