"""Penalties and logit bias, against the formulas of the OpenAI API and vLLM written out token by token."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from router.errors import BadRequest
from router.penalties import LogitBias, Penalties
from router.sampler import SampleRow, SamplingParams, sample
from router.token_counts import TokenCounts
from tests.router.in_process import (
    LocalDispatcher,
    build_engine,
    collect,
    load_groups,
    request,
    running_engine,
    token_ids,
)

VOCAB_SIZE = 300


def params(
    penalties: Penalties | None = None, bias: dict[int, float] | None = None, temperature: float = 0.0
) -> SamplingParams:
    return SamplingParams(
        temperature=temperature, top_k=0, top_p=1.0, min_p=0.0, seed=5, penalties=penalties,
        logit_bias=None if bias is None else LogitBias(bias.items()),
    )  # fmt: skip


def adjusted(
    logits: torch.Tensor, prompt: list[int], answer: list[int], penalties: Penalties, bias: dict[int, float]
) -> torch.Tensor:
    """The definition, one token at a time."""
    logits = logits.clone()
    for token_id, value in bias.items():
        logits[token_id] += value
    for token_id in set(prompt + answer):
        value = logits[token_id]
        logits[token_id] = value / penalties.repetition if value > 0 else value * penalties.repetition
    for token_id in set(answer):
        logits[token_id] -= penalties.frequency * answer.count(token_id) + penalties.presence
    return logits


@pytest.mark.parametrize(
    ("penalties", "bias"),
    [
        (Penalties(repetition=1.7), {}),
        (Penalties(presence=1.5), {}),
        (Penalties(frequency=0.4), {}),
        (Penalties(repetition=0.6, presence=-0.7, frequency=-0.3), {7: 3.0}),
        (Penalties(), {3: 100.0, 5: -100.0}),
    ],
)
def test_rows_follow_the_definition(penalties: Penalties, bias: dict[int, float]) -> None:
    """Argmax over many random rows, with drafts that are counted as the answer's; all rows in one call."""
    generator = random.Random(3)
    logits = torch.randn(64, VOCAB_SIZE, generator=torch.Generator().manual_seed(4)) * 2
    rows: list[SampleRow] = []
    expected: list[int] = []
    for row in logits:
        best = row.topk(12).indices.tolist()  # what is held is what competes
        prompt, answer = generator.choices(best, k=6), generator.choices(best, k=generator.randrange(6))
        drafts = tuple(generator.choices(best, k=generator.randrange(4)))
        rows.append(SampleRow(params(penalties, bias), len(rows), (), TokenCounts(prompt, answer), drafts))
        expected.append(int(adjusted(row, prompt, [*answer, *drafts], penalties, bias).argmax()))

    assert sample(logits, rows).tolist() == expected
    assert [int(sample(logits[i : i + 1], rows[i : i + 1])) for i in range(8)] == expected[:8]
    assert expected != logits.argmax(-1).tolist()


def test_rows_without_penalties_keep_theirs_in_a_mixed_batch() -> None:
    logits = torch.tensor([[3.0, 2.9, 1.0], [3.0, 2.9, 1.0], [3.0, 2.9, 1.0]])
    rows = [
        SampleRow(params(Penalties(presence=1.0)), 0, (), TokenCounts([], [0])),
        SampleRow(params(), 0, ()),
        SampleRow(params(bias={2: 5.0}), 0, ()),
    ]
    assert sample(logits, rows).tolist() == [1, 0, 2]
    assert logits[0, 0] == 3.0  # the model's own distribution stays, for logprobs


def test_they_act_before_the_temperature() -> None:
    """A difference of 1 taken off before a temperature of 0.1 counts tenfold."""
    logits = torch.tensor([[1.0, 0.5]]).expand(2000, -1)
    counts = TokenCounts([], [0])
    rows = [SampleRow(params(Penalties(presence=1.0), temperature=0.1), i, (), counts) for i in range(2000)]
    share = sample(logits, rows).float().mean().item()
    assert share == pytest.approx(1 / (1 + 2.718281828**-5), abs=0.01)


def test_a_ban_outweighs_a_bias() -> None:
    rows = [SampleRow(params(bias={1: 100.0}), 0, (1,))]
    assert sample(torch.tensor([[0.0, 1.0, 0.5]]), rows).tolist() == [2]


def test_counts_grow_with_the_answer_as_if_counted_anew() -> None:
    generator = random.Random(1)
    prompt = [generator.randrange(VOCAB_SIZE) for _ in range(40)]
    answer = [generator.randrange(VOCAB_SIZE) for _ in range(400)]
    counts = TokenCounts(prompt, [])
    for token_id in answer:
        counts.add(token_id)
    ids, numbers = counts.after(answer[:3])
    expected = {token_id: (answer + answer[:3]).count(token_id) for token_id in prompt + answer}
    assert dict(zip(ids.tolist(), numbers.tolist(), strict=True)) == expected


async def test_penalised_answers_repeat_less_and_a_bias_wins(tiny_checkpoint: Path) -> None:
    dispatcher = LocalDispatcher(load_groups(tiny_checkpoint, 1))
    async with running_engine(build_engine(tiny_checkpoint, dispatcher)) as engine:
        strong = params(Penalties(presence=2.0, frequency=2.0, repetition=100.0))
        penalised = token_ids(await collect(engine.submit(request([0, 5, 9], 40, sampling=strong))))
        biased = token_ids(await collect(engine.submit(request([0, 5, 9], 3, sampling=params(bias={77: 100.0})))))
        continued = request([0, 5, 9, *penalised[:15]], 25, sampling=strong, num_answer_tokens=15)
        rest = token_ids(await collect(engine.submit(continued)))
        with pytest.raises(BadRequest, match="logit_bias token id 320 is outside"):
            engine.submit(request([0], sampling=params(bias={320: 1.0})))
    assert len(set(penalised)) == len(penalised) and not {0, 5, 9} & set(penalised)
    assert biased == [77] * 3
    assert rest == penalised[15:]
