"""The `usage` object of both text routes."""

from __future__ import annotations


def make_usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """prompt_tokens includes what the tokenizer adds (BOS); completion_tokens includes the token that ended a text."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
