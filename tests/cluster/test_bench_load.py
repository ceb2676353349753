"""What `shoal bench` asks for, without a clock or a network."""

from itertools import islice, pairwise

import pytest

from cluster.bench_load import FilePrompt, LoadOptions, parse_lengths, parse_prompts, plan_load
from cluster.errors import SettingsError


def build_options(**changes: object) -> LoadOptions:
    values: dict[str, object] = {
        "num_requests": 50, "rate": None, "input_lengths": parse_lengths("20"), "output_lengths": parse_lengths("8"),
        "shared_prefix": 0, "kind": "ids", "seed": 1,
    }  # fmt: skip
    return LoadOptions(**{**values, **changes})  # type: ignore[arg-type]


def test_the_same_options_give_the_same_load_and_another_seed_another() -> None:
    assert list(plan_load(build_options(rate=5.0))) == list(plan_load(build_options(rate=5.0)))
    assert list(plan_load(build_options())) != list(plan_load(build_options(seed=2)))


def test_poisson_arrivals_keep_the_rate() -> None:
    times_s = [request.at_s for request in plan_load(build_options(num_requests=4000, rate=10.0))]
    gaps_s = [later - earlier for earlier, later in pairwise(times_s)]  # type: ignore[operator]
    assert times_s[0] == 0.0
    mean_s = sum(gaps_s) / len(gaps_s)
    assert mean_s == pytest.approx(0.1, rel=0.05)
    # Of an exponential distribution the standard deviation is the mean: evenly spaced arrivals would have none.
    assert (sum((gap_s - mean_s) ** 2 for gap_s in gaps_s) / len(gaps_s)) ** 0.5 == pytest.approx(0.1, rel=0.1)


def test_without_a_number_of_requests_the_load_never_ends() -> None:
    assert len(list(islice(plan_load(build_options(num_requests=None)), 1000))) == 1000


def test_a_shared_prefix_is_the_same_in_all_prompts_and_the_rest_is_not() -> None:
    prompts = [request.prompt for request in plan_load(build_options(shared_prefix=12, num_requests=5))]
    assert all(isinstance(prompt, list) and len(prompt) == 20 for prompt in prompts)
    assert len({tuple(prompt[:12]) for prompt in prompts}) == 1  # type: ignore[arg-type]
    assert len({tuple(prompt[12:]) for prompt in prompts}) == 5  # type: ignore[arg-type]


def test_text_prompts_have_a_word_per_token() -> None:
    (request,) = plan_load(build_options(kind="text", num_requests=1))
    assert isinstance(request.prompt, str)
    assert len(request.prompt.split()) == 20


@pytest.mark.parametrize(
    ("text", "low", "high", "mean"),
    [("7", 7, 7, 7.0), ("10:30", 10, 30, 20.0), ("normal:50,5", 20, 80, 50.0), ("lognormal:100,0.2", 30, 300, 102.0)],
)
def test_lengths_follow_their_distribution(text: str, low: int, high: int, mean: float) -> None:
    options = build_options(num_requests=3000, output_lengths=parse_lengths(text))
    lengths = [request.max_tokens for request in plan_load(options)]
    assert low <= min(lengths) and max(lengths) <= high
    assert sum(lengths) / len(lengths) == pytest.approx(mean, rel=0.05)


@pytest.mark.parametrize("text", ["", "x", "0", "5:2", "normal:5", "-3", "zipf:2"])
def test_a_length_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SettingsError):
        parse_lengths(text)


def test_prompts_of_a_file_are_taken_in_turn_with_their_own_lengths() -> None:
    text = '{"prompt": "a", "max_tokens": 3}\n\n{"messages": [{"role": "user", "content": "b"}]}\n"c"\n'
    prompts = parse_prompts(text, is_jsonl=True)
    assert prompts[0] == FilePrompt("a", 3)
    planned = list(plan_load(build_options(num_requests=4, file_prompts=prompts)))
    assert [request.prompt for request in planned] == ["a", [{"role": "user", "content": "b"}], "c", "a"]
    assert [request.max_tokens for request in planned] == [3, 8, 8, 3]
    assert [prompt.prompt for prompt in parse_prompts("one\ntwo\n", is_jsonl=False)] == ["one", "two"]


@pytest.mark.parametrize("text", ["", "{", "{}", '{"prompt": ""}', '{"prompt": "a", "max_tokens": "b"}'])
def test_a_file_without_prompts_is_refused(text: str) -> None:
    with pytest.raises(SettingsError):
        parse_prompts(text, is_jsonl=True)
