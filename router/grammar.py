"""What an answer must match, and which tokens may come next in it.

The seam to whatever library knows grammars (llguidance_grammars.py), and the part of it that belongs to a sequence: a
GrammarState follows the sequence's own tokens, so masks depend on nothing but these. Drafts, cached prefixes,
preemption and another router that goes on with a sequence change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from router.errors import GrammarFailed

GrammarKind = Literal["json_schema", "lark", "regex"]


@dataclass(frozen=True)
class Grammar:
    """text: a JSON Schema as JSON, a context-free grammar, or a regular expression. is_lenient: a schema's keywords
    that cannot be enforced are left out instead of refused. start_after: token ids; the answer is free up to the first
    of them, which the grammar does not see; empty: it is bound from its first token."""

    kind: GrammarKind
    text: str
    is_lenient: bool = False
    start_after: frozenset[int] = frozenset()


class TokenMatcher(Protocol):
    """Where a text stands in its grammar. Knows one end-of-sequence id, which may follow a complete text."""

    def advance(self, token_id: int) -> None:
        """Raises GrammarFailed if the token cannot follow."""
        ...

    def find_allowed(self, following: Sequence[int]) -> bytes | None:
        """The tokens that may come behind the following ones: one bit each, the lowest id in the lowest bit of the
        first byte. None if following itself does not match. Leaves the matcher as it was. Raises GrammarFailed if that
        takes too much time or memory, or if nothing may come."""
        ...


class GrammarCompiler(Protocol):
    """Thread-safe."""

    def compile(self, grammar: Grammar) -> TokenMatcher:
        """A matcher at the start of a text. Takes up to tens of milliseconds. Raises GrammarFailed."""
        ...


class GrammarState:
    """Of one sequence. Mutated by the engine only."""

    def __init__(self, matcher: TokenMatcher, start_after: frozenset[int], answer: Sequence[int] = ()) -> None:
        """answer: tokens that the sequence has generated so far, on another router. Raises GrammarFailed if they do
        not match."""
        self._matcher = matcher
        self._start_after = start_after
        self._is_active = not start_after
        self._allowed: dict[tuple[int, ...], bytes | None] = {}
        self.error: GrammarFailed | None = None
        """Why the sequence cannot go on."""
        for token_id in answer:
            self.advance(token_id)
        if self.error is not None:
            raise self.error

    def advance(self, token_id: int) -> None:
        """The sequence has got a token. What was found out behind drafts stays known behind those that hold."""
        self._allowed = {
            drafts[1:]: allowed for drafts, allowed in self._allowed.items() if drafts and drafts[0] == token_id
        }
        if not self._is_active:
            self._is_active = token_id in self._start_after
            return
        try:
            self._matcher.advance(token_id)
        except GrammarFailed as error:
            self.error = error

    def find_allowed(self, drafts: Sequence[int]) -> bytes | None:
        """The tokens that may come behind the known ones and the drafts, as TokenMatcher.find_allowed has them; None:
        any, or it does not matter because the drafts cannot hold. A failure becomes `error`."""
        key = tuple(drafts)
        if key not in self._allowed:
            self._allowed[key] = self._find(key)
        return self._allowed[key]

    def _find(self, drafts: tuple[int, ...]) -> bytes | None:
        if not self._is_active:
            start = next((index for index, draft in enumerate(drafts) if draft in self._start_after), None)
            if start is None:
                return None
            drafts = drafts[start + 1 :]
        try:
            return self._matcher.find_allowed(drafts)
        except GrammarFailed as error:
            self.error = error
            return None
