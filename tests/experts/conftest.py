"""Checkpoints that the tests of this folder read. Session-scoped ones must not be written to."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experts.checkpoint import Checkpoint
from tests.random_checkpoint import write_random_checkpoint

# Larger than one 128x128 block in every direction of an expert matrix, with partial blocks at the edges.
FP8_SIZES: dict[str, Any] = {"hidden_size": 192, "moe_intermediate_size": 160, "n_routed_experts": 8, "n_group": 2}


@pytest.fixture(scope="session")
def fp8_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP8 in two shards, an MTP layer, some scales in another shard than their weight."""
    folder = tmp_path_factory.mktemp("checkpoints") / "fp8"
    write_random_checkpoint(folder, fp8=True, num_nextn_predict_layers=1, topk_group=1, **FP8_SIZES)
    return folder


@pytest.fixture(scope="session")
def bf16_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain bf16 in one file."""
    folder = tmp_path_factory.mktemp("checkpoints") / "bf16"
    write_random_checkpoint(folder, shards=1)
    return folder


@pytest.fixture
def broken_folder(fp8_folder: Path, tmp_path: Path) -> Path:
    """A copy of fp8_folder to damage."""
    folder = tmp_path / "broken"
    shutil.copytree(fp8_folder, folder)
    return folder


@pytest.fixture(scope="session")
def fp8_checkpoint(fp8_folder: Path) -> Checkpoint:
    return Checkpoint(fp8_folder)


@pytest.fixture
def restore_signals() -> Iterator[None]:
    """Give SIGINT and SIGTERM back to pytest after `main` took them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
