"""The card at hand, and experts at the published sizes on it."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from experts.kernels.tile_table import KernelChoice, WeightPath, choose_kernels
from tests.experts.random_experts import RandomExperts, make_experts

# Triton has no build for some platforms, and then none of these files can be imported.
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything of this folder, and skip it where there is no card."""
    missing = pytest.mark.skip(reason="needs a CUDA card, and torch sees none")
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(missing)


@pytest.fixture(params=WeightPath, ids=lambda path: path.value)
def choice(request: pytest.FixtureRequest) -> KernelChoice:
    """Both weight paths, where the card has them."""
    capability = torch.cuda.get_device_capability()
    try:
        return choose_kernels(capability, request.param)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def real_experts() -> RandomExperts:
    """Four experts of DeepSeek-V3's sizes: 176 MB in FP8, four times that for the judge."""
    return make_experts([0, 1, 2, 3], hidden_size=7168, inner_size=2048, device="cuda")
