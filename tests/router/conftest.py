from pathlib import Path

import pytest

from tests.random_checkpoint import write_random_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A V3 model of three layers, 16 experts, 320 tokens of vocabulary."""
    folder = tmp_path_factory.mktemp("tiny")
    write_random_checkpoint(folder, seed=3)
    return folder
