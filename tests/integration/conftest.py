"""One small checkpoint and one running stack that the tests of this folder share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.local_stack import LocalStack, StackOptions, local_stack
from tests.random_checkpoint import write_random_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """V3, 16 experts in 4 gate groups, FP8; a context long enough for streams that a test interrupts."""
    folder = tmp_path_factory.mktemp("integration") / "checkpoint"
    write_random_checkpoint(folder, seed=5, fp8=True, max_position_embeddings=8192)
    return folder


@pytest.fixture(scope="session")
def stack(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """Two groups, float32 everywhere. Tests leave it idle; those that break processes start their own."""
    with local_stack(checkpoint, tmp_path_factory.mktemp("stack"), StackOptions(num_groups=2)) as running:
        yield running
