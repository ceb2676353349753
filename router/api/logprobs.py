"""Log probabilities in the two shapes of the OpenAI API."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from router.api.tokenizer import TextTokenizer
from router.v1 import router_pb2

# JSON has no -inf; the value that other servers send in its place.
MIN_LOGPROB = -9999.0


class TokenEntry(NamedTuple):
    """A token with its log probability and where it begins in the text."""

    token_id: int
    logprob: float | None
    """None where none was asked for, and for the first token of a prompt."""
    top: Sequence[tuple[int, float]]
    """(token id, log probability), the most probable first."""
    text_offset: int
    """In characters."""


def read_token(output: router_pb2.TokenOutput, text_offset: int) -> TokenEntry:
    """Translate a router's token. Its log probability is taken from the top list where it is in it, so that a client
    that compares the two (to see whether the token was the best) compares the same float."""
    top = [
        (token_id, _clamp(logprob)) for token_id, logprob in zip(output.top_token_ids, output.top_logprobs, strict=True)
    ]
    logprob = _clamp(output.logprob) if output.HasField("logprob") else None
    if logprob is not None:
        logprob = next((value for token_id, value in top if token_id == output.token_id), logprob)
    return TokenEntry(output.token_id, logprob, top, text_offset)


def completion_logprobs(entries: Sequence[TokenEntry], tokenizer: TextTokenizer) -> dict[str, Any]:
    """The `logprobs` object of /v1/completions. Each top_logprobs holds the token itself, whether it was among the
    best or not, and is null where the token has no log probability."""
    return {
        "tokens": [tokenizer.token_text(entry.token_id) for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [_top_dictionary(entry, tokenizer) for entry in entries],
        "text_offset": [entry.text_offset for entry in entries],
    }


def chat_logprobs(entries: Sequence[TokenEntry], tokenizer: TextTokenizer) -> dict[str, Any]:
    """The `logprobs` object of /v1/chat/completions."""
    return {
        "content": [
            {
                **_chat_token(entry.token_id, entry.logprob, tokenizer),
                "top_logprobs": [_chat_token(token_id, logprob, tokenizer) for token_id, logprob in entry.top],
            }
            for entry in entries
        ],
        "refusal": None,
    }


def _chat_token(token_id: int, logprob: float | None, tokenizer: TextTokenizer) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": MIN_LOGPROB if logprob is None else logprob,
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def _top_dictionary(entry: TokenEntry, tokenizer: TextTokenizer) -> dict[str, float] | None:
    if entry.logprob is None:
        return None
    dictionary = {tokenizer.token_text(entry.token_id): entry.logprob}
    for token_id, logprob in entry.top:
        # Should two tokens read the same, the first counts: the token itself, then the more probable.
        dictionary.setdefault(tokenizer.token_text(token_id), logprob)
    return dictionary


def _clamp(logprob: float) -> float:
    """Everything that JSON cannot carry becomes the least value."""
    return logprob if MIN_LOGPROB < logprob < math.inf else MIN_LOGPROB
