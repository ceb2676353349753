"""From logits to tokens, vectorised over the batch.

Sampling is Gumbel-max: argmax(log p + g) with g Gumbel noise has exactly the distribution p. The noise is a hash of
(seed, position, token id), so a token depends on its own sequence only and a sequence can be continued on another
router, or verified several tokens at once, with the same outcome.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from experts.kernels.cpu_ffn import load_library
from router.penalties import BiasedRow, LogitBias, PenalisedRow, Penalties, add_biases_, penalise_
from router.token_counts import TokenCounts
from router.token_masks import BoundRow, forbid_others_

# As many tokens as top-k and top-p leave in nearly every row: sorting all of 4096 took half of a small model's step.
FEW_TOKENS = 256


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 keep every token. seed: unsigned 64 bits.

    penalties, logit_bias: None: none."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    penalties: Penalties | None = None
    logit_bias: LogitBias | None = None


class SampleRow(NamedTuple):
    """One row to sample. position: of the token to be sampled. banned_ids: may not be sampled now.

    counts: of the sequence's tokens, where it has penalties. drafts: tokens of its context that are not counted yet.
    allowed: one bit per token, as grammar.TokenMatcher.find_allowed has them: no other may be sampled; None: any.
    """

    params: SamplingParams
    position: int
    banned_ids: tuple[int, ...]
    counts: TokenCounts | None = None
    drafts: tuple[int, ...] = ()
    allowed: bytes | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the logits are sampled from as they are."""
        params = self.params
        return params.logit_bias is params.penalties is self.allowed is None and not self.banned_ids


def sample(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """logits: [num_rows, vocab_size] float32, not changed. Returns [num_rows] int64.

    Order as in vLLM: logit bias, penalties, temperature, then min-p, top-k and top-p on the tempered distribution.
    """
    logits = _adjust(logits, rows)
    random_rows = [index for index, row in enumerate(rows) if row.params.temperature > 0]
    if not random_rows:
        return _choose_best(logits)
    if len(random_rows) == len(rows):
        return _sample_random(logits, rows)
    token_ids = _choose_best(logits)
    chosen = torch.tensor(random_rows)
    token_ids[chosen] = _sample_random(logits[chosen], [rows[index] for index in random_rows])
    return token_ids


def _choose_best(logits: Tensor) -> Tensor:
    """The first of each row's largest logits."""
    if logits.device.type != "cpu":
        return logits.argmax(dim=-1)
    # torch's argmax of float32 rows is not vectorised on the CPU: eight to ten times as slow.
    return torch.from_numpy(logits.numpy().argmax(axis=-1))


def _adjust(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Bias, penalties, bans and grammars; the logits themselves where no row has any."""
    if all(row.is_plain for row in rows):
        return logits
    biased = [BiasedRow(i, row.params.logit_bias) for i, row in enumerate(rows) if row.params.logit_bias is not None]
    penalised = [
        PenalisedRow(i, row.params.penalties, row.counts, row.drafts)
        for i, row in enumerate(rows)
        if row.params.penalties is not None and row.counts is not None
    ]
    banned = [(i, token_id) for i, row in enumerate(rows) for token_id in row.banned_ids]
    bound = [BoundRow(i, row.allowed) for i, row in enumerate(rows) if row.allowed is not None]
    logits = logits.clone()
    if biased:
        add_biases_(logits, biased)
    if penalised:
        penalise_(logits, penalised)
    if banned:
        logits[tuple(torch.tensor(banned).T)] = float("-inf")
    if bound:
        forbid_others_(logits, bound)
    return logits


# As struct SampleRow in experts/kernels/cpu/sample.h.
_NATIVE_ROW = struct.Struct("=fffiQQ")


def _sample_random(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    library = load_library()
    if library is None or logits.device.type != "cpu":
        return sample_in_torch(logits, rows)
    logits = logits.contiguous()
    settings = b"".join(
        [
            _NATIVE_ROW.pack(p.temperature, p.top_p, p.min_p, p.top_k, p.seed & _MASK, position)
            for p, position, *_ in rows
        ]
    )
    token_ids = torch.empty(len(rows), dtype=torch.int64)
    num_rows, vocab_size = logits.shape
    if library.shoal_sample(logits.data_ptr(), vocab_size, num_rows, vocab_size, settings, token_ids.data_ptr()):
        raise MemoryError("no memory to sample")
    return token_ids


def sample_in_torch(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """The same choice where the native library is not to be had; logits as close as rounding may fall either way."""
    params = [row.params for row in rows]
    # Distances from the best token, which thus stays at 0: a temperature near 0 would make several logits infinite.
    below_best = logits - logits.amax(dim=-1, keepdim=True)
    tempered = below_best / torch.tensor([p.temperature for p in params]).unsqueeze(1)
    if any(p.min_p > 0 for p in params):
        floor = torch.tensor([p.min_p for p in params]).log().unsqueeze(1)
        tempered = tempered.masked_fill(tempered < floor, float("-inf"))
    filtered = [index for index, p in enumerate(params) if p.top_k > 0 or p.top_p < 1]
    if not filtered:
        return _choose(tempered, rows)
    if len(filtered) == len(rows):
        return _choose_filtered(tempered, rows)
    token_ids = torch.empty(len(rows), dtype=torch.int64)
    for indices, choose in (
        (filtered, _choose_filtered),
        ([index for index in range(len(rows)) if index not in set(filtered)], _choose),
    ):
        token_ids[indices] = choose(tempered[indices], [rows[index] for index in indices])
    return token_ids


def _choose(tempered: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Among all tokens."""
    noise = gumbel_noise(
        [row.params.seed for row in rows], [row.position for row in rows], torch.arange(tempered.shape[-1])
    )
    return (tempered + noise).argmax(dim=-1)


def _choose_filtered(tempered: Tensor, rows: Sequence[SampleRow], count: int = FEW_TOKENS) -> Tensor:
    """Among what top-k and top-p keep, which are nearly always some of the best few: only these are put in order.

    A row of which that is not so is done again with all tokens; no row's result depends on the others.
    """
    kept, token_ids, is_enough = _keep_top(tempered, [row.params for row in rows], min(count, tempered.shape[-1]))
    noise = gumbel_noise([row.params.seed for row in rows], [row.position for row in rows], token_ids)
    chosen = token_ids.gather(1, (kept + noise).argmax(dim=-1, keepdim=True)).squeeze(1)
    lacking = (~is_enough).nonzero().squeeze(1).tolist() if count < tempered.shape[-1] else []
    if lacking:
        chosen[lacking] = _choose_filtered(tempered[lacking], [rows[index] for index in lacking], tempered.shape[-1])
    return chosen


def _keep_top(tempered: Tensor, params: Sequence[SamplingParams], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` best tokens of each row, best first: [num_rows, count] logits, -inf where top-k or top-p leaves a
    token out, and their ids; and whether all that are to be kept are among them, [num_rows] bool. The best token always
    stays."""
    logits, token_ids = tempered.topk(count, dim=-1)
    ranks = torch.arange(count)
    top_k = torch.tensor([p.top_k for p in params]).unsqueeze(1)
    top_p = torch.tensor([p.top_p for p in params]).unsqueeze(1)
    logits = logits.masked_fill((top_k > 0) & (ranks >= top_k), float("-inf"))
    # top-p counts the mass of what top-k left.
    mass = torch.where(top_k > 0, logits.softmax(dim=-1), tempered.softmax(dim=-1).gather(1, token_ids))
    upto = mass.cumsum(dim=-1)
    logits = logits.masked_fill((upto - mass >= top_p) & (top_p < 1) & (ranks > 0), float("-inf"))
    is_enough = torch.where(top_k > 0, top_k <= count, (top_p < 1) & (upto[:, -1:] >= top_p)).squeeze(1)
    return logits, token_ids, is_enough


def gumbel_noise(seeds: Sequence[int], positions: Sequence[int], token_ids: Tensor) -> Tensor:
    """token_ids: [num_tokens] or [num_rows, num_tokens] int64. Returns [num_rows, num_tokens] float32 standard Gumbel
    noise, a pure function of (seed, position, token id)."""
    keys = torch.tensor([_as_int64(_key(seed, position)) for seed, position in zip(seeds, positions, strict=True)])
    bits = _mix(keys.unsqueeze(1) + (token_ids + 1) * _as_int64(_GOLDEN))
    uniform = ((bits >> 11) & ((1 << 53) - 1)).double().add_(0.5).mul_(2.0**-53)  # in (0, 1)
    return uniform.log_().neg_().log_().neg_().float()


# splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014): increment and mixer.
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def _key(seed: int, position: int) -> int:
    """Unsigned 64 bits: what the noise of a token's row is drawn with."""
    return _mix_int(seed ^ _mix_int(position))


def _as_int64(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _mix_int(value: int) -> int:
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def _mix(values: Tensor) -> Tensor:
    """The mixer on int64 tensors, whose products wrap as unsigned ones do."""
    values = (values ^ _shift_right(values, 30)) * _as_int64(_MIX_1)
    values = (values ^ _shift_right(values, 27)) * _as_int64(_MIX_2)
    return values ^ _shift_right(values, 31)


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Logical shift: int64's own shift repeats the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


class TokenLogprobs(NamedTuple):
    """One row: the chosen token's log-probability and the most probable alternatives, best first."""

    logprob: float
    top_token_ids: list[int]
    top_logprobs: list[float]


def compute_logprobs(logits: Tensor, token_ids: Tensor, num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Of the model's own distribution, before temperature and masks.

    logits: [num_rows, vocab_size] float32; token_ids: [num_rows] int64; num_top: alternatives wanted per row.
    """
    logprobs = logits.log_softmax(dim=-1)
    own = logprobs.gather(1, token_ids.unsqueeze(1)).squeeze(1).tolist()
    most = min(max(num_top, default=0), logits.shape[-1])
    if most == 0:
        return [TokenLogprobs(value, [], []) for value in own]
    top = logprobs.topk(most, dim=-1)
    return [
        TokenLogprobs(value, ids[:count], values[:count])
        for value, ids, values, count in zip(own, top.indices.tolist(), top.values.tolist(), num_top, strict=True)
    ]
