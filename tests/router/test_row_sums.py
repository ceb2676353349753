"""Adding the groups' answers: the native pass gives torch's bits, whatever rows each group answers."""

import numpy as np
import pytest
import torch

from router.row_sums import Answer, add_answers, add_answers_in_torch

HIDDEN_SIZE = 72


def make_answers(num_answers: int, num_tokens: int, dtype: torch.dtype) -> list[Answer]:
    generator = torch.Generator().manual_seed(num_answers + num_tokens)
    answers: list[Answer] = []
    for index in range(num_answers):
        chosen = torch.nonzero(torch.rand(num_tokens, generator=generator) < 0.6).ravel().numpy()
        count = num_tokens if index % 3 == 0 else len(chosen)
        # Replies lie at any address.
        data = torch.randn(count, HIDDEN_SIZE, generator=generator).to(dtype).view(torch.uint8).numpy().tobytes()
        rows = torch.frombuffer(bytearray(b"x" + data), dtype=dtype, offset=1) if count else torch.empty(0, dtype=dtype)
        answers.append(Answer(rows.view(count, HIDDEN_SIZE), None if count == num_tokens else chosen))
    return answers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_answers", "num_tokens"), [(0, 3), (1, 1), (4, 1), (4, 5), (3, 40), (130, 7)])
def test_sums_are_torchs_bit_for_bit(dtype: torch.dtype, num_answers: int, num_tokens: int) -> None:
    answers = make_answers(num_answers, num_tokens, dtype)
    found = add_answers(answers, num_tokens, HIDDEN_SIZE)
    assert found.dtype == torch.float32
    assert torch.equal(found, add_answers_in_torch(answers, num_tokens, HIDDEN_SIZE))


def test_a_row_that_no_group_answers_is_zero_and_nan_stays_in_its_row() -> None:
    rows = torch.ones(2, HIDDEN_SIZE)
    rows[0, 0] = float("nan")
    found = add_answers([Answer(rows, np.array([1, 3]))], 4, HIDDEN_SIZE)
    assert (found[[0, 2]] == 0).all() and (found[3] == 1).all()
    assert found[1].isnan().sum() == 1
