"""Reasoning, content and calls in a model's text, wherever the text is cut."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from router.api.answer_parser import (
    ANSWER_MARKERS,
    AnswerParser,
    CallArguments,
    CallStart,
    Content,
    Reasoning,
    StandIns,
)
from router.api.tool_formats import TAGS, V3, V3_1, ToolFormat

STAND_INS = StandIns({marker: index for index, marker in enumerate(sorted(ANSWER_MARKERS))})
FORMATS = [V3, V3_1, TAGS]


def parse(
    text: str, tool_format: ToolFormat | None = None, *, size: int = 10_000, is_reasoning: bool = False
) -> tuple[str, str, list[tuple[str, str]]]:
    """Reasoning, content, and calls of text that comes in pieces of a size. Its markers are tokens."""
    parser = AnswerParser(STAND_INS, tool_format, is_reasoning=is_reasoning)
    text = STAND_INS.put(text)
    pieces = [text[start : start + size] for start in range(0, len(text), size)] or [""]
    reasoning, content = "", ""
    calls: list[tuple[str, str]] = []
    for position, piece in enumerate(pieces):
        for event in parser.push(piece, is_last=position == len(pieces) - 1):
            match event:
                case Reasoning(added):
                    reasoning += added
                case Content(added):
                    content += added
                case CallStart(index, _, name):
                    assert index == len(calls)
                    calls.append((name, ""))
                case CallArguments(index, added):
                    calls[index] = (calls[index][0], calls[index][1] + added)
    return reasoning, content, calls


def write(tool_format: ToolFormat, calls: Sequence[tuple[str, str]]) -> str:
    return tool_format.write_calls([tool_format.write_call(*call) for call in calls])


@pytest.mark.parametrize("size", [1, 2, 5, 10_000])
@pytest.mark.parametrize("tool_format", FORMATS, ids=["V3", "V3.1", "tags"])
def test_calls_of_every_format(tool_format: ToolFormat, size: int) -> None:
    calls = [("get_weather", '{"city": "Zürich}]", "n": [1, {"a": "\\"}"}]}'), ("stop", "{}")]
    text = "Let me see. " + write(tool_format, calls)
    assert parse(text, tool_format, size=size) == ("", "Let me see. ", calls)


@pytest.mark.parametrize("size", [1, 3, 10_000])
def test_reasoning_then_content_then_a_call(size: int) -> None:
    text = "<think>\nI should\nlook. \n</think>\n\nLooking." + write(V3_1, [("look", '{"a":1}')])
    assert parse(text, V3_1, size=size) == ("I should\nlook.", "Looking.", [("look", '{"a":1}')])


@pytest.mark.parametrize("size", [1, 10_000])
@pytest.mark.parametrize(
    ("must_call", "num_calls", "expected"), [(False, 0, True), (True, 0, False), (False, 1, False)]
)
def test_a_call_that_is_cut_off_within_its_opening(must_call: bool, num_calls: int, expected: int, size: int) -> None:
    """Is text where there may be calls, and nothing where there are calls."""
    opening = '<tool_call>{"'
    text = write(TAGS, [("f", "{}")] * num_calls) + opening
    parser = AnswerParser(STAND_INS, TAGS, is_reasoning=False, must_call=must_call)
    events = [event for at in range(0, len(text), size) for event in parser.push(text[at : at + size])]
    events += parser.push("", is_last=True)
    assert "".join(event.text for event in events if isinstance(event, Content)) == opening * expected


def test_reasoning_that_the_prompt_has_opened() -> None:
    assert parse("Well.\n</think>\n\nYes.", is_reasoning=True) == ("Well.", "Yes.", [])
    assert parse("never ends", is_reasoning=True) == ("never ends", "", [])


@pytest.mark.parametrize("size", [1, 10_000])
def test_markers_spelled_out_are_text(size: int) -> None:
    parser = AnswerParser(STAND_INS, V3_1, is_reasoning=False)
    text = "<think>no</think> " + write(V3_1, [("f", "{}")])
    events = [event for at in range(0, len(text), size) for event in parser.push(text[at : at + size])]
    assert "".join(event.text for event in events if isinstance(event, Content)) == text


def test_markers_without_a_meaning_where_they_stand_are_text() -> None:
    text = "a</think>b<think>c" + write(V3_1, [("f", "{}")])
    assert parse(text) == ("", text, [])


def test_without_tools_calls_are_text() -> None:
    text = write(TAGS, [("f", "{}")])
    assert parse(text) == ("", text, [])


@pytest.mark.parametrize("tool_format", FORMATS, ids=["V3", "V3.1", "tags"])
def test_an_answer_cut_off_within_a_call(tool_format: ToolFormat) -> None:
    whole = "x " + write(tool_format, [("name", '{"a": "bcd"}')])
    for length in range(len(whole)):
        _, content, calls = parse(whole[:length], tool_format, size=3)
        assert content.startswith("x"[:length]) and len(calls) <= 1
        assert calls == [] or (calls[0][0] == "name" and '{"a": "bcd"}'.startswith(calls[0][1]))


def test_text_behind_calls_is_content() -> None:
    assert parse(write(TAGS, [("f", "{}")]) + "\nDone <b>", TAGS)[1] == "Done <b>"
    assert parse(write(V3, [("f", "{}")]) + "Done", V3)[1] == "Done"


def test_every_call_has_an_id_of_its_own() -> None:
    parser = AnswerParser(STAND_INS, V3_1, is_reasoning=False)
    events = parser.push(STAND_INS.put(write(V3_1, [("f", "{}"), ("f", "{}")])))
    ids = [event.call_id for event in events if isinstance(event, CallStart)]
    assert len(set(ids)) == 2
