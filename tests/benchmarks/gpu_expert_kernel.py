"""The GPU expert kernels against the card's own limits: weight bytes per second for few rows, TFLOP/s for many.

    python tests/benchmarks/gpu_expert_kernel.py [--json] [--experts 32] [--hidden 7168] [--inner 2048]

Every expert gets the same number of rows. The limit is measured in the same run: a device-to-device copy (bytes read
plus bytes written). The rival is torch on bf16 copies of the same weights (twice the bytes), by torch's grouped_mm
where the card has it, else one product after the other. Medians of 20 runs after 3 to warm up, by CUDA events; the
plan is made and copied in each run of "eager", and in each run of "graph" before its replay. Without a card it says
so and exits 0.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import grouped_mm, silu

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

ROWS_PER_EXPERT = (1, 8, 64, 512)
NUM_RUNS, NUM_WARM_UP = 20, 3
# Rows per expert from which arithmetic, not memory, is what the figure is about.
FIRST_COMPUTE_ROWS = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one line of JSON, not indented")
    parser.add_argument("--experts", type=int, default=32, help="experts of the layer")
    parser.add_argument("--hidden", type=int, default=7168, help="hidden size")
    parser.add_argument("--inner", type=int, default=2048, help="moe_intermediate_size")
    arguments = parser.parse_args()
    report: dict[str, object] = {
        "benchmark": "gpu_expert_kernel",
        "machine": describe_machine(),
        "commit": read_commit(),
        "sizes": {"experts": arguments.experts, "hidden": arguments.hidden, "inner": arguments.inner},
    }
    if torch.cuda.is_available():
        report |= measure(arguments.experts, arguments.hidden, arguments.inner)
    else:
        report |= {"skipped": "no CUDA card here: nothing was measured", "figures": [], "bars": list_bars({})}
    print(json.dumps(report, indent=None if arguments.json else 2))


def measure(num_experts: int, hidden_size: int, inner_size: int) -> dict[str, object]:
    """Measure on the current card. Returns the report's figures, limit and bars."""
    from experts.kernels.block_quantized import ExpertStack
    from experts.kernels.captured_ffn import CapturedFfn
    from experts.kernels.tile_table import choose_kernels
    from experts.kernels.triton_ffn import expert_ffn

    choice = choose_kernels(torch.cuda.get_device_capability())
    stack = ExpertStack.allocate(np.arange(num_experts), hidden_size, inner_size, (128, 128), "cuda")
    # Any bytes but NaN's: speed does not depend on values. Scales keep the activations finite.
    for weight, scale in ((stack.gate_up, stack.gate_up_scale), (stack.down, stack.down_scale)):
        weight.random_(0, 0x7F)
        scale.fill_(1e-3)
    copy_gbps = measure_copy_bandwidth()
    figures: list[dict[str, object]] = []
    measured: dict[str, float] = {}
    for rows in ROWS_PER_EXPERT:
        hidden_states, pair_rows, pair_experts, pair_weights = make_rows(rows, num_experts, hidden_size)
        frame = (hidden_states, pair_rows, pair_experts, pair_weights)
        captured = CapturedFfn(
            stack,
            choice,
            max_rows=len(hidden_states),
            max_pairs=len(pair_rows),
            dtype=hidden_states.dtype,
            exact=False,
        )
        seconds = {
            "eager": time_median(lambda frame=frame: expert_ffn(*frame, stack, choice, exact=False)),
            "graph": time_median(lambda frame=frame, captured=captured: captured.compute(*frame)),
        }
        rival_name, seconds["torch bf16"] = time_torch(rows, num_experts, hidden_size, inner_size)
        flops = 2 * 3 * hidden_size * inner_size * rows * num_experts
        for name, taken in seconds.items():
            weight_bytes = stack.size_bytes if name != "torch bf16" else 2 * 3 * hidden_size * inner_size * num_experts
            figures.append(
                {
                    "kernel": rival_name if name == "torch bf16" else name,
                    "rows_per_expert": rows,
                    "median_us": round(taken * 1e6, 1),
                    "weight_gb_per_s": round(weight_bytes / taken / 1e9, 1),
                    "tflop_per_s": round(flops / taken / 1e12, 2),
                }
            )
        best = min(seconds["eager"], seconds["graph"])
        measured[f"speedup {rows}"] = seconds["torch bf16"] / best
        measured[f"rate {rows}"] = (
            flops / best / 1e12 if rows >= FIRST_COMPUTE_ROWS else stack.size_bytes / best / 1e9 / copy_gbps
        )
    return {
        "kernels": choice.describe(),
        "limit": {"copy_gb_per_s": round(copy_gbps, 1)},
        "figures": figures,
        "bars": list_bars(measured),
    }


def list_bars(measured: dict[str, float]) -> list[dict[str, object]]:
    """The issue asks for figures where a card is at hand, not for a threshold: ok is None where none was."""
    bars: list[dict[str, object]] = []
    for rows in ROWS_PER_EXPERT:
        is_compute = rows >= FIRST_COMPUTE_ROWS
        for key, name, unit in (
            (
                "rate",
                "TFLOP/s" if is_compute else "weight bytes/s of copy bandwidth",
                "TFLOP/s" if is_compute else "ratio",
            ),
            ("speedup", "speed against torch in bf16", "ratio"),
        ):
            value = measured.get(f"{key} {rows}")
            bars.append(
                {
                    "name": f"GPU, {rows} rows per expert: {name}",
                    "asked": "reported where a card is at hand",
                    "measured": None if value is None else round(value, 3),
                    "unit": unit,
                    "ok": None if value is None else True,
                }
            )
    return bars


def make_rows(
    rows_per_expert: int, num_experts: int, hidden_size: int
) -> tuple[torch.Tensor, np.ndarray, np.ndarray, np.ndarray]:
    """Each row goes to up to 8 experts, and every expert gets the same number of rows."""
    experts_per_row = min(8, num_experts)
    num_rows = rows_per_expert * num_experts // experts_per_row
    hidden_states = torch.randn(num_rows, hidden_size, dtype=torch.bfloat16, device="cuda")
    pair_rows = np.repeat(np.arange(num_rows, dtype=np.int32), experts_per_row)
    first = np.arange(num_rows) * experts_per_row % num_experts
    pair_experts = np.sort((first[:, None] + np.arange(experts_per_row)) % num_experts, axis=1).astype(np.int32)
    return hidden_states, pair_rows, pair_experts.reshape(-1), np.full(len(pair_rows), 0.125, np.float32)


def time_torch(rows: int, num_experts: int, hidden_size: int, inner_size: int) -> tuple[str, float]:
    """Median seconds of the same products in bf16, rows already sorted; no weighting and no sums of pairs."""
    gate_up = torch.randn(num_experts, 2 * inner_size, hidden_size, dtype=torch.bfloat16, device="cuda")
    down = torch.randn(num_experts, hidden_size, inner_size, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(num_experts, rows, hidden_size, dtype=torch.bfloat16, device="cuda")
    ends = torch.arange(1, num_experts + 1, dtype=torch.int32, device="cuda") * rows

    def grouped() -> torch.Tensor:
        gate, up = grouped_mm(x.flatten(0, 1), gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        return grouped_mm(silu(gate) * up, down.transpose(1, 2), offs=ends)

    def one_by_one() -> torch.Tensor:
        results: list[torch.Tensor] = []
        for expert in range(num_experts):
            gate, up = torch.nn.functional.linear(x[expert], gate_up[expert]).chunk(2, dim=-1)
            results.append(torch.nn.functional.linear(silu(gate) * up, down[expert]))
        return torch.cat(results)

    try:
        grouped()
    except RuntimeError:
        return "torch bf16, one product after the other", time_median(one_by_one)
    return "torch grouped_mm bf16", time_median(grouped)


def measure_copy_bandwidth() -> float:
    """GB/s read plus written by a device-to-device copy of 1 GiB, or a quarter of the free memory if that is less."""
    free_bytes, _ = torch.cuda.mem_get_info()
    source = torch.zeros(min(2**30, free_bytes // 4), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_median(lambda: target.copy_(source)) / 1e9


def time_median(run: Callable[[], object]) -> float:
    """Median seconds of NUM_RUNS runs, each between two CUDA events."""
    for _ in range(NUM_WARM_UP):
        run()
    taken: list[float] = []
    for _ in range(NUM_RUNS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    return statistics.median(taken)


def describe_machine() -> dict[str, object]:
    machine: dict[str, object] = {"cpu": platform.machine(), "cpus": os.cpu_count(), "torch": torch.__version__}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        machine |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
        }
    return machine


def read_commit() -> str | None:
    """The checkout's commit, None outside one."""
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    return found.stdout.strip() or None


if __name__ == "__main__":
    main()
