"""The `usage` object of both text routes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def make_usage(
    prompt_tokens: int, completion_tokens: int, cached_tokens: int, reasoning_tokens: int = 0
) -> dict[str, Any]:
    """prompt_tokens includes what the tokenizer adds (BOS), and those that were found in the router's cache;
    completion_tokens includes those of the reasoning, with its markers, and the token that ended a text. The cache's
    share is told the way of OpenAI and the way of DeepSeek's own API."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "prompt_cache_hit_tokens": cached_tokens,
        "prompt_cache_miss_tokens": prompt_tokens - cached_tokens,
    }


def sum_cached_tokens(of_choices: Mapping[int, int], num_choices: int) -> int:
    """of_choices: by index of the choice. A prompt counts once, however many choices it has: as its first one found
    it."""
    return sum(count for index, count in of_choices.items() if index % num_choices == 0)
