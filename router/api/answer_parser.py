"""What a model's text consists of: reasoning, content, tool calls. Fed piece by piece, wherever the pieces end.

Markers count where they were generated as tokens. In the text that comes in, each is one character that no text can
hold, a lone surrogate (StandIns); the same words written out letter by letter, by a user or by the model, stay text.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from typing import NamedTuple

from router.api.tool_formats import TOOL_MARKERS, ToolFormat

THINK_BEGIN, THINK_END = "<think>", "</think>"
ANSWER_MARKERS = frozenset({THINK_BEGIN, THINK_END, *TOOL_MARKERS})
# Lone surrogates: decoding UTF-8 never gives one.
_FIRST_STAND_IN = 0xD800


class Reasoning(NamedTuple):
    text: str


class Content(NamedTuple):
    text: str


class CallStart(NamedTuple):
    """index: of the call in the answer."""

    index: int
    call_id: str
    name: str


class CallArguments(NamedTuple):
    """A piece of the arguments' JSON text."""

    index: int
    text: str


Event = Reasoning | Content | CallStart | CallArguments


class StandIns:
    """Markers as single characters and back."""

    def __init__(self, marker_ids: Mapping[str, int]) -> None:
        """marker_ids: of the markers that mean something in answers."""
        self._character_of = {marker: chr(_FIRST_STAND_IN + index) for index, marker in enumerate(marker_ids)}
        self._marker_of = {character: marker for marker, character in self._character_of.items()}
        self.by_token_id = {token_id: self._character_of[marker] for marker, token_id in marker_ids.items()}

    def get(self, marker: str) -> str | None:
        """Its stand-in; None: it is no token of this vocabulary."""
        return self._character_of.get(marker)

    def put(self, text: str) -> str:
        for marker, character in self._character_of.items():
            text = text.replace(marker, character)
        return text

    def remove(self, text: str) -> str:
        if text.isascii():
            return text
        for character, marker in self._marker_of.items():
            text = text.replace(character, marker)
        return text


class _State(Enum):
    START = "before anything that is no white space"
    REASONING = "behind <think>"
    CONTENT = "in the answer itself"
    CALLS = "between the calls of a list"
    NAME = "in the name of a call"
    ARGUMENTS = "in its arguments"
    BEHIND_CALL = "behind its arguments"


class AnswerParser:
    """One choice. tool_format: None: what looks like a call is content."""

    def __init__(
        self, stand_ins: StandIns, tool_format: ToolFormat | None, *, is_reasoning: bool, must_call: bool = False
    ) -> None:
        """is_reasoning: the prompt ends in an open <think>. must_call: the answer is made of calls."""
        self._stand_ins = stand_ins
        self._format = None if tool_format is None else _translate(tool_format, stand_ins)
        self._must_call = must_call
        self._think_begin, self._think_end = stand_ins.get(THINK_BEGIN), stand_ins.get(THINK_END)
        self._state = _State.REASONING if is_reasoning else _State.START
        self._text = ""
        self._strips_start = True
        self._json_end = _JsonEnd()
        self.num_calls = 0

    def push(self, text: str, *, is_last: bool = False) -> list[Event]:
        """The events that text completes. Calls whose name is not complete at the end are dropped."""
        self._text += text
        events: list[Event] = []
        while (step := self._step(events, is_last)) is not None and step is not self._state:
            self._state = step
        return events

    def _step(self, events: list[Event], is_last: bool) -> _State | None:
        """Consume what belongs to the current state. Returns the next one; None: more text is needed."""
        match self._state:
            case _State.START:
                return self._start(is_last)
            case _State.REASONING:
                return self._reasoning(events, is_last)
            case _State.CONTENT:
                return self._content(events, is_last)
            case _State.CALLS:
                return self._calls()
            case _State.NAME:
                return self._name(events)
            case _State.ARGUMENTS:
                return self._arguments(events)
            case _State.BEHIND_CALL:
                return self._behind_call()

    def _start(self, is_last: bool) -> _State | None:
        stripped = self._text.lstrip()
        if self._think_begin is not None and stripped.startswith(self._think_begin):
            self._text = stripped[1:]
            return _State.REASONING
        if stripped or is_last:
            self._strips_start = False
            return _State.CONTENT
        return None

    def _reasoning(self, events: list[Event], is_last: bool) -> _State | None:
        """White space around it is not part of it."""
        end = -1 if self._think_end is None else self._text.find(self._think_end)
        text = self._text if end < 0 else self._text[:end]
        if self._strips_start:
            text = text.lstrip()
        shown = text.rstrip()
        if shown:
            self._strips_start = False
            events.append(Reasoning(self._stand_ins.remove(shown)))
        if end >= 0:
            self._text = self._text[end + 1 :]
            self._strips_start = True
            return _State.CONTENT
        self._text = "" if is_last else text[len(shown) :]
        return None

    def _content(self, events: list[Event], is_last: bool) -> _State | None:
        if self._strips_start:
            self._text = self._text.lstrip()
            self._strips_start = self._text == ""
        if self._format is None:
            self._show(events, len(self._text))
            return None
        opening = self._format.opening or self._format.before_name
        start = self._text.find(opening)
        if start < 0:
            # At the end, what could begin a call is one that was cut off, if calls are what there is.
            is_text = is_last and not self._must_call and self.num_calls == 0
            num_held = 0 if is_text else _count_held_back(self._text, opening)
            self._show(events, len(self._text) - num_held)
            return None
        self._show(events, start)
        self._text = self._text[len(opening) :]
        return _State.CALLS if self._format.opening else _State.NAME

    def _show(self, events: list[Event], num_characters: int) -> None:
        if num_characters > 0:
            events.append(Content(self._stand_ins.remove(self._text[:num_characters])))
            self._text = self._text[num_characters:]

    def _calls(self) -> _State | None:
        """Whatever else stands in the list belongs to the format."""
        assert self._format is not None
        start, end = self._text.find(self._format.before_name), self._text.find(self._format.closing)
        if end >= 0 and not 0 <= start < end:
            self._text = self._text[end + len(self._format.closing) :]
            self._strips_start = True
            return _State.CONTENT
        if start < 0:
            return None
        self._text = self._text[start + len(self._format.before_name) :]
        return _State.NAME

    def _name(self, events: list[Event]) -> _State | None:
        assert self._format is not None
        end = self._text.find(self._format.before_arguments)
        if end < 0:
            return None
        name = self._stand_ins.remove(self._text[:end]).strip()
        self._text = self._text[end + len(self._format.before_arguments) :]
        self._json_end = _JsonEnd()
        events.append(CallStart(self.num_calls, f"call_{uuid.uuid4().hex[:24]}", name))
        self.num_calls += 1
        return _State.ARGUMENTS

    def _arguments(self, events: list[Event]) -> _State | None:
        end = self._json_end.find(self._text)
        text = self._text if end is None else self._text[:end]
        if text:
            events.append(CallArguments(self.num_calls - 1, self._stand_ins.remove(text)))
        self._text = self._text[len(text) :]
        if end is None:
            return None
        return _State.BEHIND_CALL

    def _behind_call(self) -> _State | None:
        assert self._format is not None
        expected = self._format.after_arguments
        if len(self._text) < len(expected) and expected.startswith(self._text):
            return None
        self._text = self._text.removeprefix(expected)
        self._strips_start = True
        return _State.CALLS if self._format.opening else _State.CONTENT


class _JsonEnd:
    """Finds where a JSON object ends, in text that comes piece by piece."""

    def __init__(self) -> None:
        self._depth = 0
        self._is_in_string = False
        self._is_escaped = False

    def find(self, text: str) -> int | None:
        """The number of characters of text up to the end of the object; None: it goes on."""
        for index, character in enumerate(text):
            if self._is_in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif character == "\\":
                    self._is_escaped = True
                elif character == '"':
                    self._is_in_string = False
            elif character == '"':
                self._is_in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return index + 1
        return None


def _count_held_back(text: str, searched: str) -> int:
    """Length of the longest end of text that begins what is searched."""
    return next((n for n in range(min(len(text), len(searched) - 1), 0, -1) if searched.startswith(text[-n:])), 0)


def _translate(tool_format: ToolFormat, stand_ins: StandIns) -> ToolFormat:
    """The format as it reads in text with stand-ins."""
    return ToolFormat(*(stand_ins.put(getattr(tool_format, field.name)) for field in fields(tool_format)))
