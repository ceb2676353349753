"""The kernel's layer is torch's layer, and a row's bits are its own: whatever the steps, threads and neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from experts.checkpoint import Checkpoint
from experts.kernels.cpu_ffn import FAMILIES, CpuKernel, Family, load_cpu_kernel
from router.latent_cache import LatentCache
from router.layer_front import LayerRun, NativeFront, TorchFront, build_front
from router.linear import LinearFactory, NativeFactory, TorchFactory
from router.rotary import compute_rotations
from router.step_batch import TokenSpan, build_step_batch
from router.step_times import PartTimes
from router.weights import TrunkWeights, load_trunk_weights
from tests.random_checkpoint import write_random_checkpoint
from tests.tolerances import FLOAT32_RELATIVE_ERROR

# Crosses a chunk of the context (512 positions), not at its end.
NUM_TOKENS = 530
NUM_BLOCKS = 40
# Rounding to bf16 at five places of attention, each 2^-9 at most, against a layer in float32 throughout.
BFLOAT16_RELATIVE_ERROR = 0.02

SHAPES: Mapping[str, Mapping[str, Any]] = {
    # Rows of 40 values and heads of 16: nothing is a whole vector.
    "v3": {"hidden_size": 192},
    # Heads as published, so that their FP8 blocks are cut, not expanded; groups ranked by their best expert.
    "v2": {
        "model_type": "deepseek_v2", "qk_nope_head_dim": 128, "v_head_dim": 128, "kv_lora_rank": 160, "n_group": 4,
        "topk_group": 2, "topk_method": "group_limited_greedy", "num_attention_heads": 3, "qk_rope_head_dim": 32,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=SHAPES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder: Path = tmp_path_factory.mktemp("layers")
    write_random_checkpoint(folder, seed=5, fp8=True, **SHAPES[request.param])
    return Checkpoint(folder)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    try:
        kernel = load_cpu_kernel(torch.float32, family=request.param)
    except ValueError:
        pytest.skip(f"this CPU has no {request.param}")
    if kernel is None:
        pytest.skip("no native CPU kernel here: no compiler, and none prebuilt")
    yield request.param
    kernel.set_num_threads_(1)


def native(dtype: torch.dtype, family: Family, *, expands: bool = False) -> tuple[CpuKernel, LinearFactory]:
    kernel = load_cpu_kernel(dtype, family=family)
    assert kernel is not None
    return kernel, NativeFactory(kernel, TorchFactory(dtype), expands=expands)


class Walk:
    """One layer and a cache of its own, whose blocks lie in no order and are garbage until they are written."""

    def __init__(self, checkpoint: Checkpoint, weights: TrunkWeights, layer_id: int, dtype: torch.dtype) -> None:
        config = checkpoint.config
        cache = LatentCache(config, NUM_BLOCKS, dtype)
        cache.layer(layer_id).fill_(float("nan"))
        rotations = compute_rotations(config, NUM_TOKENS)
        self.front = build_front(
            config, weights.layers[layer_id], cache.layer(layer_id), rotations, PartTimes(), deterministic=False
        )

    def step(self, spans: Sequence[tuple[Tensor, int, Sequence[int]]], *, cache_only: bool = False) -> LayerRun:
        """spans: rows, their first position, the sequence's blocks."""
        batch = build_step_batch([TokenSpan([0] * len(rows), start, blocks) for rows, start, blocks in spans])
        run = self.front.start(torch.cat([rows for rows, _, _ in spans]), batch)
        (self.front.fill_cache if cache_only else self.front.attend)(run)
        return run


class Rows(NamedTuple):
    hidden_states: Tensor
    normed: Tensor
    topk_ids: Tensor
    topk_weights: Tensor

    @staticmethod
    def of(run: LayerRun, start: int = 0, stop: int | None = None) -> Rows:
        parts = (run.hidden_states, run.normed, run.topk_ids, run.topk_weights)
        return Rows(*(part[start:stop].clone() for part in parts))


BLOCKS = [(7 * i + 3) % NUM_BLOCKS for i in range(NUM_BLOCKS)][:18]
OTHER_BLOCKS = [block for block in range(NUM_BLOCKS) if block not in BLOCKS]


def random_rows(checkpoint: Checkpoint, num_rows: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, checkpoint.config.hidden_size, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer_id", [0, 1])
def test_a_layer_is_that_of_torch(checkpoint: Checkpoint, family: Family, layer_id: int, dtype: torch.dtype) -> None:
    x = random_rows(checkpoint, NUM_TOKENS, 1, dtype)
    judge = load_trunk_weights(checkpoint, torch.float32, factory=TorchFactory(torch.float32))
    expected = Walk(checkpoint, judge, layer_id, torch.float32)
    found = Walk(checkpoint, load_trunk_weights(checkpoint, dtype, factory=native(dtype, family)[1]), layer_id, dtype)
    assert isinstance(expected.front, TorchFront)
    assert isinstance(found.front, NativeFront)
    theirs, ours = expected.step([(x.float(), 0, BLOCKS)]), found.step([(x, 0, BLOCKS)])
    limit = FLOAT32_RELATIVE_ERROR if dtype == torch.float32 else BFLOAT16_RELATIVE_ERROR
    for name in ("hidden_states", "normed"):
        wanted = getattr(theirs, name)
        assert (getattr(ours, name).float() - wanted).abs().max() <= limit * wanted.abs().max()
    if layer_id > 0 and dtype == torch.float32:
        assert torch.equal(ours.topk_ids, theirs.topk_ids)
        torch.testing.assert_close(ours.topk_weights, theirs.topk_weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpoint", ["v2"], indirect=True)
def test_a_long_chunk_with_expanded_keys_and_values_is_that_of_torch(
    checkpoint: Checkpoint, family: Family, dtype: torch.dtype
) -> None:
    """Behind a context that was computed before, beside a sequence that decodes, by two threads."""
    x, other = random_rows(checkpoint, NUM_TOKENS, 1, dtype), random_rows(checkpoint, 41, 2, dtype)
    judge = load_trunk_weights(checkpoint, torch.float32, factory=TorchFactory(torch.float32))
    kernel, factory = native(dtype, family, expands=True)
    weights = load_trunk_weights(checkpoint, dtype, factory=factory)
    absorbing = load_trunk_weights(checkpoint, dtype, factory=native(dtype, family)[1])
    kernel.set_num_threads_(2)
    found: list[LayerRun] = []
    for walk in (
        Walk(checkpoint, judge, 1, torch.float32),
        *(Walk(checkpoint, w, 1, dtype) for w in (weights, absorbing)),
    ):
        rows, mate = (x, other) if found else (x.float(), other.float())
        walk.step([(rows[:100], 0, BLOCKS), (mate[:40], 0, OTHER_BLOCKS)])
        found.append(walk.step([(mate[40:], 40, OTHER_BLOCKS), (rows[100:], 100, BLOCKS)]))
    theirs, ours, absorbed = found
    limit = FLOAT32_RELATIVE_ERROR if dtype == torch.float32 else BFLOAT16_RELATIVE_ERROR
    for name in ("hidden_states", "normed"):
        wanted = getattr(theirs, name)
        assert (getattr(ours, name).float() - wanted).abs().max() <= limit * wanted.abs().max()
    assert torch.equal(ours.hidden_states[0], absorbed.hidden_states[0])
    assert not torch.equal(ours.hidden_states[1:], absorbed.hidden_states[1:])  # it really went the other way


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_every_step(checkpoint: Checkpoint, family: Family, dtype: torch.dtype) -> None:
    """Prefilled whole by one thread, or in pieces down to a token, beside others, by two."""
    kernel, factory = native(dtype, family)
    weights = load_trunk_weights(checkpoint, dtype, factory=factory)
    x, other = random_rows(checkpoint, NUM_TOKENS, 1, dtype), random_rows(checkpoint, NUM_TOKENS, 2, dtype)
    kernel.set_num_threads_(1)
    whole = Rows.of(Walk(checkpoint, weights, 1, dtype).step([(x, 0, BLOCKS)]))
    kernel.set_num_threads_(2)
    walk, start = Walk(checkpoint, weights, 1, dtype), 0
    for size in (100, 1, 7, 380, 20, 1, 3, 1, 17):
        span = (x[start : start + size], start, BLOCKS)
        mate = (other[start : start + 5], start, OTHER_BLOCKS)
        # The mate's rows before these are garbage, which must not matter; every other step it comes first.
        if size % 2 == 0:
            found = Rows.of(walk.step([span]))
        elif start == 100:
            found = Rows.of(walk.step([span, (other[:60], 0, OTHER_BLOCKS)]), 0, size)
        else:
            found = Rows.of(walk.step([mate, span]), 5)
        for ours, expected in zip(found, whole, strict=True):
            assert torch.equal(ours, expected[start : start + size])
        start += size
    assert start == NUM_TOKENS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_only_fill_the_cache_are_context_like_any(
    checkpoint: Checkpoint, family: Family, dtype: torch.dtype
) -> None:
    weights = load_trunk_weights(checkpoint, dtype, factory=native(dtype, family)[1])
    x = random_rows(checkpoint, NUM_TOKENS, 1, dtype)
    whole = Rows.of(Walk(checkpoint, weights, 1, dtype).step([(x, 0, BLOCKS)]), NUM_TOKENS - 1)
    walk = Walk(checkpoint, weights, 1, dtype)
    filled = walk.step([(x, 0, BLOCKS)], cache_only=True)
    assert torch.equal(filled.hidden_states, x)
    last = Rows.of(walk.step([(x[-1:], NUM_TOKENS - 1, BLOCKS)]))
    for found, expected in zip(last, whole, strict=True):
        assert torch.equal(found, expected)


def test_of_equal_scores_the_lower_expert_is_chosen(tmp_path: Path, family: Family) -> None:
    """With the gate's weights all zero every score is 0.5: the first of the first groups, as torch's stable order."""
    write_random_checkpoint(tmp_path, seed=2, topk_method="noaux_tc")
    checkpoint = Checkpoint(tmp_path)
    x = random_rows(checkpoint, 3, 3, torch.float32)
    for factory in (native(torch.float32, family)[1], TorchFactory(torch.float32)):
        weights = load_trunk_weights(checkpoint, torch.float32, factory=_WithoutGate(factory))
        gate = weights.layers[1].gate
        assert gate is not None
        assert gate.e_score_correction_bias is not None
        gate.e_score_correction_bias.zero_()
        run = Walk(checkpoint, weights, 1, torch.float32).step([(x, 0, BLOCKS)])
        config = checkpoint.config
        assert run.topk_ids.tolist() == [list(range(config.num_experts_per_tok))] * 3


class _WithoutGate:
    """A factory whose gates are zero."""

    def __init__(self, factory: LinearFactory) -> None:
        self.linear, self.mlp, self.per_head = factory.linear, factory.mlp, factory.per_head
        self._factory = factory

    def gate(self, weight: Tensor) -> Any:
        return self._factory.gate(torch.zeros_like(weight))
