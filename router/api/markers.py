"""Markers: texts that are one token of their own, such as special tokens and tool or reasoning markers.

A template's markers count, those that users type do not: somebody who types the end-of-turn token must not end a
turn. MarkerGuard keeps the two apart while a template runs. Knows nothing of token ids and templates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

# Stand-ins for the first characters of markers come from the last private-use plane, which no published
# vocabulary or template uses; one that occurs in the text at hand is skipped.
_FIRST_STAND_IN = 0x100000
_LAST_STAND_IN = 0x10FFFD


class MarkerSet:
    """Finds markers in text, in time proportional to the text for however many markers."""

    def __init__(self, markers: Iterable[str]) -> None:
        self._markers = frozenset(markers)
        self._pattern = re.compile(_trie_pattern(self._markers))
        self._prefixes = {marker[:end] for marker in self._markers for end in range(1, len(marker))}
        self._max_length = max(map(len, self._markers), default=0)

    def find(self, text: str) -> Iterator[re.Match[str]]:
        """Markers from left to right, the longest at each place, without overlaps, as the tokenizer finds them."""
        return self._pattern.finditer(text)

    def find_starts(self, text: str, allowed: frozenset[str]) -> Iterator[int]:
        """Positions where a marker begins that is not allowed, overlapping ones included."""
        match = self._pattern.search(text)
        while match is not None:
            if match.group() not in allowed:
                yield match.start()
            match = self._pattern.search(text, match.start() + 1)

    def find_partial_starts(self, text: str) -> Iterator[int]:
        """Positions from which text, apart from white space behind it, ends in the beginning of a marker."""
        end = len(text.rstrip())
        for start in range(max(0, end - self._max_length + 1), end):
            if text[start:end] in self._prefixes:
                yield start


class MarkerGuard:
    """Hides markers that users typed from the template and from the tokenizer, for one chat.

    Where a text contains a marker, `<|end|>` say, or ends in the beginning of one, which the next piece of text
    could complete, its first character is replaced by a stand-in, one private-use character. It stays one
    character, so templates may trim and slice. The template then adds the real markers, and whatever still reads
    as a marker in its result is the template's. `restore` puts the characters back.
    """

    def __init__(self, markers: MarkerSet, texts: Iterable[str]) -> None:
        """texts: everything that may occur beside a stand-in: what users typed, and the template itself."""
        self._markers = markers
        self._texts = list(texts)
        self._stand_ins: dict[str, str] = {}

    @property
    def is_used(self) -> bool:
        """Whether any text had to be changed."""
        return bool(self._stand_ins)

    def protect(self, text: str, *, allowed: frozenset[str] = frozenset()) -> str:
        """Return text without markers, other than the allowed ones."""
        positions = {*self._markers.find_starts(text, allowed), *self._markers.find_partial_starts(text)}
        if not positions:
            return text
        characters = list(text)
        for position in positions:
            characters[position] = self._stand_in(characters[position])
        return "".join(characters)

    def restore(self, text: str) -> str:
        for character, stand_in in self._stand_ins.items():
            text = text.replace(stand_in, character)
        return text

    def _stand_in(self, character: str) -> str:
        if character not in self._stand_ins:
            self._stand_ins[character] = next(
                candidate
                for candidate in map(chr, range(_FIRST_STAND_IN, _LAST_STAND_IN))
                if candidate not in self._stand_ins.values() and not any(candidate in text for text in self._texts)
            )
        return self._stand_ins[character]


def _trie_pattern(markers: Iterable[str]) -> str:
    """A regular expression that matches the longest marker at a place without trying them one by one.

    "<a>", "<ab>" become "<a(?:b>|>)".
    """
    trie: dict[str, dict] = {}
    for marker in markers:
        node = trie
        for character in marker:
            node = node.setdefault(character, {})
        node[""] = {}
    return _render_trie(trie) if trie else r"(?!)"


def _render_trie(node: dict[str, dict]) -> str:
    """Recursion ends at the length of the longest marker."""
    branches = [re.escape(character) + _render_trie(child) for character, child in sorted(node.items()) if character]
    if not branches:
        return ""
    pattern = branches[0] if len(branches) == 1 and "" not in node else f"(?:{'|'.join(branches)})"
    return pattern + "?" if "" in node else pattern
