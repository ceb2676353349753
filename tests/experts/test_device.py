"""Which device a process takes, what it says when it cannot, and what passes through host memory on the way there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experts.activation_quantization import dequantize_rows, quantize_rows
from experts.device import CPU, CudaCard, check_device_memory, choose_device
from experts.errors import ConfigError, NotEnoughMemory
from experts.frame_transfer import scale_rows
from experts.staging import ALIGNMENT, NUM_BUFFERS, Staging, compute_offsets

TURING = CudaCard(0, "old", (7, 5))
AMPERE = CudaCard(1, "RTX 3090", (8, 6))
ADA = CudaCard(2, "RTX 4090", (8, 9))


@pytest.mark.parametrize(
    ("setting", "cards", "expected"),
    [
        ("auto", [], "cpu"),
        ("auto", [TURING], "cpu"),
        ("auto", [TURING, AMPERE, ADA], "cuda:1"),
        ("cpu", [AMPERE], "cpu"),
        ("cuda", [CudaCard(0, "RTX 4090", (8, 9))], "cuda:0"),
        ("cuda:2", [TURING, AMPERE, ADA], "cuda:2"),
    ],
)
def test_the_setting_and_the_cards_decide(setting: str, cards: list[CudaCard], expected: str) -> None:
    assert choose_device(setting, cards, has_triton=True) == torch.device(expected)


def test_without_triton_auto_takes_the_cpu() -> None:
    assert choose_device("auto", [AMPERE], has_triton=False) == CPU


@pytest.mark.parametrize(
    ("setting", "cards", "has_triton", "message"),
    [
        ("gpu", [], True, "expected auto, cpu, cuda or cuda:INDEX"),
        ("cuda:", [AMPERE], True, "expected auto, cpu, cuda or cuda:INDEX"),
        ("cuda", [], True, "sees no CUDA card here .*use --device cpu"),
        ("cuda:3", [TURING, AMPERE, ADA], True, "this process sees cuda:0 to cuda:2"),
        ("cuda", [TURING], True, r"compute capability 7.5, at least 8.0 \(Ampere\) is needed"),
        ("cuda:1", [TURING, AMPERE], False, r"need the package triton \(install shoal\[gpu\]\)"),
    ],
)
def test_what_cannot_be_is_one_line_with_the_remedy(
    setting: str, cards: list[CudaCard], has_triton: bool, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        choose_device(setting, cards, has_triton=has_triton)
    assert "\n" not in str(caught.value)


def test_a_card_too_small_is_said_with_both_numbers() -> None:
    card = torch.device("cuda", 1)
    check_device_memory(card, 10**9, "8 experts", "use more groups", free_bytes=10**9)
    with pytest.raises(NotEnoughMemory) as caught:
        check_device_memory(card, 3 * 10**9, "8 experts", "use more groups", free_bytes=10**9)
    assert str(caught.value) == ("8 experts need 3.00 GB of memory on cuda:1, 1.00 GB are available (use more groups)")


def test_tensors_in_a_staging_buffer_do_not_meet_and_start_on_cache_lines() -> None:
    sizes = [100, 64, 1, 0, 4]
    offsets = compute_offsets(sizes)
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    assert all(start + size <= end for start, size, end in zip(offsets, sizes, offsets[1:], strict=False))
    staging = Staging(CPU, offsets[-1])
    taken = [staging.take() for _ in range(NUM_BUFFERS)]
    staging.release()
    again = staging.take()
    assert [np.shares_memory(again, buffer) for buffer in taken] == [True] + [False] * (NUM_BUFFERS - 1)
    assert sum(buffer.nbytes for buffer in taken) == staging.size_bytes == NUM_BUFFERS * offsets[-1]


@pytest.mark.parametrize("num_columns", [128, 200, 40])
def test_rows_scaled_on_a_device_have_the_bits_of_the_wire(num_columns: int) -> None:
    x = torch.randn(5, num_columns, generator=torch.Generator().manual_seed(0))
    x[3, 7] = float("nan")
    rows = quantize_rows(x)
    found = scale_rows(rows.values, rows.scales)
    torch.testing.assert_close(found, dequantize_rows(rows), rtol=0, atol=0, equal_nan=True)
