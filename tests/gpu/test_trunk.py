"""The whole trunk on a card against the same on the CPU, over several steps, through the real kernels and copies."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from experts.checkpoint import Checkpoint
from experts.device import CPU, resolve_device
from experts.errors import ConfigError
from experts.expert_range import split_experts
from experts.group import ExpertGroup
from experts.kernels.expert_kernel import TorchKernel
from experts.weights import load_expert_weights
from router.block_pool import BLOCK_SIZE
from router.latent_cache import LatentCache
from router.linear import TorchFactory
from router.server import RouterConfig, RouterServer
from router.step_batch import StepBatch, TokenSpan, build_step_batch
from router.trunk import Trunk
from router.weights import load_trunk_weights
from tests.random_checkpoint import write_random_checkpoint
from tests.router.in_process import LocalDispatcher

SIZES: dict[str, Any] = {"hidden_size": 256, "moe_intermediate_size": 128, "n_routed_experts": 8, "n_group": 2}
NUM_BLOCKS = 64
# Prefill, then decode beside another prefill, then a verification of 3 tokens: (context, number of new tokens).
STEPS = [[(0, 70), (0, 5)], [(70, 1), (5, 40)], [(71, 1), (45, 3)]]
BLOCKS = [list(range(8)), list(range(20, 28))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "fp8"
    write_random_checkpoint(folder, fp8=True, topk_group=1, **SIZES)
    return folder


def make_steps(vocab_size: int) -> list[StepBatch]:
    generator = torch.Generator().manual_seed(3)

    def make_span(index: int, context_len: int, num_new: int) -> TokenSpan:
        token_ids = torch.randint(vocab_size, (num_new,), generator=generator).tolist()
        return TokenSpan(token_ids, context_len, BLOCKS[index][: -(-(context_len + num_new) // BLOCK_SIZE)])

    return [build_step_batch([make_span(index, *sizes) for index, sizes in enumerate(step)]) for step in STEPS]


def compute_logits(folder: Path, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Of every token of every step; the experts are the same float32 ones, on the CPU."""
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    kernel = TorchKernel(torch.float32)
    group = ExpertGroup(load_expert_weights(checkpoint, split_experts(config, 1)[0], torch.float32, kernel=kernel))
    factory = TorchFactory(dtype) if device == CPU else None
    with torch.inference_mode():
        weights = load_trunk_weights(checkpoint, dtype, factory=factory, device=device)
        cache = LatentCache(config, NUM_BLOCKS, dtype, device)
        trunk = Trunk(config, weights, LocalDispatcher([group]), cache, max_model_len=256, deterministic=False)

        async def run() -> list[torch.Tensor]:
            return [trunk.compute_logits(await trunk.forward(batch)) for batch in make_steps(config.vocab_size)]

        return asyncio.run(run())


def test_float32_on_the_card_is_float32_on_the_cpu(folder: Path) -> None:
    expected = compute_logits(folder, CPU, torch.float32)
    for found, wanted in zip(compute_logits(folder, resolve_device("cuda"), torch.float32), expected, strict=True):
        assert found.device == CPU and found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_bf16_in_fp8_on_the_card_agrees_with_the_cpu(folder: Path) -> None:
    expected = compute_logits(folder, CPU, torch.float32)
    for found, wanted in zip(compute_logits(folder, resolve_device("cuda"), torch.bfloat16), expected, strict=True):
        # Activations in e4m3 at every product; a different expert may be chosen in a near tie.
        assert float(torch.nn.functional.cosine_similarity(found, wanted, dim=-1).median()) >= 0.98


def test_the_card_holds_all_but_the_embedding(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    weights = load_trunk_weights(checkpoint, torch.bfloat16, device=resolve_device("cuda"))
    assert weights.embed_tokens.device == CPU
    assert weights.norm.device.type == weights.layers[0].input_layernorm.device.type == "cuda"


def test_deterministic_output_is_refused_on_a_card(folder: Path) -> None:
    with pytest.raises(ConfigError, match="use --device cpu"):
        RouterServer(RouterConfig(str(folder), device="cuda", deterministic=True))
