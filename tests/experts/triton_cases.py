"""What the Triton kernels must compute, run by Triton's interpreter on the CPU: test_triton_kernels.py starts it.

Needs TRITON_INTERPRET=1 before triton is first imported, hence a process of its own. The interpreter multiplies with
numpy and reads the NaN of e4m3 as 480, so order and NaN of the FP8 tensor core are for tests/gpu.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from experts.checkpoint import Checkpoint
from experts.device import CPU
from experts.errors import NotEnoughMemory
from experts.expert_range import ExpertRange
from experts.group import ExpertGroup
from experts.kernels.block_quantized import BlockScaledMatrix
from experts.kernels.cpu_ffn import ScaledWeight
from experts.kernels.row_plan import PlanLayout, plan_rows
from experts.kernels.tile_table import KernelChoice, WeightPath
from experts.kernels.triton_ffn import expert_ffn, launch_ffn, view_plan
from experts.kernels.triton_gemm import decode_e4m3
from experts.kernels.triton_kernel import TritonKernel, compile_lines
from experts.kernels.triton_linear import HeadRows, block_scaled_linear, head_linear
from experts.kernels.triton_quantize import quantize_rows
from experts.quantization import quantize_block
from experts.weights import ExpertWeights, load_expert_weights
from experts.wire import decode_request, encode_request
from router.device_linear import DeviceFactory, Fp8Linear, Fp8PerHead
from router.linear import TorchFactory
from tests.experts.random_experts import (
    Frame,
    RandomExperts,
    compute_expected,
    make_experts,
    make_frame,
    relative_error,
    round_activations,
)
from tests.experts.reference import dequantize_reference
from tests.random_checkpoint import write_random_checkpoint
from tests.tolerances import KERNEL_RELATIVE_ERROR

BLOCK = (128, 128)
DECODING = KernelChoice((8, 0), WeightPath.W8A16)
IN_FP8 = KernelChoice((8, 9), WeightPath.W8A8)
PATHS = pytest.mark.parametrize("choice", [DECODING, IN_FP8], ids=["w8a16", "w8a8"])


@pytest.fixture(scope="module")
def experts() -> RandomExperts:
    """Ids with gaps; two blocks in every direction, the last one partial."""
    return make_experts([2, 3, 7], hidden_size=192, inner_size=160)


@triton.jit
def _decode_all(byte_ptr, half_ptr):
    index = tl.arange(0, 256)
    tl.store(half_ptr + index, decode_e4m3(tl.load(byte_ptr + index)))


def run(experts: RandomExperts, frame: Frame, choice: KernelChoice, *, exact: bool) -> torch.Tensor:
    return expert_ffn(*frame, experts.stack, choice, exact=exact)


def test_every_byte_is_decoded_exactly_nan_included() -> None:
    byte = torch.arange(256, dtype=torch.uint8)
    half = torch.empty(256, dtype=torch.float16)
    _decode_all[(1,)](byte, half)
    expected = byte.view(torch.float8_e4m3fn).to(torch.float32)
    torch.testing.assert_close(half.to(torch.float32) * 256, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.signbit(half[0x80]) and not torch.signbit(half[0])


def test_rows_are_quantised_as_published() -> None:
    x = torch.randn(5, 1, 300) * torch.logspace(-7, 7, 5).view(5, 1, 1)
    x[0] = 0.0
    values, scales = quantize_rows(x, WeightPath.W8A8, 128)
    padded = torch.nn.functional.pad(x[:, 0], (0, 84)).view(5, 3, 128)
    assert torch.equal(scales[:, 0], padded.abs().amax(dim=2).clamp_min(1e-4) / 448)
    restored = values[:, 0].to(torch.float32) * scales[:, 0].repeat_interleave(128, dim=1)[:, :300]
    assert torch.equal(restored, round_activations(x[:, 0], 128))


def test_halves_between_two_values_of_e4m3_go_to_the_even_one() -> None:
    values = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
    halves = torch.cat([(values[1:] + values[:-1]) / 2, -values[1:]])
    # 448 first makes the scale of each block 1.
    x = torch.cat([torch.full((2, 1), 448.0), halves.view(2, -1)], dim=1)
    assert x.shape[1] <= 128
    quantized, scales = quantize_rows(x.unsqueeze(1), WeightPath.W8A8, 128)
    assert torch.equal(scales.flatten(), torch.ones(2))
    assert torch.equal(quantized[:, 0].view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8))


def test_scaling_to_fp16_keeps_bf16_exactly_at_any_magnitude() -> None:
    x = (torch.randn(6, 1, 200) * torch.logspace(-20, 20, 6).view(6, 1, 1)).to(torch.bfloat16)
    values, scales = quantize_rows(x, WeightPath.W8A16, 128)
    restored = values.to(torch.float32) * (scales / 256).repeat_interleave(128, dim=2)[..., :200]
    # Far below a block's largest value fp16 runs out of exponent.
    largest = x.to(torch.float32).abs().amax(dim=2, keepdim=True)
    assert bool(((restored - x.to(torch.float32)).abs() <= largest * 2**-24).all())


@PATHS
@pytest.mark.parametrize("exact", [False, True], ids=["reduced", "exact"])
def test_uneven_rows_match_the_reference(experts: RandomExperts, choice: KernelChoice, exact: bool) -> None:
    # More rows than one tile, one row, and none.
    frame = make_frame(experts, {2: list(range(18)), 7: [4]}, num_rows=20)
    result = run(experts, frame, choice, exact=exact)
    expected = compute_expected(experts, frame, choice.path, exact=exact)
    assert result.shape == expected.shape and result.dtype == torch.float32
    assert relative_error(result, expected) <= KERNEL_RELATIVE_ERROR
    if not exact:
        assert not result[18:].any()


@PATHS
def test_the_tiles_for_many_rows_match_the_reference(experts: RandomExperts, choice: KernelChoice) -> None:
    frame = make_frame(experts, {3: list(range(70))}, num_rows=70)
    result = run(experts, frame, choice, exact=False)
    assert relative_error(result, compute_expected(experts, frame, choice.path, exact=False)) <= KERNEL_RELATIVE_ERROR


@PATHS
@pytest.mark.parametrize(
    ("hidden_size", "inner_size", "block"), [(128, 256, (128, 128)), (144, 80, (48, 32)), (16, 8, (128, 128))]
)
def test_other_sizes_and_blocks(
    choice: KernelChoice, hidden_size: int, inner_size: int, block: tuple[int, int]
) -> None:
    experts = make_experts([0, 1], hidden_size, inner_size, block)
    frame = make_frame(experts, {0: [0, 1, 2], 1: [1, 3]}, num_rows=4)
    result = run(experts, frame, choice, exact=True)
    assert relative_error(result, compute_expected(experts, frame, choice.path, exact=True)) <= KERNEL_RELATIVE_ERROR


def test_pairs_are_added_in_ascending_expert_order(experts: RandomExperts) -> None:
    frame = make_frame(experts, {2: [0, 1, 2], 3: [0, 2], 7: [0, 1]}, num_rows=3)
    pairs = run(experts, frame, DECODING, exact=True)
    expected = torch.zeros(3, 192)
    for pair, row in enumerate(frame.pair_rows.tolist()):
        expected[row] += pairs[pair]
    assert torch.equal(run(experts, frame, DECODING, exact=False), expected)


@PATHS
def test_a_row_has_the_same_bits_alone_and_among_others(experts: RandomExperts, choice: KernelChoice) -> None:
    frame = make_frame(experts, {2: list(range(9)), 3: [2, 5]}, num_rows=9)
    together = run(experts, frame, choice, exact=True)
    alone = frame.pair_rows == 5
    row = Frame(frame.hidden_states[5:6], np.zeros(2, np.int32), frame.pair_experts[alone], frame.pair_weights[alone])
    assert torch.equal(run(experts, row, choice, exact=True), together[torch.from_numpy(alone)])


@pytest.mark.parametrize("exact", [False, True], ids=["reduced", "exact"])
def test_a_plan_laid_out_for_more_has_the_same_bits(experts: RandomExperts, exact: bool) -> None:
    """What a captured CUDA graph replays: a grid for more tiles, rows and pairs than the frame has."""
    frame = make_frame(experts, {2: [0, 1, 2], 7: [1]}, num_rows=3)
    line = DECODING.lines[0]
    local_experts = np.searchsorted(experts.stack.expert_ids, frame.pair_experts)
    plan = plan_rows(frame.pair_rows, local_experts, 3, line.block_rows)
    layout = PlanLayout(num_rows=6, num_pairs=11, num_tiles=5)
    packed = torch.from_numpy(layout.pack(plan, frame.pair_weights))
    hidden_states = torch.full((6, 192), float("nan"))
    hidden_states[:3] = frame.hidden_states
    result = torch.full((11 if exact else 6, 192), -1.0)
    launch_ffn(hidden_states, view_plan(layout, packed), experts.stack, DECODING, line, result, exact=exact)
    assert torch.equal(result[: 4 if exact else 3], run(experts, frame, DECODING, exact=exact))
    assert exact or not result[3:].any()


@PATHS
def test_lines_are_compiled_without_a_frame(experts: RandomExperts, choice: KernelChoice) -> None:
    compile_lines(experts.stack, choice, torch.bfloat16)


def test_a_frame_without_pairs_is_zero(experts: RandomExperts) -> None:
    frame = make_frame(experts, {}, num_rows=2)
    assert torch.equal(run(experts, frame, DECODING, exact=False), torch.zeros(2, 192))
    assert run(experts, frame, DECODING, exact=True).shape == (0, 192)


@PATHS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_spoils_no_other(experts: RandomExperts, choice: KernelChoice, value: float) -> None:
    frame = make_frame(experts, {3: [0, 1, 2]}, num_rows=3)
    clean = run(experts, frame, choice, exact=True)
    frame.hidden_states[1, 17] = value
    spoiled = run(experts, frame, choice, exact=True)
    assert bool(spoiled[1].isnan().all())
    assert torch.equal(spoiled[[0, 2]], clean[[0, 2]])


def test_a_nan_byte_of_a_weight_is_nan_and_not_480() -> None:
    experts = make_experts([0, 1], 64, 64)
    experts.stack.down[1, 5, 9] = 0xFF
    frame = make_frame(experts, {0: [0], 1: [0]}, num_rows=1)
    result = run(experts, frame, DECODING, exact=True)
    assert bool(result[1, 5].isnan()) and result.isnan().sum() == 1


@PATHS
@pytest.mark.parametrize("num_rows", [1, 19])
def test_a_linear_map_with_partial_blocks(choice: KernelChoice, num_rows: int) -> None:
    quantized, scale_inv = quantize_block(torch.randn(200, 176), BLOCK)
    matrix = BlockScaledMatrix.from_fp8(quantized, scale_inv, BLOCK, "cpu")
    x = torch.randn(num_rows, 176)
    result = block_scaled_linear(x, matrix, choice)
    seen = x if choice.path is WeightPath.W8A16 else round_activations(x, 128)
    expected = seen @ dequantize_reference(quantized, scale_inv, BLOCK).T
    assert result.dtype == torch.float32 and relative_error(result, expected) <= KERNEL_RELATIVE_ERROR
    rounded = block_scaled_linear(x, matrix, choice, out_dtype=torch.float16)
    assert torch.equal(rounded, result.to(torch.float16))


@pytest.mark.parametrize(("nope", "v"), [(128, 128), (96, 80)], ids=["heads on blocks", "heads inside blocks"])
def test_heads_of_the_absorbed_projection(nope: int, v: int) -> None:
    num_heads, rank = 3, 144
    quantized, scale_inv = quantize_block(torch.randn(num_heads * (nope + v), rank), BLOCK)
    matrix = BlockScaledMatrix.from_fp8(quantized, scale_inv, BLOCK, "cpu")
    by_head = dequantize_reference(quantized, scale_inv, BLOCK).view(num_heads, nope + v, rank)

    # The queries are a slice of a wider tensor, as the trunk has them.
    queries = torch.randn(5, num_heads, nope + 64)[..., :nope]
    w_uk = HeadRows(num_heads, nope + v, 0, nope)
    absorbed = head_linear(queries, matrix, w_uk, IN_FP8, transposed=True)
    expected = torch.einsum("thn,hnl->thl", queries, by_head[:, :nope])
    assert relative_error(absorbed, expected) <= KERNEL_RELATIVE_ERROR

    latents = torch.randn(5, num_heads, rank)
    w_uv = HeadRows(num_heads, nope + v, nope, v)
    values = head_linear(latents, matrix, w_uv, IN_FP8, transposed=False)
    expected = torch.einsum("thl,hvl->thv", latents, by_head[:, nope:])
    assert relative_error(values, expected) <= KERNEL_RELATIVE_ERROR


def test_heads_that_reach_past_the_matrix_are_refused() -> None:
    quantized, scale_inv = quantize_block(torch.randn(256, 64), BLOCK)
    matrix = BlockScaledMatrix.from_fp8(quantized, scale_inv, BLOCK, "cpu")
    with pytest.raises(ValueError, match="reach to row 384 of a matrix of 256"):
        head_linear(torch.randn(1, 3, 64), matrix, HeadRows(3, 128, 0, 128), DECODING, transposed=False)


@PATHS
def test_the_routers_products_keep_fp8_and_agree_with_expanded_ones(choice: KernelChoice) -> None:
    factory, judge = DeviceFactory(CPU, choice, torch.bfloat16), TorchFactory(torch.float32)

    def make(rows: int, columns: int) -> ScaledWeight:
        return ScaledWeight(*quantize_block(torch.randn(rows, columns) * columns**-0.5, BLOCK), BLOCK)

    def check(found: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
        assert found.shape == expected.shape
        assert float((found.float() - expected).norm() / expected.norm()) <= bound

    x = torch.randn(3, 192).to(torch.bfloat16)
    # Rows and inner values are rounded to e4m3's 4 bits on one path, results to bf16's 8 on both.
    bound = 0.005 if choice.path is WeightPath.W8A16 else 0.06
    first, second = make(160, 192), make(72, 192)
    linear = factory.linear(first, second)
    assert isinstance(linear, Fp8Linear)
    check(linear(x), judge.linear(first, second)(x.float()), bound)
    assert linear(x, torch.float32).dtype == torch.float32 and linear(x).dtype == torch.bfloat16
    gate, up, down = make(160, 192), make(160, 192), make(192, 160)
    found = factory.mlp(gate, up, down)(x)
    assert found.dtype == torch.float32
    check(found, judge.mlp(gate, up, down)(x.float()), bound)
    kv_b = make(2 * (32 + 24), 144)
    rows = torch.randn(3, 2, 32).to(torch.bfloat16), torch.randn(3, 2, 144).to(torch.bfloat16)
    for product, judged, row in zip(factory.per_head(kv_b, 2, 32), judge.per_head(kv_b, 2, 32), rows, strict=True):
        assert isinstance(product, Fp8PerHead)
        check(product(row), judged(row.float()), 0.005)


def test_what_is_not_fp8_is_multiplied_by_torch() -> None:
    factory = DeviceFactory(CPU, IN_FP8, torch.bfloat16)
    weight = torch.randn(24, 16).to(torch.bfloat16)
    x = torch.randn(2, 16).to(torch.bfloat16)
    found = factory.linear(ScaledWeight(weight))(x, torch.float32)
    torch.testing.assert_close(found, x.float() @ weight.float().T, rtol=0.02, atol=0.02)
    assert factory.gate(weight.float())(x.float()).dtype == torch.float32
    down = ScaledWeight(torch.randn(16, 24).to(torch.bfloat16))
    assert factory.mlp(ScaledWeight(weight), ScaledWeight(weight), down)(x).dtype == torch.float32
    # float32 is for comparing: FP8 matrices are expanded.
    stored = ScaledWeight(*quantize_block(torch.randn(24, 16), BLOCK), BLOCK)
    exact = DeviceFactory(CPU, IN_FP8, torch.float32).linear(stored)
    torch.testing.assert_close(exact(x.float()), TorchFactory(torch.float32).linear(stored)(x.float()))


SIZES: dict[str, Any] = {"hidden_size": 192, "moe_intermediate_size": 160, "n_routed_experts": 8, "n_group": 2}


@pytest.fixture(scope="module")
def fp8_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("checkpoint") / "fp8"
    write_random_checkpoint(folder, fp8=True, topk_group=1, **SIZES)
    return Checkpoint(folder)


def load(checkpoint: Checkpoint, choice: KernelChoice, hosted: list[ExpertRange]) -> ExpertWeights:
    kernel = TritonKernel(CPU, choice, torch.bfloat16, BLOCK, use_graphs=False)
    return load_expert_weights(checkpoint, hosted, torch.bfloat16, kernel=kernel)


@PATHS
def test_a_group_loads_and_answers_as_on_a_card(fp8_checkpoint: Checkpoint, choice: KernelChoice) -> None:
    """From the file's bytes to the answer: packing, layers of different experts, what a router sends and gets."""
    weights = load(fp8_checkpoint, choice, [ExpertRange(1, 2, 0, 8), ExpertRange(2, 3, 4, 6)])
    assert {layer_id: list(layer) for layer_id, layer in weights.layers.items()} == {1: list(range(8)), 2: [4, 5]}
    assert weights.resident_bytes == sum(
        part.nbytes
        for layer in weights.layers.values()
        for part in (layer.stack.gate_up, layer.stack.gate_up_scale, layer.stack.down, layer.stack.down_scale)  # type: ignore[attr-defined]
    )
    assert weights.kernel.numerics_id.startswith(f"cuda-{choice.describe()}/bfloat16/triton-")
    group = ExpertGroup(weights)
    for layer_id, chosen in ((1, [[0, 3], [3, 7]]), (2, [[4, 5], [4, 5]])):
        frame = decode_request(
            encode_request(
                frame_id=1, incarnation=1, table_version=1, layer_id=layer_id, exact=False, deadline_ms=1000,
                hidden_states=torch.randn(2, 192).to(torch.bfloat16),
                pair_rows=torch.tensor([0, 0, 1, 1], dtype=torch.int32),
                pair_experts=torch.tensor(chosen, dtype=torch.int32).flatten(),
                pair_weights=torch.tensor([0.5, 0.25, 1.0, 0.125]),
            )
        )  # fmt: skip
        matrices = {
            expert_id: tuple(
                fp8_checkpoint.read_weight(
                    f"model.layers.{layer_id}.mlp.experts.{expert_id}.{name}_proj.weight", shape, torch.float32
                )
                for name, shape in {"gate": (160, 192), "up": (160, 192), "down": (192, 160)}.items()
            )
            for expert_id in {*chosen[0], *chosen[1]}
        }
        judged = RandomExperts(weights.layers[layer_id].stack, matrices)  # type: ignore[attr-defined, arg-type]
        pairs = Frame(frame.hidden_states.float(), frame.pair_rows, frame.pair_experts, frame.pair_weights)
        expected = compute_expected(judged, pairs, choice.path, exact=False)
        # The answer is rounded to bf16's 8 bits.
        assert relative_error(group.compute(frame), expected) <= KERNEL_RELATIVE_ERROR + 2**-8


def test_experts_of_a_layer_must_be_packed_together(fp8_checkpoint: Checkpoint) -> None:
    weights = load(fp8_checkpoint, DECODING, [ExpertRange(1, 2, 0, 3)])
    kernel = weights.kernel
    room = kernel.reserve(3, 192, 160, torch.float8_e4m3fn)
    stored = quantize_block(torch.randn(160, 192), BLOCK)
    turned = quantize_block(torch.randn(192, 160), BLOCK)
    placed = [
        kernel.pack_expert(ScaledWeight(*stored), ScaledWeight(*stored), ScaledWeight(*turned), room) for _ in range(3)
    ]
    assert list(kernel.build_layer({4: placed[1], 9: placed[2]})) == [4, 9]
    with pytest.raises(ValueError, match="one after the other"):
        kernel.build_layer({0: placed[0], 2: placed[2]})


def test_what_a_launch_takes_is_asked_for_before_loading(
    fp8_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[torch.device, int]] = []

    def refuse(device: torch.device, needed_bytes: int, what: str, remedy: str) -> None:
        asked.append((device, needed_bytes))
        raise NotEnoughMemory(what)

    monkeypatch.setattr("experts.weights.check_device_memory", refuse)
    with pytest.raises(NotEnoughMemory):
        load(fp8_checkpoint, IN_FP8, [ExpertRange(1, 2, 0, 3)])
    # Weights as stored, and beside them at least the fp32 rows of 8,192 pairs.
    assert asked == [(CPU, asked[0][1])] and asked[0][1] > 3 * 3 * 192 * 160 + 8192 * 4 * (192 + 160)
