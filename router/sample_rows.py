"""How a sequence's next tokens are sampled, be it to draft or to verify: the two must never differ."""

from __future__ import annotations

from collections.abc import Sequence as Series

from router.sampler import SampleRow
from router.sequence import Sequence
from router.token_masks import has_only


def build_sample_row(sequence: Sequence, drafts: Series[int], eos_token_ids: frozenset[int]) -> SampleRow:
    """For the token behind the known ones and the drafts."""
    request = sequence.request
    banned: tuple[int, ...] = ()
    if sequence.num_generated + len(drafts) < request.min_tokens:
        banned = tuple(sorted(eos_token_ids | request.stop_token_ids))
    allowed = None if sequence.grammar is None else sequence.grammar.find_allowed(drafts)
    if banned and allowed is not None and has_only(allowed, banned):
        banned = ()  # a complete answer ends, however short
    position = len(sequence.token_ids) + len(drafts)
    return SampleRow(request.sampling, position, banned, sequence.counts, tuple(drafts), allowed)
