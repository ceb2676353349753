"""The checkpoint's tokenizer: text to token ids and back to bytes.

A thin wrapper around the tokenizers library, which knows two kinds of text. *Raw* text (/v1/completions) may name
special tokens, as everywhere: its author writes the whole prompt. *Chat* text mixes the template's special tokens,
which count, with what users typed, which never does: a user who types the end-of-turn token must not end a turn.
markers.MarkerGuard keeps the two apart while the template runs.

Byte-level tokenizers only, which all supported architectures use; others are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from experts.errors import ExpertsError
from experts.model_config import load_json_object
from router.api.errors import ContextLengthExceeded, TokenizerError
from router.api.markers import MarkerGuard, MarkerSet
from router.vocabulary import Vocabulary, is_marker

# Of a text, for each token of the context, of which it is seen whether the rest is worth a look: 8 MB took 9 s and
# 1.3 GB. Text has 2 to 5 characters to a token.
_PROBED_CHARACTERS = 8
# More that a text may have when it is cut than it has whole.
_CUT_TOKENS = 16


class TextTokenizer:
    """Encodes prompts and knows the bytes of every token. Safe to use from several threads."""

    def __init__(self, folder: Path, context_length: int | None = None) -> None:
        """folder: the checkpoint. context_length: texts that have far more tokens are refused; None: none is.

        Raises TokenizerError naming the file that is missing or cannot be served.
        """
        self._context_length = context_length
        definition = _load(folder / "tokenizer.json")
        self.config = _load(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
        self._tokenizer = _build(definition)
        self._plain_tokenizer = _build(_without_markers(definition))
        _check_byte_level(definition)
        self.bos_token = _token_text(self.config.get("bos_token"))
        self.eos_token = _token_text(self.config.get("eos_token"))
        self.pad_token = _token_text(self.config.get("pad_token"))

        added = self._tokenizer.get_added_tokens_decoder()
        self.vocabulary = Vocabulary.of(self._tokenizer)
        self._special_ids = self.vocabulary.special_ids
        self._marker_ids = self.vocabulary.marker_ids
        self._lstrip_markers = {token.content for token in added.values() if token.lstrip}
        self._rstrip_markers = {token.content for token in added.values() if token.rstrip}
        self._markers = MarkerSet(self._marker_ids)
        self._token_bytes = self.vocabulary.token_bytes
        self._prefix_ids, self._suffix_ids = self._find_affixes()

    def encode_raw(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Encode text in which special tokens count, with what the tokenizer puts around it (BOS, as a rule).

        Raises ContextLengthExceeded.
        """
        self._check_length(text, "prompt")
        # The batch call is the one that lets other Python threads run meanwhile, and skips offsets.
        ids = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return [*self._prefix_ids, *ids, *self._suffix_ids] if add_special_tokens else ids

    def encode_guarded(self, text: str, guard: MarkerGuard) -> list[int]:
        """Encode a rendered template; what guard has marked as typed by users stays plain text. Raises
        ContextLengthExceeded."""
        self._check_length(text, "messages")
        if not guard.is_used:
            return self.encode_raw(text, add_special_tokens=False)
        # Markers are where the tokenizer itself would cut, so encoding the pieces between them apart gives the same
        # ids as encoding the whole; only pieces without markers are left for the tokenizer that knows none.
        pieces: list[str] = []
        marker_ids: list[int] = []
        start = 0
        for match in self._markers.find(text):
            pieces.append(text[start : match.start()])
            marker_ids.append(self._marker_ids[match.group()])
            start = match.end()
        pieces.append(text[start:])
        encodings = self._plain_tokenizer.encode_batch_fast(
            [guard.restore(piece) for piece in self._strip_beside_markers(pieces, marker_ids)],
            add_special_tokens=False,
        )
        token_ids = list(encodings[0].ids)
        for marker_id, encoding in zip(marker_ids, encodings[1:], strict=True):
            token_ids.append(marker_id)
            token_ids.extend(encoding.ids)
        return token_ids

    def guard(self, texts: Iterable[str]) -> MarkerGuard:
        """Make the guard for one chat. texts: everything that its users typed, and the template's own text."""
        return MarkerGuard(self._markers, texts)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; none for ids that the tokenizer does not know."""
        return self._token_bytes[token_id] if token_id < len(self._token_bytes) else b""

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(
            self.token_bytes(token_id)
            for token_id in token_ids
            if not (skip_special_tokens and token_id in self._special_ids)
        ).decode("utf-8", errors="replace")

    def token_text(self, token_id: int) -> str:
        """A printable name of one token: its text, its bytes as "bytes:\\xe2\\x80" where they are no whole
        characters (as the OpenAI API writes them), or "<id:N>" where the tokenizer has no such id."""
        data = self.token_bytes(token_id)
        if not data:
            return f"<id:{token_id}>"
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _check_length(self, text: str, param: str) -> None:
        if self._context_length is None:
            return
        length = _PROBED_CHARACTERS * self._context_length
        while length < len(text):
            num_tokens = len(self._tokenizer.encode_batch_fast([text[:length]], add_special_tokens=False)[0].ids)
            if num_tokens > self._context_length + _CUT_TOKENS:
                raise ContextLengthExceeded(
                    f"This model's context is {self._context_length} tokens, but the first {length} of {len(text)} "
                    f"characters have {num_tokens} already.",
                    param=param,
                )
            length *= 4  # spaces, or a letter repeated

    def _find_affixes(self) -> tuple[list[int], list[int]]:
        """What goes before and after raw text: as the post-processor says, unless tokenizer_config.json says
        otherwise (published DeepSeek folders leave the post-processor empty and set add_bos_token)."""
        around = self._tokenizer.encode("", add_special_tokens=True).ids
        probe = self._tokenizer.encode("a", add_special_tokens=True).ids
        inner = self._tokenizer.encode("a", add_special_tokens=False).ids
        num_prefix = next(i for i in range(len(probe) + 1) if probe[i : i + len(inner)] == inner)
        prefix, suffix = around[:num_prefix], around[num_prefix:]
        bos_id = None if self.bos_token is None else self._tokenizer.token_to_id(self.bos_token)
        eos_id = None if self.eos_token is None else self._tokenizer.token_to_id(self.eos_token)
        add_bos, add_eos = self.config.get("add_bos_token"), self.config.get("add_eos_token")
        if add_bos is not None and bos_id is not None:
            prefix = [bos_id] if add_bos else [token_id for token_id in prefix if token_id != bos_id]
        if add_eos is not None and eos_id is not None:
            suffix = [eos_id] if add_eos else [token_id for token_id in suffix if token_id != eos_id]
        return prefix, suffix

    def _strip_beside_markers(self, pieces: list[str], marker_ids: list[int]) -> list[str]:
        """Drop the white space that a marker with lstrip or rstrip takes with it."""
        if not self._lstrip_markers and not self._rstrip_markers:
            return pieces
        lstrip_ids = {self._marker_ids.get(marker) for marker in self._lstrip_markers}
        rstrip_ids = {self._marker_ids.get(marker) for marker in self._rstrip_markers}
        stripped = list(pieces)
        for index, marker_id in enumerate(marker_ids):
            if marker_id in lstrip_ids:
                stripped[index] = stripped[index].rstrip()
            if marker_id in rstrip_ids:
                stripped[index + 1] = stripped[index + 1].lstrip()
        return stripped


def _load(path: Path) -> dict[str, Any]:
    try:
        return load_json_object(path)
    except ExpertsError as error:
        raise TokenizerError(str(error)) from error


def _build(definition: dict[str, Any]) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # The library raises bare Exception.
        raise TokenizerError(f"tokenizer.json: cannot be loaded: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _without_markers(definition: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer not knowing any marker, so that their texts are encoded like all others."""
    added = definition.get("added_tokens") or []
    markers = {
        entry["content"]
        for entry in added
        if is_marker(str(entry.get("content", "")), bool(entry.get("special", False)))
    }
    model = dict(definition["model"])
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {token: token_id for token, token_id in vocab.items() if token not in markers}
    return {
        **definition,
        "model": model,
        "added_tokens": [entry for entry in added if entry["content"] not in markers],
        "post_processor": None,
    }


def _check_byte_level(definition: dict[str, Any]) -> None:
    decoder = definition.get("decoder") or {}
    kinds = [decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", []))]
    if "ByteLevel" not in kinds:
        raise TokenizerError(f"tokenizer.json: decoder {kinds[0]} is not supported; supported: ByteLevel")


def _token_text(value: Any) -> str | None:
    """The text of a token in tokenizer_config.json: a string, or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
