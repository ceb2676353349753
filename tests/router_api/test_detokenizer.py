"""Tokens to text: whole characters only, stop strings wherever they fall."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.api.detokenizer import Detokenizer, StopStrings
from router.api.tokenizer import TextTokenizer


def run_stops(stops: list[str], pieces: list[str], *, include: bool = False) -> tuple[str, bool]:
    """The text shown in the end, and whether a stop string ended it."""
    matcher = StopStrings(stops, include_in_output=include)
    shown = ""
    for piece in pieces:
        result = matcher.push(piece)
        shown += result.text
        if result.stopped:
            return shown, True
    return shown + matcher.flush(), False


@given(st.text())
def test_pieces_are_whole_characters_and_add_up(tokenizer: TextTokenizer, text: str) -> None:
    text = text.encode("utf-8", errors="ignore").decode()
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    pieces = [detokenizer.push(token_id) for token_id in tokenizer.encode_raw(text, add_special_tokens=False)]
    assert "".join(pieces) + detokenizer.flush() == text
    assert detokenizer.num_characters == len(text)


def test_an_unfinished_character_is_replaced_at_the_end(tokenizer: TextTokenizer) -> None:
    first = tokenizer.encode_raw("é", add_special_tokens=False)[0]
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    assert detokenizer.push(first) == ""
    assert detokenizer.flush() == "\ufffd"


def test_a_byte_that_begins_nothing_does_not_hold_up_the_text(tokenizer: TextTokenizer) -> None:
    first, letter = (tokenizer.encode_raw(text, add_special_tokens=False)[0] for text in ("é", "x"))
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    assert detokenizer.push(first) + detokenizer.push(letter) == "\ufffdx"


def test_special_tokens_are_skipped_on_demand(tokenizer: TextTokenizer) -> None:
    assert Detokenizer(tokenizer, skip_special_tokens=True).push(1) == ""
    assert Detokenizer(tokenizer, skip_special_tokens=False).push(1) == "<|eos|>"


@pytest.mark.parametrize(
    ("stops", "text", "shown", "stopped"),
    [
        ([], "abc", "abc", False),
        (["b"], "abc", "a", True),
        (["bc", "c"], "abc", "a", True),  # End together: the longest.
        (["abcd", "bc"], "abcd", "a", True),  # Complete first.
        (["cd"], "abc", "abc", False),
        (["aab"], "aaab", "a", True),
        (["\n\n"], "x\n\ny", "x", True),
    ],
)
def test_stop_strings(stops: list[str], text: str, shown: str, stopped: bool) -> None:
    assert run_stops(stops, [text]) == (shown, stopped)
    assert run_stops(stops, list(text)) == (shown, stopped)


def test_a_stop_string_may_stay_in_the_text() -> None:
    assert run_stops(["lo w"], ["hel", "lo", " wor", "ld"], include=True) == ("hello w", True)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopStrings(["stop"], include_in_output=False)
    assert matcher.push("a s").text == "a "
    assert matcher.push("t").text == ""
    assert matcher.push("ar").text == "star"


@given(
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.text(alphabet="ab", max_size=4), max_size=12),
    st.booleans(),
)
def test_borders_of_pieces_do_not_matter(stops: list[str], pieces: list[str], include: bool) -> None:
    assert run_stops(stops, pieces, include=include) == run_stops(stops, ["".join(pieces)], include=include)
