"""The CPU kernel: every byte exact, within tolerance of the judge, and a row's bits its own in every family."""

from __future__ import annotations

import gc
import itertools
import logging
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from experts.kernels import cpu_build, cpu_ffn
from experts.kernels.cpu_build import CompilerMissing, find_or_build_library
from experts.kernels.cpu_ffn import (
    FAMILIES,
    CpuKernel,
    Family,
    PackedLayer,
    ScaledWeight,
    WeightArena,
    can_pack,
    load_cpu_kernel,
    packed_size,
)
from experts.quantization import dequantize_block, quantize_block
from tests.experts.reference import expert_ffn_reference
from tests.tolerances import FLOAT32_RELATIVE_ERROR, KERNEL_RELATIVE_ERROR

# Partial blocks of scales, partial panels, and an odd number of columns.
AWKWARD_SIZES = ((192, 160), (100, 36), (257, 129))
WEIGHT_DTYPES = (torch.float8_e4m3fn, torch.bfloat16, torch.float32)
NUM_EXPERTS = 3


def _supported(family: Family) -> bool:
    try:
        return load_cpu_kernel(torch.bfloat16, family=family) is not None
    except ValueError:
        return False


pytestmark = pytest.mark.skipif(load_cpu_kernel(torch.bfloat16) is None, reason="no C++ compiler here")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    if not _supported(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    return request.param


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield
    _kernel().set_num_threads_(1)


def _kernel(family: Family | None = None, dtype: torch.dtype = torch.bfloat16) -> CpuKernel:
    kernel = load_cpu_kernel(dtype, family=family)
    assert kernel is not None
    return kernel


def _random_weight(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> ScaledWeight:
    values = torch.randn(shape, generator=generator) / shape[1] ** 0.5
    if dtype == torch.float8_e4m3fn:
        return ScaledWeight(*quantize_block(values, (128, 128)))
    return ScaledWeight(values.to(dtype))


def _expand(weight: ScaledWeight) -> torch.Tensor:
    if weight.scale_inv is None:
        return weight.weight.float()
    return dequantize_block(weight.weight, weight.scale_inv, weight.block)


def _make_layer(
    kernel: CpuKernel, hidden: int, inner: int, dtype: torch.dtype, seed: int = 0
) -> tuple[PackedLayer, dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """NUM_EXPERTS experts with ids 2, 4, 6, and the same in fp32."""
    generator = torch.Generator().manual_seed(seed)
    packed, expanded = {}, {}
    for expert in range(2, 2 + 2 * NUM_EXPERTS, 2):
        gate, up, down = (
            _random_weight(shape, dtype, generator) for shape in ((inner, hidden), (inner, hidden), (hidden, inner))
        )
        packed[expert] = kernel.pack_expert(gate, up, down)
        expanded[expert] = (_expand(gate), _expand(up), _expand(down))
    return PackedLayer(packed), expanded


def _all_pairs(num_rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every row with every expert of _make_layer."""
    rows = np.repeat(np.arange(num_rows, dtype=np.int32), NUM_EXPERTS)
    experts = np.tile(np.arange(2, 2 + 2 * NUM_EXPERTS, 2, dtype=np.int32), num_rows)
    return rows, experts, np.random.default_rng(seed).random(len(rows), dtype=np.float32)


def _compute_reference(
    x: torch.Tensor,
    pairs: tuple[np.ndarray, np.ndarray, np.ndarray],
    expanded: Mapping[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    *,
    exact: bool,
) -> torch.Tensor:
    rows, experts, weights = (torch.from_numpy(part) for part in pairs)
    return expert_ffn_reference(x, rows, experts, weights, expanded, exact=exact)


def _compute_with_rounded_inner(
    x: torch.Tensor,
    pairs: tuple[np.ndarray, np.ndarray, np.ndarray],
    expanded: Mapping[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    *,
    exact: bool,
) -> torch.Tensor:
    """The reference with inner activations in bf16, as a family keeps them that has no time for more."""
    result = torch.zeros(len(pairs[0]) if exact else len(x), x.shape[1])
    for at, (row, expert, weight) in enumerate(zip(*(part.tolist() for part in pairs), strict=True)):
        gate, up, down = expanded[expert]
        inner = torch.nn.functional.silu(gate @ x[row].float()) * (up @ x[row].float())
        result[at if exact else row] += down @ inner.to(torch.bfloat16).float() * weight
    return result


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_fp8_byte_is_converted_exactly_wherever_it_lies(family: Family, dtype: torch.dtype) -> None:
    kernel = _kernel(family, dtype)
    rows, columns = 150, 200
    codes = torch.randint(0, 256, (rows, columns), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    codes.view(-1)[:256] = torch.arange(256, dtype=torch.uint8).masked_fill(torch.arange(256) % 128 == 127, 1)
    weight = codes.view(torch.float8_e4m3fn)
    scales = torch.tensor([[0.5, 4.0], [2.0**-20, 1.0]])
    packed = kernel.pack_linear(ScaledWeight(weight, scales))

    result = kernel.linear(torch.eye(columns), packed, torch.float32)

    assert torch.equal(result.T, dequantize_block(weight, scales, (128, 128)))
    for num_rows in range(1, 10):  # few rows decode on their own ways
        some = torch.eye(columns)[100 : 100 + num_rows]
        assert torch.equal(kernel.linear(some, packed, torch.float32), result[100 : 100 + num_rows])


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_nan_byte_gives_nan_in_its_own_output_only(family: Family, code: int) -> None:
    kernel = _kernel(family)
    codes = torch.full((40, 130), 0x38, dtype=torch.uint8)
    codes[7, 3] = codes[33, 129] = code
    packed = kernel.pack_linear(ScaledWeight(codes.view(torch.float8_e4m3fn), torch.ones(1, 2)))

    result = kernel.linear(torch.ones(2, 130), packed)

    assert set(result.isnan().nonzero()[:, 1].tolist()) == {7, 33}
    assert result.isnan().sum() == 4


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(512, 384), *AWKWARD_SIZES], ids=str)
def test_float32_activations_agree_with_the_reference_closely(
    family: Family, weight_dtype: torch.dtype, sizes: tuple[int, int]
) -> None:
    kernel = _kernel(family, torch.float32)
    layer, expanded = _make_layer(kernel, *sizes, weight_dtype)
    x = torch.randn(19, sizes[0], generator=torch.Generator().manual_seed(2))
    pairs = _all_pairs(len(x))
    for exact in (False, True):
        result = kernel.expert_ffn(x, *pairs, layer, exact=exact)
        expected = _compute_reference(x, pairs, expanded, exact=exact)
        assert (result - expected).abs().max() <= FLOAT32_RELATIVE_ERROR * expected.abs().max()


@pytest.mark.parametrize("weight_dtype", [torch.float8_e4m3fn, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(1024, 512), *AWKWARD_SIZES], ids=str)
def test_bfloat16_activations_agree_with_the_reference(
    family: Family, weight_dtype: torch.dtype, sizes: tuple[int, int]
) -> None:
    kernel = _kernel(family)
    layer, expanded = _make_layer(kernel, *sizes, weight_dtype)
    x = torch.randn(24, sizes[0], generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)
    pairs = _all_pairs(len(x))
    for exact in (False, True):
        result = kernel.expert_ffn(x, *pairs, layer, exact=exact)
        expected = _compute_reference(x, pairs, expanded, exact=exact)
        share = 0.01  # of the tolerance: what comes in is bf16, inner activations are kept in fp32 or two parts
        if family == "avx512_bf16" and sizes[1] >= 512:
            assert (result - expected).abs().max() <= KERNEL_RELATIVE_ERROR * expected.abs().max()
            expected = _compute_with_rounded_inner(x, pairs, expanded, exact=exact)
            share = 0.2  # a sum that differs in its last bit may round to the other neighbour
        assert (result - expected).abs().max() <= share * KERNEL_RELATIVE_ERROR * expected.abs().max()


def test_huge_and_missing_inner_activations_stay_in_their_row(family: Family) -> None:
    """Inner activations that overflow, or are NaN, have no second part to spoil what the first says."""
    kernel = _kernel(family)
    layer, _ = _make_layer(kernel, 192, 160, torch.float8_e4m3fn)
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(13)).to(torch.bfloat16)
    expected = kernel.expert_ffn(x, *_all_pairs(3), layer, exact=False)
    x[0] *= 1e25
    x[2, 5] = float("nan")
    result = kernel.expert_ffn(x, *_all_pairs(3), layer, exact=False)
    assert torch.equal(result[1], expected[1])
    assert not result[0].isfinite().all()
    assert result[2].isnan().all()


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES, ids=str)
def test_linear_agrees_with_the_reference(family: Family, weight_dtype: torch.dtype) -> None:
    kernel = _kernel(family)
    weight = _random_weight((576, 300), weight_dtype, torch.Generator().manual_seed(5))
    packed = kernel.pack_linear(weight)
    x = torch.randn(2, 35, 300, generator=torch.Generator().manual_seed(6)).to(torch.bfloat16)

    result = kernel.linear(x, packed, torch.float32)

    expected = x.float() @ _expand(weight).T
    assert result.shape == (2, 35, 576)
    assert (result - expected).abs().max() <= FLOAT32_RELATIVE_ERROR * expected.abs().max()
    assert torch.equal(kernel.linear(x, packed), result.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES, ids=str)
def test_a_row_has_the_same_bits_alone_and_among_any_others(
    family: Family, weight_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    kernel = _kernel(family, dtype)
    hidden, inner = 192, 160
    layer, _ = _make_layer(kernel, hidden, inner, weight_dtype)
    matrix = kernel.pack_linear(_random_weight((200, hidden), weight_dtype, torch.Generator().manual_seed(7)))
    row = torch.randn(1, hidden, generator=torch.Generator().manual_seed(8)).to(dtype)
    pairs = _all_pairs(1)
    alone = _bits(kernel.expert_ffn(row, *pairs, layer, exact=False))
    alone_linear = _bits(kernel.linear(row, matrix, torch.float32))

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @example(num_rows=1, position=0, threads=3, seed=0, poison=False)
    @example(num_rows=70, position=69, threads=2, seed=0, poison=True)
    @given(
        num_rows=st.integers(1, 70),
        position=st.integers(0, 69),
        threads=st.integers(1, 3),
        seed=st.integers(0, 1000),
        poison=st.booleans(),
    )
    def check(num_rows: int, position: int, threads: int, seed: int, poison: bool) -> None:
        kernel.set_num_threads_(threads)
        position %= num_rows
        rng = np.random.default_rng(seed)
        x = torch.from_numpy(rng.normal(size=(num_rows, hidden)) * 10.0 ** rng.integers(-3, 4)).to(dtype)
        if poison:
            x[:, ::5] = float("nan")
        x[position] = row[0]
        keep = rng.random((num_rows, NUM_EXPERTS)) < 0.6  # neighbours choose some experts
        keep[position] = True
        rows, slots = np.nonzero(keep)
        weights = rng.random(len(rows), dtype=np.float32)
        weights[rows == position] = pairs[2]
        among = kernel.expert_ffn(x, rows, 2 + 2 * slots, weights, layer, exact=False)
        assert _bits(among[position]) == alone
        assert _bits(kernel.linear(x, matrix, torch.float32)[position]) == alone_linear

    check()


def test_every_number_of_rows_and_threads_gives_the_same_bits(family: Family) -> None:
    """Large enough that the work is spread over the threads."""
    kernel = _kernel(family)
    layer, _ = _make_layer(kernel, 1024, 384, torch.float8_e4m3fn)
    x = torch.randn(150, 1024, generator=torch.Generator().manual_seed(9)).to(torch.bfloat16)
    pairs = _all_pairs(len(x))
    whole = kernel.expert_ffn(x, *pairs, layer, exact=False)
    counts = (1, 2, 15, 16, 17, 31, 33, 48, 49, 63, 64, 65, 97, 129, 150)
    for num_rows, threads in zip(counts, itertools.cycle((3, 1, 2))):
        kernel.set_num_threads_(threads)
        rows, experts, weights = (part[: num_rows * NUM_EXPERTS] for part in pairs)
        assert torch.equal(
            kernel.expert_ffn(x[:num_rows], rows, experts, weights, layer, exact=False), whole[:num_rows]
        ), num_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joined_norms_are_multiplied_as_if_one_by_one(family: Family, dtype: torch.dtype) -> None:
    """Of a table's rows and others, whose width is no whole vector."""
    kernel, generator = _kernel(family, dtype), torch.Generator().manual_seed(3)
    matrix = kernel.pack_linear(_random_weight((70, 2 * 152), torch.bfloat16, generator))
    table, x = (torch.randn(rows, 152, generator=generator).to(dtype) for rows in (40, 19))
    weights = torch.rand(152, generator=generator), torch.rand(152, generator=generator)
    ids = torch.randint(0, 40, (19,), generator=generator)
    normed = [kernel.rms_norm(rows, weight, 1e-6) for rows, weight in zip((table[ids], x), weights, strict=True)]
    expected = kernel.linear(torch.cat(normed, dim=-1), matrix)
    assert torch.equal(kernel.join(matrix, table, ids, x, weights, 1e-6), expected)
    with pytest.raises(ValueError):
        kernel.join(matrix, table, ids, x[:, :100].contiguous(), weights, 1e-6)


def test_exact_rows_added_in_expert_order_are_the_reduced_rows(family: Family) -> None:
    kernel = _kernel(family)
    layer, _ = _make_layer(kernel, 192, 160, torch.float8_e4m3fn)
    x = torch.randn(9, 192, generator=torch.Generator().manual_seed(10)).to(torch.bfloat16)
    rows, experts, weights = _all_pairs(len(x))
    exact = kernel.expert_ffn(x, rows, experts, weights, layer, exact=True)
    reduced = kernel.expert_ffn(x, rows, experts, weights, layer, exact=False)
    total = torch.zeros_like(reduced)
    for pair, row in enumerate(rows):
        total[row] += exact[pair]
    assert torch.equal(total, reduced)


def test_rows_without_a_pair_are_zero_and_experts_without_rows_cost_nothing(family: Family) -> None:
    kernel = _kernel(family)
    layer, _ = _make_layer(kernel, 192, 160, torch.float8_e4m3fn)
    x = torch.randn(5, 192).to(torch.bfloat16)
    one = (np.array([3]), np.array([4]), np.array([0.5], dtype=np.float32))
    result = kernel.expert_ffn(x, *one, layer, exact=False)
    assert not result[[0, 1, 2, 4]].any()
    assert torch.equal(result[3:4], kernel.expert_ffn(x, *one, layer, exact=True))
    nothing = (one[0][:0], one[1][:0], one[2][:0])
    assert not kernel.expert_ffn(x, *nothing, layer, exact=False).any()
    assert kernel.expert_ffn(x, *nothing, layer, exact=True).shape == (0, 192)


def test_more_pairs_than_a_batch_holds_are_added_in_the_same_order() -> None:
    kernel = _kernel()
    layer, _ = _make_layer(kernel, 64, 32, torch.float8_e4m3fn)
    x = torch.randn(3000, 64, generator=torch.Generator().manual_seed(11)).to(torch.bfloat16)
    rows, experts, weights = _all_pairs(len(x))
    whole = kernel.expert_ffn(x, rows, experts, weights, layer, exact=False)
    part = slice(2990 * NUM_EXPERTS, 3000 * NUM_EXPERTS)
    some = kernel.expert_ffn(x[2990:], rows[part] - 2990, experts[part], weights[part], layer, exact=False)
    assert torch.equal(whole[2990:], some)


def test_calls_from_several_threads_take_turns() -> None:
    kernel = _kernel()
    kernel.set_num_threads_(2)
    layer, _ = _make_layer(kernel, 512, 256, torch.float8_e4m3fn)
    inputs = [torch.randn(n, 512, generator=torch.Generator().manual_seed(n)).to(torch.bfloat16) for n in range(1, 9)]

    def compute(x: torch.Tensor) -> torch.Tensor:
        return kernel.expert_ffn(x, *_all_pairs(len(x)), layer, exact=False)

    expected = [compute(x) for x in inputs]
    with ThreadPoolExecutor(4) as executor:
        for _ in range(5):
            for result, wanted in zip(executor.map(compute, inputs, timeout=60), expected, strict=True):
                assert torch.equal(result, wanted)


def test_inputs_that_do_not_fit_are_refused() -> None:
    kernel = _kernel()
    layer, _ = _make_layer(kernel, 64, 32, torch.float8_e4m3fn)
    x, weight = torch.zeros(2, 64, dtype=torch.bfloat16), np.ones(1, dtype=np.float32)
    refused: list[tuple[str, Callable[[], object]]] = [
        ("not in this layer", lambda: kernel.expert_ffn(x, np.array([0]), np.array([3]), weight, layer, exact=False)),
        ("not in this layer", lambda: kernel.expert_ffn(x, np.array([0]), np.array([-1]), weight, layer, exact=False)),
        ("not in this layer", lambda: kernel.expert_ffn(x, np.array([0]), np.array([99]), weight, layer, exact=False)),
        ("out of range", lambda: kernel.expert_ffn(x, np.array([2]), np.array([2]), weight, layer, exact=False)),
        ("hidden size", lambda: kernel.expert_ffn(x[:, :32], np.array([0]), np.array([2]), weight, layer, exact=True)),
        ("does not fit", lambda: kernel.linear(x, layer[2].gate_up)),
        ("does not fit", lambda: kernel.linear(x[:, :10], layer[2].down)),
        ("scales", lambda: kernel.pack_linear(ScaledWeight(torch.zeros(4, 4).to(torch.float8_e4m3fn)))),
        ("no weights of", lambda: kernel.pack_linear(ScaledWeight(torch.zeros(4, 4, dtype=torch.float16)))),
        ("family", lambda: load_cpu_kernel(torch.bfloat16, family="sse2")),  # type: ignore[arg-type]
    ]
    for message, call in refused:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(MemoryError, match="arena"):
        kernel.pack_linear(ScaledWeight(torch.zeros(64, 64, dtype=torch.bfloat16)), WeightArena(4096))


def test_published_experts_take_less_than_five_percent_more_than_their_bytes() -> None:
    fp8 = torch.float8_e4m3fn
    size = packed_size((2048, 7168), fp8, paired=True) + packed_size((7168, 2048), fp8)
    assert 1.0 <= size / (3 * 2048 * 7168) < 1.005
    assert can_pack(fp8, (128, 128))
    assert not can_pack(fp8, (128, 64))


def test_packed_matrices_keep_their_memory() -> None:
    kernel = _kernel()
    arena = WeightArena(packed_size((576, 300), torch.bfloat16))
    weight = _random_weight((576, 300), torch.bfloat16, torch.Generator().manual_seed(12))
    packed = kernel.pack_linear(weight, arena)
    del arena
    x = torch.ones(1, 300)
    assert torch.equal(kernel.linear(x, packed), kernel.linear(x, kernel.pack_linear(weight)))


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="memory cannot be given back here")
def test_a_matrix_gives_its_pages_back_and_leaves_its_neighbours_alone() -> None:
    kernel = _kernel()
    weights = [ScaledWeight(torch.ones(256, 512, dtype=torch.bfloat16)) for _ in range(3)]
    arena = WeightArena(sum(packed_size((256, 512), torch.bfloat16) for _ in weights), huge_pages=False)
    matrices = [kernel.pack_linear(weight, arena) for weight in weights]
    for matrix in matrices:
        arena.discard_with(matrix)
    pages = matrices[1].memory
    del matrices[1], matrix
    gc.collect()
    assert not pages.any()
    x = torch.ones(1, 512, dtype=torch.bfloat16)
    for matrix in matrices:
        assert torch.equal(kernel.linear(x, matrix), torch.full((1, 256), 512.0, dtype=torch.bfloat16))


def test_numerics_id_names_family_and_dtype_and_no_threads() -> None:
    kernel = _kernel("portable", torch.float32)
    before = kernel.numerics_id
    kernel.set_num_threads_(3)
    assert kernel.num_threads == 3
    assert kernel.numerics_id == before == "cpu-portable/float32/blocks-128/v4"


def test_library_is_built_once_however_many_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []

    def build(path: Path) -> None:
        built.append(path)
        path.write_bytes(b"library")
        path.chmod(0o700)

    monkeypatch.setattr(cpu_build, "build_library", build)
    monkeypatch.setattr(cpu_build, "SOURCE_FOLDER", tmp_path / "nothing_beside")
    folder = tmp_path / "cache"
    with ThreadPoolExecutor(4) as executor:
        paths = set(executor.map(lambda _: find_or_build_library(folder), range(8), timeout=30))
    assert len(built) == 1
    assert paths == {built[0]}


@pytest.fixture
def nothing_prebuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no library lay beside the sources: `make setup` puts one there."""
    monkeypatch.setattr(cpu_build, "library_name", lambda: "shoal-cpu-of-other-sources.so")


def test_without_a_compiler_the_caller_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, nothing_prebuilt: None
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu_ffn.load_library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert load_cpu_kernel(torch.bfloat16) is None
            assert load_cpu_kernel(torch.float32) is None
        assert len(caplog.records) == 1
        assert "no g++ on PATH" in caplog.text
        with pytest.raises(CompilerMissing, match="no g"):
            find_or_build_library(tmp_path / "other")
    finally:
        cpu_ffn.load_library.cache_clear()


def test_a_cache_that_others_can_write_is_refused(tmp_path: Path, nothing_prebuilt: None) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    os.chmod(folder, 0o777)
    with pytest.raises(CompilerMissing, match="written by others"):
        find_or_build_library(folder)


def test_threads_sleep_between_calls() -> None:
    """A pool that spun would use a core for nothing."""
    kernel = _kernel()
    kernel.set_num_threads_(3)
    layer, _ = _make_layer(kernel, 1024, 384, torch.float8_e4m3fn)
    x = torch.randn(64, 1024).to(torch.bfloat16)
    kernel.expert_ffn(x, *_all_pairs(len(x)), layer, exact=False)
    threading.Event().wait(0.05)  # longer than any spinning
    before = os.times()
    threading.Event().wait(0.3)
    after = os.times()
    assert (after.user + after.system) - (before.user + before.system) < 0.1
