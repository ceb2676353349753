"""Which tokens a grammar allows, and what happens to grammars that nobody should have to compile."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from router.errors import GrammarFailed
from router.grammar import Grammar, GrammarState, TokenMatcher
from router.llguidance_grammars import MAX_KEPT, LlguidanceCompiler
from router.sampler import SampleRow, SamplingParams, sample
from router.token_masks import has_only
from tests.random_checkpoint import write_tokenizer

VOCAB_SIZE = 330
EOS = 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write_tokenizer(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> LlguidanceCompiler:
    compiler = LlguidanceCompiler.from_checkpoint(tmp_path_factory.getbasetemp(), VOCAB_SIZE, [EOS])
    assert compiler is not None
    return compiler


def schema(value: Any, **options: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(value), **options)


def allowed_ids(matcher: TokenMatcher | GrammarState, following: Sequence[int] = ()) -> set[int]:
    mask = matcher.find_allowed(following)
    assert mask is not None
    return {token_id for token_id in range(VOCAB_SIZE) if mask[token_id >> 3] >> (token_id & 7) & 1}


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        (schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}), '{"a": -12}'),
        (schema({"type": "object"}), '{"k":[1,{"é":null}]}'),
        (Grammar("regex", "[a-c]{2,4}x"), "abcx"),
        (Grammar("lark", 'start: "yes" | "no" tail\ntail: "!"+'), "no!!"),
    ],
    ids=["schema", "any object", "regex", "lark"],
)
def test_what_matches_may_come_token_by_token_and_then_end(
    compiler: LlguidanceCompiler, tokenizer: Tokenizer, grammar: Grammar, text: str
) -> None:
    matcher = compiler.compile(grammar)
    for token_id in encode(tokenizer, text):
        assert token_id in allowed_ids(matcher)
        matcher.advance(token_id)
    assert EOS in allowed_ids(matcher)
    matcher.advance(EOS)


def matches(compiler: LlguidanceCompiler, tokenizer: Tokenizer, grammar: Grammar, text: str) -> bool:
    matcher = compiler.compile(grammar)
    try:
        for token_id in encode(tokenizer, text):
            matcher.advance(token_id)
    except GrammarFailed:
        return False
    return EOS in allowed_ids(matcher)


@pytest.mark.parametrize("form", ["date", "date-time"])
def test_dates_are_days_that_there_are(compiler: LlguidanceCompiler, tokenizer: Tokenizer, form: str) -> None:
    """datetime is the judge."""
    grammar = schema({"type": "string", "format": form, "pattern": "^[0-9]", "allOf": [{"maxLength": 30}]})
    rest = "T10:00:00Z" if form == "date-time" else ""
    for year in (0, 1, 4, 99, 100, 400, 1000, 1900, 1996, 2000, 2023, 2024, 2100, 9999):
        for day in ("01-01", "02-28", "02-29", "02-30", "04-30", "04-31", "12-31", "13-01", "12-00"):
            text = f"{year:04}-{day}"
            try:
                datetime.date.fromisoformat(text)
                is_day = True
            except ValueError:
                is_day = False
            assert matches(compiler, tokenizer, grammar, f'"{text}{rest}"') == is_day, text


def test_what_only_looks_like_a_date_format_stays(compiler: LlguidanceCompiler, tokenizer: Tokenizer) -> None:
    assert matches(compiler, tokenizer, schema({"const": {"format": "date"}}), '{"format":"date"}')
    named = schema({"type": "object", "properties": {"format": {"enum": ["date", "x"]}}, "required": ["format"]})
    assert matches(compiler, tokenizer, named, '{"format":"x"}')


def test_what_does_not_match_may_not_come(compiler: LlguidanceCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile(schema({"type": "integer"}))
    digits = allowed_ids(matcher)
    assert EOS not in digits
    assert {str(tokenizer.id_to_token(token_id))[:1] for token_id in digits} <= set("-0123456789 ĠĊĉč")
    with pytest.raises(GrammarFailed):
        matcher.advance(encode(tokenizer, "x")[0])


def test_ids_beyond_the_tokenizer_are_never_allowed(compiler: LlguidanceCompiler, tokenizer: Tokenizer) -> None:
    anything = allowed_ids(compiler.compile(Grammar("regex", "(.|\n)*")))
    assert max(anything) < tokenizer.get_vocab_size() < VOCAB_SIZE


def test_markers_are_no_text_but_can_be_named(compiler: LlguidanceCompiler, tokenizer: Tokenizer) -> None:
    marker = tokenizer.token_to_id("<｜User｜>")
    assert marker is not None
    assert marker not in allowed_ids(compiler.compile(Grammar("regex", "(.|\n)*")))
    matcher = compiler.compile(Grammar("lark", f'start: <[{marker}]> "x"'))
    assert allowed_ids(matcher) == {marker}
    assert allowed_ids(matcher, [marker]) == set(encode(tokenizer, "x"))


def test_looking_behind_drafts_leaves_the_matcher_where_it_was(
    compiler: LlguidanceCompiler, tokenizer: Tokenizer
) -> None:
    matcher = compiler.compile(Grammar("regex", "abc"))
    a, b, c = (encode(tokenizer, letter)[0] for letter in "abc")
    assert c in allowed_ids(matcher, [a, b])
    assert allowed_ids(matcher, [a, b, c]) == {EOS}
    assert matcher.find_allowed([a, c]) is None
    assert a in allowed_ids(matcher)
    matcher.advance(a)
    assert b in allowed_ids(matcher)


def test_two_answers_with_one_grammar_do_not_meet(compiler: LlguidanceCompiler, tokenizer: Tokenizer) -> None:
    first, second = (compiler.compile(Grammar("regex", "ab|cd")) for _ in range(2))
    a, b, c, _ = (encode(tokenizer, letter)[0] for letter in "abcd")
    first.advance(a)
    assert b in allowed_ids(first)
    assert c in allowed_ids(second)


def test_more_grammars_than_are_kept_compile_all_the_same(compiler: LlguidanceCompiler) -> None:
    for number in range(MAX_KEPT + 5):
        compiler.compile(Grammar("regex", f"x{number}"))
    compiler.compile(Grammar("regex", "x0"))


def deep(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        value = {"type": "array", "items": value}
    return value


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("json_schema", "[1]"),
        Grammar("json_schema", "{"),
        schema({"$ref": "#"}),
        schema({"$ref": "https://example.com/SECRET"}),
        schema({"type": "SECRET"}),
        schema({"type": "object", "properties": {"SECRET": False}, "required": ["SECRET"]}),
        schema({"type": "string", "pattern": "(?=SECRET)b"}),
        schema({"type": "string", "pattern": "(SECRET"}),
        schema({"type": "string", "format": "SECRET"}),
        schema({"not": {"const": "SECRET"}}),
        schema({"unevaluatedProperties": False, "SECRET": 1}),
        schema({"allOf": [{"anyOf": [{"required": [f"a{i}"]}, {"properties": {f"b{i}": {}}}]} for i in range(24)]}),
        Grammar("lark", "SECRET"),
        Grammar("lark", 'start: start "a"\nSECRET: /[/'),
        Grammar("regex", "(((((a{1,900}){1,900}){1,900}b?){1,900}c?){1,900}SECRET"),
    ],
)
def test_a_grammar_that_cannot_be_followed_is_refused_without_repeating_it(
    compiler: LlguidanceCompiler, grammar: Grammar
) -> None:
    with pytest.raises(GrammarFailed) as caught:
        compiler.compile(grammar)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        {"type": "object", "properties": {"child": {"$ref": "#"}}, "additionalProperties": False},
        {"type": "array", "items": {"type": "integer"}, "minItems": 1_000_000},
        {"type": "string", "maxLength": 1_000_000},
        deep(40),
    ],
    ids=["recursion", "many items", "a long text", "depth"],
)
def test_what_merely_can_become_long_costs_nothing_now(compiler: LlguidanceCompiler, value: dict[str, Any]) -> None:
    assert allowed_ids(compiler.compile(schema(value)))


def test_lenient_leaves_out_what_cannot_be_enforced(compiler: LlguidanceCompiler) -> None:
    value = {"type": "integer", "not": {"const": 3}}
    with pytest.raises(GrammarFailed, match="not cannot be enforced"):
        compiler.compile(schema(value))
    compiler.compile(schema(value, is_lenient=True))


def test_a_start_token_opens_the_grammar(compiler: LlguidanceCompiler, tokenizer: Tokenizer) -> None:
    start, a, b = 3, *(encode(tokenizer, letter)[0] for letter in "ab")
    state = GrammarState(compiler.compile(Grammar("regex", "ab")), frozenset({start}))
    assert state.find_allowed([]) is None
    assert state.find_allowed([b, b]) is None
    assert a in allowed_ids(state, [b, start])
    state.advance(b)
    state.advance(start)
    assert a in allowed_ids(state)
    assert b in allowed_ids(state, [a])
    state.advance(a)
    assert b in allowed_ids(state)


def test_an_answer_goes_on_where_another_router_left_it(compiler: LlguidanceCompiler, tokenizer: Tokenizer) -> None:
    grammar = Grammar("regex", "abc")
    a, b, c = (encode(tokenizer, letter)[0] for letter in "abc")
    assert c in allowed_ids(GrammarState(compiler.compile(grammar), frozenset(), [a, b]))
    with pytest.raises(GrammarFailed):
        GrammarState(compiler.compile(grammar), frozenset(), [b])


class BrokenMatcher:
    """Fails when asked."""

    num_asked = 0

    def advance(self, token_id: int) -> None:
        del token_id

    def find_allowed(self, following: Sequence[int]) -> bytes | None:
        self.num_asked += 1
        raise GrammarFailed("it is too complex")


def test_a_grammar_that_fails_midway_is_an_error_of_its_sequence_and_is_not_tried_again() -> None:
    matcher = BrokenMatcher()
    state = GrammarState(matcher, frozenset())
    assert state.find_allowed([]) is None and state.find_allowed([]) is None
    assert isinstance(state.error, GrammarFailed)
    assert matcher.num_asked == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_allowed_tokens_are_sampled_and_other_rows_stay_as_they_are(temperature: float) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 100, generator=generator) * 4
    rows = [SampleRow(SamplingParams(temperature, 0, 0.9, 0.0, seed=row), 7, ()) for row in range(6)]
    free = sample(logits, rows).tolist()
    before = logits.clone()
    masks = [bytes([0] * 5 + [1 << row] + [0] * 7) for row in range(6)]
    bound = [row._replace(allowed=masks[index] if index % 2 else None) for index, row in enumerate(rows)]
    assert sample(logits, bound).tolist() == [40 + row if row % 2 else free[row] for row in range(6)]
    assert torch.equal(logits, before)


def test_has_only() -> None:
    assert has_only(bytes([0b10, 0]), [1])
    assert has_only(bytes([0b10, 0]), [1, 5, 9])
    assert not has_only(bytes([0b110, 0]), [1])
    assert not has_only(bytes([0b10, 1]), [1])


def test_without_a_tokenizer_there_are_no_grammars(tmp_path: Path) -> None:
    assert LlguidanceCompiler.from_checkpoint(tmp_path, VOCAB_SIZE, [EOS]) is None
