"""Token ids to text, one token at a time.

Detokenizer never splits a character: bytes of an unfinished one wait for the next token. StopStrings finds stop
strings in the growing text, wherever token borders fall, and holds back what may be the beginning of one.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from router.api.tokenizer import TextTokenizer


class Detokenizer:
    """Incremental decoder of one sequence."""

    def __init__(
        self, tokenizer: TextTokenizer, *, skip_special_tokens: bool, stand_ins: Mapping[int, str] | None = None
    ) -> None:
        """stand_ins: text by token id, in place of the token's own."""
        self._tokenizer = tokenizer
        self._stand_ins = stand_ins or {}
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.num_characters = 0
        """Characters returned so far."""

    def push(self, token_id: int) -> str:
        """The text that token_id completes; empty while its last character is unfinished."""
        if (stand_in := self._stand_ins.get(token_id)) is not None:
            return self.flush() + stand_in
        if self._skip_special_tokens and self._tokenizer.is_special(token_id):
            return ""
        text = self._decoder.decode(self._tokenizer.token_bytes(token_id))
        self.num_characters += len(text)
        return text

    def flush(self) -> str:
        """End the text, or a part of it: U+FFFD for a character that was never finished, else nothing."""
        text = self._decoder.decode(b"", final=True)
        self.num_characters += len(text)
        return text


class StopResult(NamedTuple):
    text: str
    """What may be shown now."""
    stopped_by: str | None = None
    """The stop string that ended the text; nothing may be pushed afterwards. None: none did."""

    @property
    def stopped(self) -> bool:
        return self.stopped_by is not None


class StopStrings:
    """Searches growing text for stop strings.

    The one that is complete first wins, and of those that end together the longest, so the result does not depend
    on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str], *, include_in_output: bool) -> None:
        self._stops = tuple(stops)
        self._include_in_output = include_in_output
        self._max_length = max(map(len, stops), default=0)
        self._held = ""

    def push(self, text: str) -> StopResult:
        """Add text; returns what can no longer be part of a stop string."""
        if not self._stops:
            return StopResult(text)
        self._held += text
        found = self._find_first()
        if found is not None:
            start, end = found
            stop = self._held[start:end]
            result = StopResult(self._held[: end if self._include_in_output else start], stop)
            self._held = ""
            return result
        num_shown = len(self._held) - self._num_held_back()
        shown, self._held = self._held[:num_shown], self._held[num_shown:]
        return StopResult(shown)

    def flush(self) -> str:
        """End the text: what was held back was not a stop string after all."""
        shown, self._held = self._held, ""
        return shown

    def _find_first(self) -> tuple[int, int] | None:
        """(start, end) of the stop string that ends first; of equals the longest."""
        found = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if not found:
            return None
        end, start = min(found)
        return start, end

    def _num_held_back(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        for length in range(min(self._max_length - 1, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
