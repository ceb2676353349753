"""/v1/completions through the official client, a real server and real gRPC."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import httpx
import openai
import pytest

from router.api.tokenizer import TextTokenizer
from router.v1 import router_pb2
from tests.router_api.conftest import MAX_MODEL_LEN, MODEL
from tests.router_api.scripted_router import ScriptedRouter, answer, answer_forever


def ids_of(tokenizer: TextTokenizer, text: str) -> list[int]:
    return tokenizer.encode_raw(text, add_special_tokens=False)


def test_a_text_prompt(client: openai.OpenAI, router: ScriptedRouter, tokenizer: TextTokenizer) -> None:
    router.script = answer(ids_of(tokenizer, "hello world"))
    completion = client.completions.create(model=MODEL, prompt="def add")
    assert completion.choices[0].text == "hello world"
    assert completion.choices[0].finish_reason == "length"
    request = router.requests[0]
    assert list(request.prompt_token_ids) == tokenizer.encode_raw("def add")
    assert request.max_tokens == 16
    assert not request.HasField("logprobs") and not request.HasField("prompt_logprobs")
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == len(request.prompt_token_ids)
    assert completion.usage.completion_tokens == len(ids_of(tokenizer, "hello world"))


def test_token_ids_go_as_they_are(client: openai.OpenAI, router: ScriptedRouter) -> None:
    client.completions.create(model=MODEL, prompt=[5, 1, 7])
    assert list(router.requests[0].prompt_token_ids) == [5, 1, 7]


def test_lists_of_prompts_and_n(client: openai.OpenAI, router: ScriptedRouter) -> None:
    router.script = lambda request, context: answer([request.prompt_token_ids[0] + 40])(request, context)
    completion = client.completions.create(model=MODEL, prompt=[[5], [6, 7]], n=2, seed=-1)
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in completion.choices]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    assert completion.usage is not None and completion.usage.prompt_tokens == 3
    by_id = sorted(router.requests, key=lambda request: request.request_id)
    assert [request.sampling.seed for request in by_id] == [2**64 - 1, 0, 2**64 - 1, 0]


def test_lists_of_texts(client: openai.OpenAI, router: ScriptedRouter, tokenizer: TextTokenizer) -> None:
    client.completions.create(model=MODEL, prompt=["def", "fox"])
    prompts = {tuple(request.prompt_token_ids) for request in router.requests}
    assert prompts == {tuple(tokenizer.encode_raw("def")), tuple(tokenizer.encode_raw("fox"))}


def test_sampling_reaches_the_router(client: openai.OpenAI, router: ScriptedRouter) -> None:
    client.completions.create(
        model=MODEL,
        prompt="x",
        temperature=0.5,
        top_p=0.25,
        seed=7,
        max_tokens=9,
        presence_penalty=-0.5,
        frequency_penalty=1.5,
        logit_bias={"0": -100, "399": 2},
        extra_body={"top_k": 3, "min_p": 0.125, "stop_token_ids": [8], "ignore_eos": True, "min_tokens": 2,
                    "repetition_penalty": 1.25},
    )  # fmt: skip
    request = router.requests[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.25, 3, 0.125)
    assert (sampling.seed, request.max_tokens, request.min_tokens) == (7, 9, 2)
    assert list(request.stop_token_ids) == [8] and request.ignore_eos
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.25, -0.5, 1.5)
    assert dict(sampling.logit_bias) == {0: -100.0, 399: 2.0}


def test_defaults_switch_everything_off(http: httpx.Client, router: ScriptedRouter) -> None:
    body = {"model": MODEL, "prompt": "x", "top_k": -1, "n": None, "stop": None, "logit_bias": {},
            "frequency_penalty": 0.0, "suffix": None, "unknown_field": {"a": 1}}  # fmt: skip
    assert http.post("/v1/completions", json=body).status_code == 200
    sampling = router.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 1.0, 0, 0.0)
    assert not sampling.HasField("repetition_penalty") and not sampling.logit_bias
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.0, 0.0)


def test_seeds_are_drawn_when_none_is_given(client: openai.OpenAI, router: ScriptedRouter) -> None:
    for _ in range(2):
        client.completions.create(model=MODEL, prompt="x")
    assert router.requests[0].sampling.seed != router.requests[1].sampling.seed


def test_echo_with_logprobs_as_lm_eval_asks_for_it(client: openai.OpenAI, router: ScriptedRouter) -> None:
    router.script = answer([60])
    prompt = [0, 50, 51, 52]
    completion = client.completions.create(
        model=MODEL, prompt=[prompt], echo=True, max_tokens=1, logprobs=1, temperature=0, seed=1234
    )
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens and logprobs.token_logprobs and logprobs.top_logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(prompt) + 1
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    for name, logprob, top in zip(
        logprobs.tokens[1:], logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True
    ):
        assert top[name] == logprob == max(top.values())
    assert completion.usage is not None and completion.usage.completion_tokens == 1
    assert router.requests[0].prompt_logprobs == 1


def test_echo_without_an_answer(client: openai.OpenAI, router: ScriptedRouter) -> None:
    completion = client.completions.create(model=MODEL, prompt="def add", echo=True, max_tokens=0, logprobs=0)
    choice = completion.choices[0]
    assert (choice.text, choice.finish_reason) == ("def add", "length")
    assert choice.logprobs is not None and choice.logprobs.tokens is not None
    # The beginning-of-sequence token has a place among the tokens, but none in the text.
    assert choice.logprobs.tokens[0] == "<|bos|>"
    assert choice.logprobs.text_offset is not None
    assert choice.logprobs.text_offset[:2] == [0, 0]
    for name, offset in list(zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True))[1:]:
        assert choice.text[offset:].startswith(name)
    assert completion.usage is not None and completion.usage.completion_tokens == 0


def test_offsets_of_generated_tokens(client: openai.OpenAI, router: ScriptedRouter, tokenizer: TextTokenizer) -> None:
    router.script = answer(ids_of(tokenizer, "aé fox"))
    choice = client.completions.create(model=MODEL, prompt="def", echo=True, logprobs=2).choices[0]
    assert choice.text == "defaé fox"
    assert choice.logprobs is not None and choice.logprobs.tokens and choice.logprobs.text_offset
    named = list(zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True))
    assert ("a", 3) in named
    assert [offset for name, offset in named if name.startswith("bytes:")] == [4, 4]
    assert all(choice.text[offset:].startswith(name) for name, offset in named[1:] if not name.startswith("bytes:"))


def test_the_token_itself_is_always_among_top_logprobs(client: openai.OpenAI, router: ScriptedRouter) -> None:
    router.script = answer([60, 61])
    choice = client.completions.create(model=MODEL, prompt="x", logprobs=0, max_tokens=2).choices[0]
    assert choice.logprobs is not None and choice.logprobs.tokens and choice.logprobs.top_logprobs
    tops = [list(top) for top in choice.logprobs.top_logprobs]
    assert tops == [[name] for name in choice.logprobs.tokens]


def test_impossible_tokens_get_a_finite_logprob(http: httpx.Client, router: ScriptedRouter) -> None:
    def play(
        request: router_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[router_pb2.GenerateResponse]:
        for response in answer([60])(request, context):
            for token in response.tokens:
                token.logprob = float("-inf")
                token.top_logprobs[:] = [float("-inf")] * len(token.top_logprobs)
            yield response

    router.script = play
    answered = http.post("/v1/completions", json={"model": MODEL, "prompt": "x", "logprobs": 2, "max_tokens": 1})
    assert answered.json()["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


def test_a_closing_eos_is_counted_but_not_shown(
    client: openai.OpenAI, router: ScriptedRouter, tokenizer: TextTokenizer
) -> None:
    router.script = answer(ids_of(tokenizer, "fox"), stop_id=1)
    completion = client.completions.create(
        model=MODEL, prompt="x", logprobs=0, extra_body={"skip_special_tokens": False}
    )
    choice = completion.choices[0]
    assert (choice.text, choice.finish_reason) == ("fox", "stop")
    num_tokens = len(ids_of(tokenizer, "fox")) + 1
    assert completion.usage is not None and completion.usage.completion_tokens == num_tokens
    assert choice.logprobs is not None and choice.logprobs.tokens is not None
    assert len(choice.logprobs.tokens) == num_tokens


def test_stop_strings_over_token_borders(
    client: openai.OpenAI, router: ScriptedRouter, tokenizer: TextTokenizer
) -> None:
    ids = [token_id for letter in "hello world" for token_id in ids_of(tokenizer, letter)]
    router.script = answer([*ids, *ids])
    completion = client.completions.create(model=MODEL, prompt="x", stop=["lo w", "zzz"], max_tokens=30)
    choice = completion.choices[0]
    assert (choice.text, choice.finish_reason) == ("hel", "stop")
    assert completion.usage is not None and completion.usage.completion_tokens == len("hello w")


def test_stop_strings_may_be_kept(client: openai.OpenAI, router: ScriptedRouter, tokenizer: TextTokenizer) -> None:
    router.script = answer(ids_of(tokenizer, "hello world"), per_response=3)
    completion = client.completions.create(
        model=MODEL, prompt="x", stop="lo", extra_body={"include_stop_str_in_output": True}
    )
    assert completion.choices[0].text == "hello"


def test_a_stop_string_inside_one_token(
    client: openai.OpenAI, router: ScriptedRouter, tokenizer: TextTokenizer
) -> None:
    """What the token holds behind the stop string is cut off, too."""
    (jumps,) = ids_of(tokenizer, " jumps")
    router.script = answer([*ids_of(tokenizer, "fox"), jumps, *ids_of(tokenizer, " over")])
    for include, shown in ((False, "fox j"), (True, "fox jum")):
        completion = client.completions.create(
            model=MODEL, prompt="x", stop="um", extra_body={"include_stop_str_in_output": include}
        )
        assert (completion.choices[0].text, completion.choices[0].finish_reason) == (shown, "stop")


@pytest.mark.parametrize("per_response", [1, 4])
def test_a_stop_string_of_characters_split_over_tokens_is_never_streamed(
    client: openai.OpenAI, router: ScriptedRouter, tokenizer: TextTokenizer, per_response: int
) -> None:
    ids = [token_id for letter in "añ🦊🦊ü b" for token_id in ids_of(tokenizer, letter)]
    assert len(ids) > len("añ🦊🦊ü b")  # some characters are several tokens
    router.script = answer(ids, per_response=per_response)
    chunks = [
        chunk.choices[0]
        for chunk in client.completions.create(model=MODEL, prompt="x", stop="🦊ü", stream=True, max_tokens=30)
    ]
    assert "".join(chunk.text for chunk in chunks) == "añ🦊"
    assert chunks[-1].finish_reason == "stop"


def test_stop_strings_do_not_count_before_min_tokens(
    client: openai.OpenAI, router: ScriptedRouter, tokenizer: TextTokenizer
) -> None:
    ids = [token_id for letter in "abab" for token_id in ids_of(tokenizer, letter)]
    router.script = answer(ids)
    completion = client.completions.create(model=MODEL, prompt="x", stop="b", extra_body={"min_tokens": 2})
    assert completion.choices[0].text == "aba"


def test_a_stop_string_cancels_the_call(
    client: openai.OpenAI, router: ScriptedRouter, tokenizer: TextTokenizer
) -> None:
    router.script = answer_forever(ids_of(tokenizer, "hello world"))
    completion = client.completions.create(model=MODEL, prompt="x", stop="world", max_tokens=100)
    assert completion.choices[0].text == "hello "
    assert router.cancelled.wait(5.0)


def test_streaming(client: openai.OpenAI, router: ScriptedRouter, tokenizer: TextTokenizer) -> None:
    router.script = answer(ids_of(tokenizer, "hello wörld"))
    chunks = list(
        client.completions.create(
            model=MODEL, prompt="def", echo=True, stream=True, logprobs=0, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "defhello wörld"
    assert chunks[0].choices[0].text == "def"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [*[None] * (len(chunks) - 2), "length"]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    num_entries = sum(len(chunk.choices[0].logprobs.tokens or []) for chunk in chunks[:-1] if chunk.choices[0].logprobs)
    assert num_entries == chunks[-1].usage.total_tokens


def test_streaming_several_choices(client: openai.OpenAI, router: ScriptedRouter, tokenizer: TextTokenizer) -> None:
    router.script = answer(ids_of(tokenizer, "hello world"))
    texts = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(model=MODEL, prompt=["a", "b"], n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == dict.fromkeys(range(4), "hello world")


async def test_the_async_client(api_url: str, router: ScriptedRouter, tokenizer: TextTokenizer) -> None:
    router.script = answer(ids_of(tokenizer, "hello"))
    async with openai.AsyncOpenAI(base_url=f"{api_url}/v1", api_key="none", timeout=10.0) as client:
        completion = await client.completions.create(model=MODEL, prompt="x")
        assert completion.choices[0].text == "hello"
        stream = await client.completions.create(model=MODEL, prompt="x", stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "hello"


def test_a_prompt_that_fills_the_context(client: openai.OpenAI, router: ScriptedRouter) -> None:
    client.completions.create(model=MODEL, prompt=[5] * (MAX_MODEL_LEN - 1))
    assert router.requests[0].max_tokens == 1
    client.completions.create(model=MODEL, prompt=[5] * MAX_MODEL_LEN, echo=True, max_tokens=0)


@pytest.mark.parametrize(
    ("num_tokens", "options"),
    [(MAX_MODEL_LEN, {}), (MAX_MODEL_LEN + 1, {"max_tokens": 0, "echo": True}), (MAX_MODEL_LEN - 4, {"max_tokens": 5}),
     (10 * MAX_MODEL_LEN, {})],
)  # fmt: skip
def test_a_prompt_that_does_not_fit(
    http: httpx.Client, router: ScriptedRouter, num_tokens: int, options: dict[str, object]
) -> None:
    answered = http.post("/v1/completions", json={"model": MODEL, "prompt": [5] * num_tokens, **options})
    error = answered.json()["error"]
    assert answered.status_code == 400
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert str(MAX_MODEL_LEN) in error["message"] and str(num_tokens) in error["message"]
    assert router.requests == []


@pytest.mark.parametrize("stream", [True, False])
def test_many_prompt_logprobs(http: httpx.Client, router: ScriptedRouter, stream: bool) -> None:
    """Enough of them to be formatted by a thread."""
    body = {"model": MODEL, "prompt": [[5] * 500] * 2, "echo": True, "max_tokens": 1, "logprobs": 5, "stream": stream}
    router.script = answer([60])
    answered = http.post("/v1/completions", json=body)
    assert answered.status_code == 200
    assert answered.text.count("-9999") == 0
    if not stream:
        assert [len(choice["logprobs"]["tokens"]) for choice in answered.json()["choices"]] == [501, 501]


@pytest.mark.parametrize("stream", [False, True])
def test_usage_says_what_was_found_in_the_cache_once_for_each_prompt(
    client: openai.OpenAI, router: ScriptedRouter, stream: bool
) -> None:
    def play(
        request: router_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[router_pb2.GenerateResponse]:
        return answer([40], cached_tokens=request.prompt_token_ids[0])(request, context)

    router.script = play
    prompts = [[32], [64, 7]]
    if stream:
        chunks = list(
            client.completions.create(
                model=MODEL, prompt=prompts, n=2, stream=True, stream_options={"include_usage": True}
            )
        )
        usage = chunks[-1].usage
    else:
        usage = client.completions.create(model=MODEL, prompt=prompts, n=2).usage
    assert usage is not None and usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 96
