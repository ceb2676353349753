"""The CPU expert kernel against the machine: bytes of weights per second, arithmetic per second, and torch.

    python tests/benchmarks/expert_kernel.py [--json] [--full] [--threads 2] [--family amx] [--small-pages] [--runs 9]

One layer's experts, FP8 with scales of 128x128 blocks, every expert with the same number of rows, then with 0 to 64
at random. Limits measured in the same run, in turn with the kernel: reading the same memory forward
(memory_bandwidth.py) and a large bf16 product of torch (oneDNN); a large fp32 product besides, because oneDNN emulates
bf16 on CPUs that do not have it, several times slower. The rival is torch._grouped_mm on the same weights
expanded to bf16, SwiGLU included, rows already sorted, nothing weighted or added. Medians of several rounds after two
to warm up. The default is a tiny size, whose figures mean nothing; --full is a layer of 32 experts of DeepSeek-V3
(7168 x 2048), which takes 5 GB of memory and some minutes.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# Threads of torch that spin after a product would take a core from the kernel's; read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch.nn.functional import silu

from experts.kernels.cpu_ffn import (
    FAMILIES,
    CpuKernel,
    PackedLayer,
    ScaledWeight,
    WeightArena,
    load_cpu_kernel,
    packed_size,
)
from experts.quantization import dequantize_block, quantize_block
from tests.benchmarks.memory_bandwidth import read_once
from tests.benchmarks.report import Bar, Figure, add_json_option, print_report, summarize
from tests.experts.reference import expert_ffn_reference
from tests.tolerances import KERNEL_RELATIVE_ERROR

# Private, and the only grouped product of this torch on CPU.
_grouped_mm = getattr(torch, "_grouped_mm")  # noqa: B009
BLOCK = (128, 128)
ROWS_PER_EXPERT = (1, 4, 16, 64)
# Issue 3, "What it must show".
READ_SHARE = {1: 0.75, 2: 0.80}
GEMM_SHARE = {1: 0.55, 2: 0.60}
RIVAL_SPEEDUP = {1: 2.3, 64: 1.8}


class Sizes(NamedTuple):
    num_experts: int
    hidden: int
    inner: int
    gemm: int
    num_runs: int


class Rows(NamedTuple):
    """A call's arguments: hidden_states [num_rows, hidden], and pairs sorted by row, then expert."""

    hidden_states: torch.Tensor
    pair_rows: np.ndarray
    pair_experts: np.ndarray
    pair_weights: np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    parser.add_argument("--full", action="store_true", help="32 experts of 7168 x 2048")
    parser.add_argument("--threads", type=int, default=2, help="the kernel's threads; one thread is measured besides")
    parser.add_argument("--family", choices=FAMILIES, help="instruction family (default: the best of this CPU)")
    parser.add_argument("--small-pages", action="store_true", help="weights in 4 KB pages, for comparison")
    parser.add_argument("--runs", type=int, help="measured runs of each (default: 3, with --full 9)")
    arguments = parser.parse_args()
    sizes = Sizes(32, 7168, 2048, 4096, 9) if arguments.full else Sizes(4, 512, 256, 256, 3)
    sizes = sizes._replace(num_runs=arguments.runs or sizes.num_runs)
    kernel = load_cpu_kernel(torch.bfloat16, family=arguments.family)
    if kernel is None:
        sys.exit("error: no C++ compiler and no prebuilt library: there is no kernel to measure")
    torch.manual_seed(0)
    with torch.inference_mode():
        weights = make_expert(sizes)
        arena = WeightArena(count_packed_bytes(sizes), huge_pages=not arguments.small_pages)
        layer = PackedLayer({expert: kernel.pack_expert(*weights, arena) for expert in range(sizes.num_experts)})
        bars = [
            Bar(
                "memory of packed weights / FP8 bytes", 1.05, arena.used_bytes / count_fp8_bytes(sizes), "ratio", "low"
            ),
            *check_results(kernel, layer, weights, sizes, arguments.threads),
        ]
        limits: list[Figure] = []
        figures: list[Figure] = []
        for threads in sorted({1, arguments.threads}):
            kernel.set_num_threads_(threads)
            torch.set_num_threads(threads)
            rivals = make_rivals(sizes, weights) if threads == arguments.threads else {}
            measure_kernel(kernel, layer, arena, rivals, sizes, threads, limits, figures, bars)
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print_report(
        "expert_kernel",
        sizes={**sizes._asdict(), "threads": arguments.threads, "huge_pages": not arguments.small_pages},
        limit=limits,
        figures=[*figures, Figure("peak memory of this process", peak_gb, "GB")],
        bars=bars,
        as_line=arguments.json,
        notes=[f"numerics_id {kernel.numerics_id}"],
    )


def measure_kernel(
    kernel: CpuKernel,
    layer: PackedLayer,
    arena: WeightArena,
    rivals: dict[int, Callable[[], float]],
    sizes: Sizes,
    threads: int,
    limits: list[Figure],
    figures: list[Figure],
    bars: list[Bar],
) -> None:
    """Append what is measured with these threads. rivals: by rows per expert."""
    uneven = draw_uneven(sizes.num_experts)
    runs: dict[str, Callable[[], float]] = {
        "read": lambda: read_once(arena.allocated, threads),
        "gemm": make_gemm(sizes.gemm, torch.bfloat16),
        "gemm fp32": make_gemm(sizes.gemm, torch.float32),
        "uneven": time_kernel(kernel, layer, make_rows(sizes, uneven)),
    }
    for count in sorted({*ROWS_PER_EXPERT, *uneven} - {0}):
        runs[f"{count}"] = time_kernel(kernel, layer, make_rows(sizes, [count] * sizes.num_experts))
    for count, rival in rivals.items():
        runs[f"rival {count}"] = rival
    taken = run_in_turn(runs, sizes.num_runs)
    seconds = {name: statistics.median(values) for name, values in taken.items()}
    read_rate = arena.used_bytes / seconds["read"] / 1e9
    gemm_rate = 2 * sizes.gemm**3 / seconds["gemm"] / 1e12
    limits += [
        Figure("memory read", read_rate, "GB/s", {"threads": threads}),
        Figure("large bf16 product", gemm_rate, "TFLOP/s", {"threads": threads}),
        Figure("large fp32 product", 2 * sizes.gemm**3 / seconds["gemm fp32"] / 1e12, "TFLOP/s", {"threads": threads}),
    ]
    unit = "1 thread" if threads == 1 else f"{threads} threads"
    for count in ROWS_PER_EXPERT:
        read = arena.used_bytes / seconds[f"{count}"] / 1e9
        rate = count_flops(sizes, count * sizes.num_experts) / seconds[f"{count}"] / 1e12
        figures.append(
            summarize(
                "kernel",
                [value * 1e3 for value in taken[f"{count}"]],
                "ms",
                rows_per_expert=count,
                threads=threads,
                gb_per_s=round(read, 2),
                tflop_per_s=round(rate, 3),
            )
        )
        if count in (1, 4):
            asked = READ_SHARE.get(threads, READ_SHARE[2])
            bars.append(Bar(f"share of read bandwidth, {count} rows, {unit}", asked, read / read_rate, "ratio", "high"))
        if count == 64:
            asked = GEMM_SHARE.get(threads, GEMM_SHARE[2])
            bars.append(Bar(f"share of large product, {count} rows, {unit}", asked, rate / gemm_rate, "ratio", "high"))
    # Each expert's share of a call in which all experts have as many rows as it has.
    mean = sum(seconds[f"{count}"] for count in uneven if count) / sizes.num_experts
    details = {"rows_per_expert": "0 to 64 at random", "threads": threads}
    figures.append(summarize("kernel", [value * 1e3 for value in taken["uneven"]], "ms", **details))
    # To the percent: medians of so few runs are not better than that.
    uneven_ratio = round(seconds["uneven"] / mean, 2)
    bars.append(Bar(f"uneven rows / their weighted mean, {unit}", 1.0, uneven_ratio, "ratio", "low"))
    for count in rivals:
        values = taken[f"rival {count}"]
        details = {"rows_per_expert": count, "threads": threads}
        figures.append(
            summarize("torch._grouped_mm on bf16 copies", [value * 1e3 for value in values], "ms", **details)
        )
        speedup = seconds[f"rival {count}"] / seconds[f"{count}"]
        bars.append(Bar(f"speed / torch._grouped_mm, {count} rows", RIVAL_SPEEDUP[count], speedup, "ratio", "high"))


def draw_uneven(num_experts: int) -> list[int]:
    """0 to 64 rows per expert at random. Experts share 8 different counts: each has to be timed by itself as well."""
    generator = np.random.default_rng(0)
    return generator.choice(generator.integers(0, 65, 8), num_experts).tolist()


def run_in_turn(runs: dict[str, Callable[[], float]], num_runs: int) -> dict[str, list[float]]:
    """Seconds of each, one after the other in every round, so that a disturbance meets all of them alike."""
    for run in runs.values():
        run()
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(num_runs):
        for name, run in runs.items():
            seconds[name].append(run())
    return seconds


def time_kernel(kernel: CpuKernel, layer: PackedLayer, rows: Rows) -> Callable[[], float]:
    return lambda: _time(lambda: kernel.expert_ffn(*rows, layer, exact=False))


def make_gemm(size: int, dtype: torch.dtype) -> Callable[[], float]:
    """A square product, as large as pays: oneDNN's rate."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    return lambda: _time(lambda: torch.nn.functional.linear(a, b))


def make_rivals(sizes: Sizes, weights: tuple[ScaledWeight, ...]) -> dict[int, Callable[[], float]]:
    """torch._grouped_mm on bf16 copies, by rows per expert."""
    gate, up, down = (_expand(weight).to(torch.bfloat16) for weight in weights)
    gate_up = torch.cat((gate, up)).expand(sizes.num_experts, -1, -1).contiguous().transpose(1, 2)
    downs = down.expand(sizes.num_experts, -1, -1).contiguous().transpose(1, 2)

    def make(count: int) -> Callable[[], float]:
        x = torch.randn(count * sizes.num_experts, sizes.hidden).to(torch.bfloat16)
        ends = torch.arange(1, sizes.num_experts + 1, dtype=torch.int32) * count

        def compute() -> torch.Tensor:
            gates, ups = _grouped_mm(x, gate_up, offs=ends).chunk(2, dim=-1)
            return _grouped_mm(silu(gates) * ups, downs, offs=ends)

        return lambda: _time(compute)

    return {count: make(count) for count in RIVAL_SPEEDUP}


def check_results(
    kernel: CpuKernel, layer: PackedLayer, weights: tuple[ScaledWeight, ...], sizes: Sizes, threads: int
) -> list[Bar]:
    """Bit equality of rows alone, among others and over threads, and the error against the fp32 reference."""
    rows = make_rows(sizes, [17] * sizes.num_experts)
    kernel.set_num_threads_(threads)
    together = kernel.expert_ffn(*rows, layer, exact=False)
    equal = 0
    kernel.set_num_threads_(1)
    for row in range(17):
        mine = rows.pair_rows == row
        alone = kernel.expert_ffn(
            rows.hidden_states[row : row + 1],
            rows.pair_rows[mine] - row,
            rows.pair_experts[mine],
            rows.pair_weights[mine],
            layer,
            exact=False,
        )
        equal += torch.equal(alone[0], together[row])
    kernel.set_num_threads_(threads)
    few = make_rows(sizes, [4, 4] + [0] * (sizes.num_experts - 2))
    result = kernel.expert_ffn(*few, layer, exact=False)
    expanded = tuple(_expand(weight) for weight in weights)
    pairs = (torch.from_numpy(part) for part in few[1:])
    expected = expert_ffn_reference(few.hidden_states, *pairs, {0: expanded, 1: expanded}, exact=False)  # type: ignore[arg-type]
    error = float((result - expected).abs().max() / expected.abs().max())
    return [
        Bar("rows with the same bits alone on 1 thread", 17, equal, "of 17", "high"),
        Bar("error against the fp32 reference", KERNEL_RELATIVE_ERROR, error, "ratio", "low"),
    ]


def make_expert(sizes: Sizes) -> tuple[ScaledWeight, ScaledWeight, ScaledWeight]:
    """Gate, up, down of normally distributed weights, so that zeros and subnormals are as rare as in a checkpoint."""
    shapes = ((sizes.inner, sizes.hidden), (sizes.inner, sizes.hidden), (sizes.hidden, sizes.inner))
    gate, up, down = (
        ScaledWeight(*quantize_block(torch.randn(shape) / shape[1] ** 0.5, BLOCK), BLOCK) for shape in shapes
    )
    return gate, up, down


def make_rows(sizes: Sizes, counts: list[int]) -> Rows:
    """counts: rows of each expert; row i goes to every expert that has more than i rows."""
    num_rows = max(*counts, 1)
    pairs = [(row, expert) for row in range(num_rows) for expert, count in enumerate(counts) if row < count]
    pair_rows, pair_experts = (np.array(part, dtype=np.int32) for part in zip(*pairs, strict=True))
    weights = np.random.default_rng(0).random(len(pairs), dtype=np.float32)
    return Rows(torch.randn(num_rows, sizes.hidden).to(torch.bfloat16), pair_rows, pair_experts, weights)


def count_packed_bytes(sizes: Sizes) -> int:
    fp8 = torch.float8_e4m3fn
    gate_up = packed_size((sizes.inner, sizes.hidden), fp8, paired=True)
    return sizes.num_experts * (gate_up + packed_size((sizes.hidden, sizes.inner), fp8))


def count_fp8_bytes(sizes: Sizes) -> int:
    return sizes.num_experts * 3 * sizes.hidden * sizes.inner


def count_flops(sizes: Sizes, num_pairs: int) -> int:
    return 2 * num_pairs * 3 * sizes.hidden * sizes.inner


def _expand(weight: ScaledWeight) -> torch.Tensor:
    assert weight.scale_inv is not None
    return dequantize_block(weight.weight, weight.scale_inv, weight.block)


def _time(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
