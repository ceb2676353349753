"""Which router gets a sequence: the one that holds most of its prefix, unless others have much less to do.

A router keeps the KV blocks of prompts that it computed, and a prompt that begins the same need not be computed again
there. This module only remembers where prompts were sent; whether the blocks are still there is the router's business,
and a wrong guess costs no more than an even spread would. Pure but for the directory: no clock, no network.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# Tokens that routers cache as one piece (router/latent_cache.py); a shorter common beginning saves nothing.
PREFIX_BLOCK = 32
# 8,192 tokens tell prompts apart well enough, and are hashed in half a millisecond.
MAX_PROMPT_BLOCKS = 256
# A prefix is worth waiting behind this many requests more than elsewhere: each slows a step by a few percent, while
# computing a prompt again takes as long as tens of steps. It is also how soon a common prefix gets a second router.
MAX_EXCESS = 4
# About 100 bytes each; the routers of a cluster hold a few hundred thousand tokens, 32 to a block.
MAX_BLOCKS = 100_000


class Candidate(NamedTuple):
    """A router that may be chosen. num_in_flight: sequences that this process runs there."""

    endpoint: str
    num_in_flight: int
    last_used_s: float


def compute_blocks(token_ids: Sequence[int], cache_salt: str = "") -> list[bytes]:
    """A digest for every whole block at the start of a prompt; each stands for all tokens up to its end. Prompts of
    different salts share none, as in the routers' caches."""
    tokens = array("I", token_ids)
    digest = cache_salt.encode()
    digests: list[bytes] = []
    for start in range(0, min(len(tokens) // PREFIX_BLOCK, MAX_PROMPT_BLOCKS) * PREFIX_BLOCK, PREFIX_BLOCK):
        digest = hashlib.blake2b(digest + tokens[start : start + PREFIX_BLOCK].tobytes(), digest_size=8).digest()
        digests.append(digest)
    return digests


def choose_router(
    candidates: Sequence[Candidate], blocks: Sequence[bytes], num_held: Mapping[str, int], max_excess: int = MAX_EXCESS
) -> str:
    """The endpoint for a prompt. blocks: of the prompt. num_held: how many of them each endpoint holds from the start.

    Of the routers with at most max_excess sequences more than the least loaded: the longest prefix, then the least
    loaded, then the one that a rendezvous hash of the first block names, so that front processes that know nothing of
    each other agree; prompts shorter than a block take turns. Raises ValueError without candidates.
    """
    if not candidates:
        raise ValueError("there is no router to choose from")
    least = min(candidate.num_in_flight for candidate in candidates)

    def rank(candidate: Candidate) -> tuple[int, int, bytes, float]:
        score = hashlib.blake2b(blocks[0] + candidate.endpoint.encode(), digest_size=8).digest() if blocks else b""
        return (
            -num_held.get(candidate.endpoint, 0), candidate.num_in_flight, score, candidate.last_used_s
        )  # fmt: skip

    return min((one for one in candidates if one.num_in_flight <= least + max_excess), key=rank).endpoint


class PrefixDirectory:
    """Where prompts were sent: block digest -> endpoints. The blocks not seen for longest are forgotten first."""

    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        self._max_blocks = max_blocks
        self._holders: OrderedDict[bytes, set[str]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holders)

    def count_held(self, blocks: Sequence[bytes]) -> dict[str, int]:
        """How many blocks from the start each endpoint was sent; endpoints with none are left out."""
        counts: dict[str, int] = {}
        for number, block in enumerate(blocks, start=1):
            holders = [one for one in self._holders.get(block, ()) if counts.get(one, 0) == number - 1]
            if not holders:
                break
            counts.update(dict.fromkeys(holders, number))
        return counts

    def note(self, blocks: Sequence[bytes], endpoint: str) -> None:
        """A prompt with these blocks goes there."""
        # The first block last: it must not be forgotten before those that build on it.
        for block in reversed(blocks):
            self._holders.setdefault(block, set()).add(endpoint)
            self._holders.move_to_end(block)
        while len(self._holders) > self._max_blocks:
            self._holders.popitem(last=False)

    def forget(self, endpoint: str) -> None:
        """A router that was lost holds nothing when it comes back."""
        for block in [block for block, holders in self._holders.items() if endpoint in holders]:
            holders = self._holders[block]
            holders.discard(endpoint)
            if not holders:
                del self._holders[block]
