"""What each token id stands for, in bytes, and which ids are markers: read from the tokenizer, without encoding a text.

The HTTP front turns tokens to text with it, the router finds the tokens that a grammar allows.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """token_bytes: by token id; empty for ids between tokens. marker_ids: of texts that are one token of their own and
    mark something (special tokens, roles, tools, reasoning). special_ids: those that are left out of a text."""

    token_bytes: list[bytes]
    marker_ids: dict[str, int]
    special_ids: frozenset[int]

    @staticmethod
    def of(tokenizer: Tokenizer) -> Vocabulary:
        added = tokenizer.get_added_tokens_decoder()
        return Vocabulary(
            _all_token_bytes(tokenizer),
            {token.content: token_id for token_id, token in added.items() if is_marker(token.content, token.special)},
            frozenset(token_id for token_id, token in added.items() if token.special),
        )


def is_marker(content: str, is_special: bool) -> bool:
    """Whether an added token marks something, as against being a word of the language: a run of spaces, a letter
    (some published vocabularies add those), which plain text may use."""
    return bool(content) and (is_special or (len(content) > 1 and not content.isspace()))


def _all_token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocab.values(), default=-1) + 1)
    for token, token_id in vocab.items():
        table[token_id] = _bytes_of(token)
    return table


def _bytes_of(token: str) -> bytes:
    """As the ByteLevel decoder: a token with a character outside the byte alphabet (added tokens) is plain text."""
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode("utf-8")


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins for the 256 bytes that byte-level vocabularies are written in (GPT-2's table):
    printable Latin-1 characters stand for themselves, the others for code points from 256 up, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet


_BYTE_OF_CHARACTER = _byte_alphabet()
