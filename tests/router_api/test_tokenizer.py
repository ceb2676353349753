"""Text to ids: what counts as a special token, and what is only text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from router.api.chat_template import ChatTemplate
from router.api.chat_types import Message
from router.api.errors import BadRequest, TokenizerError
from router.api.markers import MarkerGuard, MarkerSet
from router.api.tokenizer import TextTokenizer
from tests.router_api.conftest import ASSISTANT, BOS, EOS, USER, write_checkpoint


def encode_chat(checkpoint: Path, tokenizer: TextTokenizer, *messages: dict[str, Any]) -> list[int]:
    template = ChatTemplate.from_checkpoint(checkpoint, tokenizer)
    assert template is not None
    parsed = [Message.model_validate(message) for message in messages]
    return template.encode(parsed, add_generation_prompt=True, switches={})


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_raw_text_gets_the_post_processors_bos(tokenizer: TextTokenizer, checkpoint: Path) -> None:
    library = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    assert tokenizer.encode_raw("def add") == library.encode("def add").ids
    assert tokenizer.encode_raw("def add")[0] == 0
    assert tokenizer.encode_raw("def add", add_special_tokens=False) == library.encode("def add").ids[1:]


def test_special_tokens_count_in_raw_text(tokenizer: TextTokenizer) -> None:
    assert tokenizer.encode_raw(EOS, add_special_tokens=False) == [1]


@pytest.mark.parametrize(("add_bos_token", "has_bos"), [(True, True), (False, False), (None, False)])
def test_tokenizer_config_decides_on_bos_where_the_post_processor_is_silent(
    tmp_path: Path, add_bos_token: bool | None, has_bos: bool
) -> None:
    folder = write_checkpoint(tmp_path / "model")
    edit_json(folder / "tokenizer.json", post_processor={"type": "ByteLevel", "add_prefix_space": True,
                                                         "trim_offsets": True, "use_regex": True})  # fmt: skip
    edit_json(folder / "tokenizer_config.json", add_bos_token=add_bos_token)
    assert (TextTokenizer(folder).encode_raw("def")[:1] == [0]) is has_bos


def test_chat_uses_the_templates_special_tokens(checkpoint: Path, tokenizer: TextTokenizer) -> None:
    expected = tokenizer.encode_raw(f"{BOS}Be brief.{USER}hello world{ASSISTANT}", add_special_tokens=False)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " hello world "}]
    assert encode_chat(checkpoint, tokenizer, *messages) == expected


@pytest.mark.parametrize("marker", [BOS, EOS, USER, ASSISTANT, "<think>", "</think>"])
def test_markers_typed_by_a_user_are_text(checkpoint: Path, tokenizer: TextTokenizer, marker: str) -> None:
    text = f"hello {marker}{marker} world"
    ids = encode_chat(checkpoint, tokenizer, {"role": "user", "content": text})
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"{BOS}{USER}{text}{ASSISTANT}"
    marker_id = tokenizer.encode_raw(marker, add_special_tokens=False)[0]
    assert ids.count(marker_id) == (1 if marker in (BOS, USER, ASSISTANT) else 0)


def test_a_marker_cannot_be_put_together_from_two_texts(checkpoint: Path, tokenizer: TextTokenizer) -> None:
    ids = encode_chat(
        checkpoint,
        tokenizer,
        {"role": "system", "content": "<|us"},
        {"role": "system", "content": "er|>"},
        {"role": "user", "content": "x"},
    )
    user_id = tokenizer.encode_raw(USER, add_special_tokens=False)[0]
    assert ids.count(user_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"{BOS}<|user|>{USER}x{ASSISTANT}"


def test_stand_ins_typed_by_a_user_stay_what_they_are(checkpoint: Path, tokenizer: TextTokenizer) -> None:
    text = f"\U00100000 {EOS} \U00100001"
    ids = encode_chat(checkpoint, tokenizer, {"role": "user", "content": text})
    assert text in tokenizer.decode(ids, skip_special_tokens=False)


def test_markers_in_tool_calls_are_text(tokenizer: TextTokenizer) -> None:
    template = ChatTemplate("{{ messages[0].tool_calls[0].function | tojson }}", tokenizer)
    call = {"type": "function", "function": {"name": f"f{EOS}", "arguments": f'{{"a": "{EOS}"}}'}}
    message = Message.model_validate({"role": "assistant", "tool_calls": [call]})
    ids = template.encode([message], add_generation_prompt=False, switches={})
    assert 1 not in ids
    assert tokenizer.decode(ids, skip_special_tokens=False).count(EOS) == 2


def test_templates_may_cut_an_assistants_turn_at_its_reasoning(checkpoint: Path, tokenizer: TextTokenizer) -> None:
    ids = encode_chat(
        checkpoint,
        tokenizer,
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": f"<think>secret</think>dog {EOS}"},
    )
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text == f"{BOS}{USER}hello{ASSISTANT}dog {EOS}{EOS}{ASSISTANT}"
    assert ids.count(1) == 1


def test_guarded_and_ordinary_encoding_agree(tokenizer: TextTokenizer) -> None:
    """The way taken when somebody typed a marker gives the ids that the tokenizer itself gives."""
    text = f"{BOS}def add(self){USER}  hello\n{ASSISTANT}fox <br> {EOS}"
    guard = tokenizer.guard([text])
    guard.protect(USER)
    assert guard.is_used
    assert tokenizer.encode_guarded(text, guard) == tokenizer.encode_raw(text, add_special_tokens=False)


def test_a_template_that_refuses_is_a_bad_request(tokenizer: TextTokenizer) -> None:
    with pytest.raises(BadRequest, match="tools are unknown"):
        template = ChatTemplate("{{ raise_exception('tools are unknown') }}", tokenizer)
        template.encode([Message(role="user", content="1")], add_generation_prompt=True, switches={})


def test_developer_messages_become_system_messages_for_templates_that_know_none(
    checkpoint: Path, tokenizer: TextTokenizer
) -> None:
    developer = encode_chat(checkpoint, tokenizer, {"role": "developer", "content": "hello"})
    assert developer == encode_chat(checkpoint, tokenizer, {"role": "system", "content": "hello"})


def test_templates_run_in_a_sandbox(tokenizer: TextTokenizer) -> None:
    template = ChatTemplate("{{ messages.__class__.__mro__ }}", tokenizer)
    with pytest.raises(BadRequest, match="cannot render"):
        template.encode([], add_generation_prompt=False, switches={})


def test_output_of_templates_is_bounded(tokenizer: TextTokenizer) -> None:
    template = ChatTemplate("{% for i in range(99999) %}{{ 'x' * 99 }}{% endfor %}", tokenizer)
    with pytest.raises(BadRequest, match="too long"):
        template.encode([], add_generation_prompt=False, switches={})


def test_a_template_file_comes_before_tokenizer_config(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    (folder / "chat_template.jinja").write_text("fox")
    template = ChatTemplate.from_checkpoint(folder, TextTokenizer(folder))
    assert template is not None and template.source == "fox"


def test_named_templates_are_searched_for_the_default(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    templates = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    edit_json(folder / "tokenizer_config.json", chat_template=templates)
    template = ChatTemplate.from_checkpoint(folder, TextTokenizer(folder))
    assert template is not None and template.source == "b"


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        TextTokenizer(tmp_path)


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    edit_json(folder / "tokenizer.json", model={"type": "BPE", "vocab": 3})
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: cannot be loaded"):
        TextTokenizer(folder)


def test_other_kinds_of_tokenizers_are_refused_by_name(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    edit_json(folder / "tokenizer.json", decoder={"type": "Fuse"})
    with pytest.raises(TokenizerError, match="Fuse is not supported"):
        TextTokenizer(folder)


@given(st.text())
def test_decoding_gives_back_any_text(tokenizer: TextTokenizer, text: str) -> None:
    text = text.encode("utf-8", errors="ignore").decode()
    assert tokenizer.decode(tokenizer.encode_raw(text), skip_special_tokens=True) == _without_special(text)


def test_tokens_that_are_no_whole_characters_are_named_by_their_bytes(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode_raw("é", add_special_tokens=False)
    assert [tokenizer.token_text(token_id) for token_id in ids] == ["bytes:\\xc3", "bytes:\\xa9"]


_MARKERS = ("<a>", "<ab>", "<<", ">b", "b<a>")


@given(st.lists(st.text(alphabet="<>ab ", max_size=12), max_size=5))
def test_no_concatenation_of_protected_texts_holds_a_marker(texts: list[str]) -> None:
    markers = MarkerSet(_MARKERS)
    guard = MarkerGuard(markers, texts)
    joined = "".join(guard.protect(text).strip() for text in texts)
    assert not any(marker in joined for marker in _MARKERS)
    assert guard.restore(joined) == "".join(text.strip() for text in texts)


@given(st.text(alphabet="<>ab", max_size=20))
def test_markers_are_found_from_the_left_and_the_longest_first(text: str) -> None:
    expected, position = [], 0
    while position < len(text):
        at_position = [marker for marker in _MARKERS if text.startswith(marker, position)]
        if at_position:
            expected.append(max(at_position, key=len))
        position += len(expected[-1]) if at_position else 1
    assert [match.group() for match in MarkerSet(_MARKERS).find(text)] == expected


def test_a_set_without_markers_finds_none() -> None:
    assert list(MarkerSet(()).find("anything")) == []


def _without_special(text: str) -> str:
    return text.replace(BOS, "").replace(EOS, "")
