"""Grammars by the llguidance library: implements router/grammar.py's protocols, and is the only file that knows it.

The library computes a mask by walking the vocabulary with the grammar, without tables made beforehand, so a grammar
costs little until it is used. It bounds its own work per token and its memory (LIMITS); a grammar that hits a bound
fails alone. Its error messages quote the grammar, which is the client's, so none of them is passed on.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from tokenizers import Tokenizer

from router.errors import GrammarFailed
from router.grammar import Grammar, TokenMatcher
from router.schema_dates import bind_dates
from router.vocabulary import Vocabulary

# What the library's documentation calls 20 ms of building, 5 ms per mask, and 50 MB of lexer states.
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=50_000,
    step_max_items=50_000,
    max_lexer_states=25_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
# Between the parts of a JSON document: enough to indent eight levels by two spaces, and an end to a model that would
# go on with spaces for ever.
WHITE_SPACE = r"[ \t\r\n]{0,17}"
# Compiled grammars kept for requests that come again with the same one, as an agent's do.
MAX_KEPT = 64
# JSON Schema keywords that may be named in a refusal: the client's own words are not repeated.
_KEYWORDS = (
    "contains", "dependentRequired", "dependentSchemas", "dependencies", "else", "format", "if", "maxContains",
    "minContains", "not", "patternProperties", "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties",
    "uniqueItems",
)  # fmt: skip


class LlguidanceCompiler:
    """Implements grammar.GrammarCompiler. Thread-safe: what it keeps is copied for every use."""

    def __init__(self, tokenizer: LLTokenizer) -> None:
        self._tokenizer = tokenizer
        self._kept: OrderedDict[tuple[str, str, bool], LLMatcher] = OrderedDict()

    @staticmethod
    def from_checkpoint(folder: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> LlguidanceCompiler | None:
        """None if the folder has no tokenizer. vocab_size: of the model, which may have more ids than the tokenizer."""
        path = folder / "tokenizer.json"
        if not path.exists():
            return None
        tokenizer = Tokenizer.from_file(str(path))
        wrapper = TokenizerWrapper(_TokenizerFacts(tokenizer, vocab_size, eos_token_ids[0]))
        return LlguidanceCompiler(LLTokenizer(wrapper, eos_token=list(eos_token_ids)))

    def compile(self, grammar: Grammar) -> TokenMatcher:
        key = (grammar.kind, grammar.text, grammar.is_lenient)
        matcher = self._kept.pop(key, None)
        if matcher is None:
            matcher = LLMatcher(self._tokenizer, _translate(grammar), log_level=0, limits=LIMITS)
            matcher.compute_bitmask()  # what can never match shows here, and masks of copies start from its states
            if matcher.is_error():
                raise GrammarFailed(_explain(matcher.get_error()))
            if matcher.is_stopped() and not matcher.is_accepting():
                raise GrammarFailed("nothing matches it")
        self._kept[key] = matcher
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return LlguidanceMatcher(matcher.deep_copy())


class LlguidanceMatcher:
    """Implements grammar.TokenMatcher."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def advance(self, token_id: int) -> None:
        if not self._matcher.consume_token(token_id):
            raise GrammarFailed("the answer no longer matches its grammar")

    def find_allowed(self, following: Sequence[int]) -> bytes | None:
        num_consumed = self._matcher.try_consume_tokens(list(following))
        try:
            if num_consumed < len(following):
                return None
            allowed = self._matcher.compute_bitmask()
            if self._matcher.is_error():
                raise GrammarFailed(_explain(self._matcher.get_error()))
            if not any(allowed):
                raise GrammarFailed("nothing matches it from here on")
            return allowed
        finally:
            if num_consumed > 0:
                self._matcher.rollback(num_consumed)


class _TokenizerFacts:
    """What the library asks of a tokenizer. Markers are special to it: no text of a grammar is ever made of them."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        vocabulary = Vocabulary.of(tokenizer)
        self._tokenizer = tokenizer
        num_missing = vocab_size - len(vocabulary.token_bytes)
        self.tokens = [*vocabulary.token_bytes[:vocab_size], *[b""] * num_missing]
        self.special_token_ids = sorted(vocabulary.marker_ids.values())
        self.eos_token_id = eos_token_id
        self.bos_token_id = None

    def __call__(self, text: str) -> list[int]:
        """Raises TypeError for bytes, from which the library learns to pass text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids


def schema_options(*, is_lenient: bool) -> dict[str, Any]:
    """How a JSON schema within a Lark grammar (%json) is to be read: the value of its x-guidance."""
    return {"whitespace_pattern": WHITE_SPACE, "lenient": is_lenient}


def _translate(grammar: Grammar) -> str:
    match grammar.kind:
        case "json_schema":
            options: Any = schema_options(is_lenient=grammar.is_lenient)
            try:
                schema = json.dumps(bind_dates(json.loads(grammar.text)))
                return LLMatcher.grammar_from_json_schema(schema, overrides=options)
            except ValueError:
                raise GrammarFailed("it is not a JSON Schema") from None
        case "lark":
            return LLMatcher.grammar_from_lark(grammar.text)
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)


def _explain(message: str) -> str:
    """The reason for a refusal without the client's input."""
    named = [keyword for keyword in _KEYWORDS if json.dumps(keyword) in message]
    if message.startswith("Unimplemented keys") and named:
        return f"{', '.join(named)} cannot be enforced"
    for sign, reason in _REASONS:
        if sign in message:
            return reason
    return "it cannot be compiled"


_REASONS = (
    ("Unimplemented keys", "it has keywords that cannot be enforced"),
    ("Unknown format", "a format cannot be enforced"),
    ("look-around", "look-around in patterns cannot be enforced"),
    ("regex", "a pattern is not a regular expression that can be enforced"),
    ("Unsatisfiable", "nothing matches it"),
    ("NoExtension", "nothing matches it"),
    ("too large", "it is too large"),
    ("TooComplex", "it is too complex"),
    ("limit", "it is too complex"),
)
