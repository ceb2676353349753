"""The sampler draws from the distribution it names, and a token depends on its own (seed, position) only."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from router.sampler import SampleRow, SamplingParams, compute_logprobs, gumbel_noise, sample, sample_in_torch

LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -4.0])
NUM_DRAWS = 20_000


def params(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0
) -> SamplingParams:
    return SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)


def draw_counts(by: str, **overrides: Any) -> torch.Tensor:
    """[vocab_size] counts over NUM_DRAWS draws: of one seed over positions, or of many seeds at one position."""
    if by == "position":
        rows = [SampleRow(params(**overrides), position, ()) for position in range(NUM_DRAWS)]
    else:
        rows = [SampleRow(params(seed=seed, **overrides), 17, ()) for seed in range(NUM_DRAWS)]
    token_ids = sample(LOGITS.expand(NUM_DRAWS, -1), rows)
    return torch.bincount(token_ids, minlength=LOGITS.numel())


def assert_distribution(counts: torch.Tensor, expected: torch.Tensor) -> None:
    """Pearson's chi-square at a tail of about 1e-4 (Wilson and Hilferty's cube-root approximation)."""
    assert not counts[expected == 0].any()
    kept = expected > 0
    wanted = expected[kept] * NUM_DRAWS
    statistic = float(((counts[kept] - wanted) ** 2 / wanted).sum())
    freedom = int(kept.sum()) - 1
    critical = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < critical, f"chi-square {statistic:.1f}, critical {critical:.1f}, counts {counts.tolist()}"


def renormalised(probabilities: torch.Tensor, num_kept: int) -> torch.Tensor:
    """LOGITS descend, so what the filters keep is a prefix."""
    kept = torch.where(torch.arange(probabilities.numel()) < num_kept, probabilities, torch.zeros(()))
    return kept / kept.sum()


@pytest.mark.parametrize("by", ["position", "seed"])
def test_plain_sampling_follows_softmax(by: str) -> None:
    assert_distribution(draw_counts(by), LOGITS.softmax(-1))


def test_temperature_sharpens() -> None:
    assert_distribution(draw_counts("seed", temperature=0.5), (LOGITS / 0.5).softmax(-1))


@pytest.mark.parametrize("temperature", [1e-6, 1e-39, 1e-45])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 3}], ids=str)
def test_a_temperature_near_zero_takes_the_best_token(temperature: float, filters: dict[str, Any]) -> None:
    logits = torch.tensor([[30.0, 90.0, -5.0, 100.0, 99.0]])
    assert sample(logits, [SampleRow(params(temperature, **filters), 4, ())]).tolist() == [3]


def test_top_k_keeps_the_k_best_and_renormalises() -> None:
    assert_distribution(draw_counts("position", top_k=3), renormalised(LOGITS.softmax(-1), 3))


def test_top_p_keeps_the_smallest_prefix_that_reaches_it() -> None:
    probabilities = LOGITS.softmax(-1)
    # 0.41 + 0.25 = 0.66 < 0.7 <= 0.66 + 0.15
    assert float(probabilities[:2].sum()) < 0.7 < float(probabilities[:3].sum())

    assert_distribution(draw_counts("position", top_p=0.7), renormalised(probabilities, 3))


def test_min_p_is_relative_to_the_best_token() -> None:
    # e^-1 of the best: logits at least 1.0; a hair below keeps rounding out of the test.
    assert_distribution(draw_counts("position", min_p=0.36), renormalised(LOGITS.softmax(-1), 3))


def test_filters_act_on_the_tempered_distribution() -> None:
    tempered = (LOGITS / 2.0).softmax(-1)
    num_kept = int((tempered >= 0.36 * tempered.max()).sum())
    assert num_kept > 3

    assert_distribution(draw_counts("position", min_p=0.36, temperature=2.0), renormalised(tempered, num_kept))


@pytest.mark.parametrize("limit", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_the_tightest_filter_is_greedy(limit: dict[str, Any]) -> None:
    assert draw_counts("position", **limit)[0] == NUM_DRAWS


def test_temperature_0_is_greedy_whatever_the_seed() -> None:
    rows = [SampleRow(params(temperature=0.0, seed=seed), 0, ()) for seed in range(5)]

    assert sample(LOGITS.expand(5, -1), rows).tolist() == [0] * 5


def test_greedy_takes_the_first_of_equal_logits() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [-0.0, 0.0, -1.0, 0.0], [-math.inf, -2.0, -math.inf, -3.0]])
    rows = [SampleRow(params(temperature=0), 5, ())] * 3
    assert sample(logits, rows).tolist() == [1, 0, 1]


def test_a_token_does_not_depend_on_its_batch_mates() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 50, generator=generator)
    rows = [
        SampleRow(params(seed=3), 4, ()),
        SampleRow(params(temperature=0.0), 9, ()),
        SampleRow(params(seed=3, top_k=7, temperature=0.8), 5, ()),
        SampleRow(params(seed=8, top_p=0.6), 4, ()),
        SampleRow(params(seed=2**64 - 1, min_p=0.1), 2**20, ()),
        SampleRow(params(seed=8, temperature=1.7), 5, (1, 2)),
    ]

    together = sample(logits, rows).tolist()
    alone = [int(sample(logits[index : index + 1], rows[index : index + 1])) for index in range(6)]
    backwards = sample(logits.flip(0), rows[::-1]).tolist()[::-1]

    assert together == alone == backwards


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_ids_are_never_drawn_and_logits_stay(temperature: float) -> None:
    logits = LOGITS.repeat(500, 1)
    rows = [SampleRow(params(temperature=temperature), position, (0, 2)) for position in range(500)]

    token_ids = sample(logits, rows)

    assert set(token_ids.tolist()) & {0, 2} == set()
    assert torch.equal(logits, LOGITS.repeat(500, 1))


def test_noise_is_standard_gumbel_without_visible_correlation() -> None:
    """Neighbouring seeds, positions and token ids feed the hash almost equal inputs."""
    by_position = gumbel_noise([1] * 400, list(range(400)), torch.arange(400)).double()
    by_seed = gumbel_noise(list(range(400)), [1] * 400, torch.arange(400)).double()

    for noise in (by_position, by_seed):
        assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
        assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.05)
        centred = (noise - noise.mean()) / noise.std()
        # 160,000 products: one standard error is 0.0025.
        assert abs((centred[1:] * centred[:-1]).mean().item()) < 0.012
        assert abs((centred[:, 1:] * centred[:, :-1]).mean().item()) < 0.012
    # (seed, position) is no sum: exchanging the two gives other noise.
    assert not torch.equal(gumbel_noise([1], [2], torch.arange(8)), gumbel_noise([2], [1], torch.arange(8)))


@pytest.mark.parametrize("choose", [sample, sample_in_torch])
@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
@pytest.mark.parametrize(
    "filters",
    [{"top_p": 0.5}, {"top_p": 0.95}, {"top_k": 40, "top_p": 0.9}, {"top_k": 700}, {"min_p": 0.02}, {}],
    ids=str,
)
def test_filters_keep_the_same_tokens_however_many_there_are(
    filters: dict[str, Any], spread: float, choose: Callable[[torch.Tensor, list[SampleRow]], torch.Tensor]
) -> None:
    """Of 3,000 tokens only the best few are put in order, unless the distribution is too flat for that."""
    num_rows, vocab_size = 16, 3000
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(2)) * spread
    rows = [SampleRow(params(seed=row, **filters), row, ()) for row in range(num_rows)]

    expected: list[int] = []
    for row in range(num_rows):
        ordered, token_ids = logits[row].double().sort(descending=True)
        ordered = ordered[: filters.get("top_k") or vocab_size]
        mass = ordered.softmax(-1)
        is_kept = (mass.cumsum(-1) - mass < filters.get("top_p", 2.0)) & (mass >= filters.get("min_p", 0) * mass[0])
        kept = token_ids[: len(ordered)][is_kept]
        noise = gumbel_noise([row], [row], torch.arange(vocab_size))[0]
        expected.append(int(kept[(logits[row] + noise)[kept].argmax()]))

    assert choose(logits, rows).tolist() == expected


@pytest.mark.parametrize("temperature", [0.05, 1.0, 3.0])
def test_tokens_that_cannot_win_are_passed_over_and_none_that_can(temperature: float) -> None:
    """Flat and steep rows, equal logits, and tokens that a grammar forbids."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(600, 777, generator=generator) * torch.logspace(-2, 1.5, 600).unsqueeze(1)
    logits = torch.where(torch.rand(logits.shape, generator=generator) < 0.3, -math.inf, logits.round(decimals=1))
    rows = [SampleRow(params(seed=row, temperature=temperature), row, ()) for row in range(len(logits))]
    noise = gumbel_noise([row.params.seed for row in rows], [row.position for row in rows], torch.arange(777))
    tempered = (logits - logits.amax(1, keepdim=True)) / temperature
    assert sample(logits, rows).tolist() == (tempered + noise).argmax(1).tolist()


def test_logprobs_are_the_models_own_and_agree_with_the_alternatives() -> None:
    logits = torch.stack([LOGITS, LOGITS.flip(0)])

    first, second = compute_logprobs(logits, torch.tensor([0, 0]), [3, 0])

    expected = LOGITS.log_softmax(-1)
    assert first.logprob == pytest.approx(float(expected[0]))
    assert first.top_token_ids == [0, 1, 2]
    # The same float, not merely close: evaluation harnesses compare the two for equality.
    assert first.top_logprobs[0] == first.logprob
    assert second.logprob == pytest.approx(float(expected[7]))
    assert (second.top_token_ids, second.top_logprobs) == ([], [])
