"""The demo checkpoint, served by real processes, for real clients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.local_stack import REPOSITORY, LocalStack, StackOptions, local_stack

DEMO = REPOSITORY / "deploy" / "demo" / "checkpoint"
MODEL = "checkpoint"


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    options = StackOptions(num_groups=2, dtype="bfloat16", wire_dtype="bfloat16")
    with local_stack(DEMO, tmp_path_factory.mktemp("compat"), options) as stack:
        yield stack
