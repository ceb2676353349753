"""Find the fastest tiles on the card at hand, to be written into experts/kernels/tile_table.py by hand.

    python tests/benchmarks/gpu_tiles.py [--json] [--experts 8] [--hidden 7168] [--inner 2048] [--path w8a8|w8a16]

For each number of rows per expert it times candidates for gate and up, then for down, each with the other one fixed,
and drops those whose result differs in a bit from the table's: tiles may change speed only. Serving never tunes.
Without a card it says so and exits 0.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from triton.runtime.errors import OutOfResources

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experts.kernels.block_quantized import ExpertStack
from experts.kernels.row_plan import PlanLayout, plan_rows
from experts.kernels.tile_table import KernelChoice, Tile, TileLine, WeightPath, choose_kernels
from experts.kernels.triton_ffn import launch_ffn, view_plan
from tests.benchmarks.gpu_expert_kernel import describe_machine, make_rows, read_commit, time_median

ROWS_PER_EXPERT = (1, 4, 16, 32, 64, 128, 512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one line of JSON, not indented")
    parser.add_argument("--experts", type=int, default=8, help="experts of the layer")
    parser.add_argument("--hidden", type=int, default=7168, help="hidden size")
    parser.add_argument("--inner", type=int, default=2048, help="moe_intermediate_size")
    parser.add_argument("--path", choices=["w8a8", "w8a16"], help="weight path; default: the card's own")
    arguments = parser.parse_args()
    report: dict[str, object] = {
        "benchmark": "gpu_tiles",
        "machine": describe_machine(),
        "commit": read_commit(),
        "sizes": {"experts": arguments.experts, "hidden": arguments.hidden, "inner": arguments.inner},
        "bars": [],
    }
    if torch.cuda.is_available():
        report["lines"] = tune(arguments.experts, arguments.hidden, arguments.inner, arguments.path)
    else:
        report |= {"skipped": "no CUDA card here: nothing was measured", "lines": []}
    print(json.dumps(report, indent=None if arguments.json else 2))


class Frame(NamedTuple):
    """Rows spread evenly over the experts, see make_rows."""

    hidden_states: torch.Tensor
    pair_rows: np.ndarray
    pair_experts: np.ndarray
    pair_weights: np.ndarray


def tune(num_experts: int, hidden_size: int, inner_size: int, path: str | None) -> list[dict[str, object]]:
    """Return, by rows per expert, the fastest tiles found and the table's own, with median microseconds."""
    capability = torch.cuda.get_device_capability()
    choice = choose_kernels(capability, None if path is None else WeightPath(path))
    stack = ExpertStack.allocate(np.arange(num_experts), hidden_size, inner_size, (128, 128), "cuda")
    for weight, scale in ((stack.gate_up, stack.gate_up_scale), (stack.down, stack.down_scale)):
        weight.random_(0, 0x7F)
        scale.fill_(1e-3)
    shapes = list_tile_shapes(capability)
    lines: list[dict[str, object]] = []
    for rows in ROWS_PER_EXPERT:
        frame = Frame(*make_rows(rows, num_experts, hidden_size))
        table_line = choice.choose_tiles(rows)
        table_seconds, expected = time_line(table_line, frame, stack, choice)
        best_line, best_seconds = table_line, table_seconds
        for turn in ("gate_up", "down"):
            fixed = best_line
            sizes = [size for size in (16, 32, 64, 128) if size == 16 or size < 2 * rows]
            for block_rows in sizes if turn == "gate_up" else [fixed.block_rows]:
                for shape in shapes:
                    tile = Tile(block_rows, *shape)
                    line = fixed._replace(**{turn: tile})
                    if turn == "gate_up":
                        line = line._replace(down=fixed.down._replace(block_rows=block_rows))
                    try:
                        seconds, result = time_line(line, frame, stack, choice)
                    except OutOfResources:
                        continue
                    if seconds < best_seconds and torch.equal(result, expected):
                        best_line, best_seconds = line, seconds
        lines.append(
            {
                "rows_per_expert": rows,
                "gate_up": list(best_line.gate_up),
                "down": list(best_line.down),
                "median_us": round(best_seconds * 1e6, 1),
                "table_gate_up": list(table_line.gate_up),
                "table_down": list(table_line.down),
                "table_median_us": round(table_seconds * 1e6, 1),
            }
        )
    return lines


def list_tile_shapes(capability: tuple[int, int]) -> list[tuple[int, int, int]]:
    """Candidates for block_outputs, num_warps, num_stages; wgmma wants 64 outputs and four warps (tile_table.py)."""
    if (9, 0) <= capability < (10, 0):
        return list(itertools.product((64, 128), (4, 8), (3, 4, 5, 6)))
    return list(itertools.product((16, 32, 64, 128), (2, 4, 8), (3, 4, 5, 6)))


def time_line(line: TileLine, frame: Frame, stack: ExpertStack, choice: KernelChoice) -> tuple[float, torch.Tensor]:
    """Median seconds of the launches alone, the plan being on the card, and the result."""
    hidden_states, pair_rows, pair_experts, pair_weights = frame
    plan = plan_rows(pair_rows, pair_experts, len(hidden_states), line.block_rows)
    layout = PlanLayout(len(hidden_states), len(pair_rows), len(plan.tile_rows))
    device_plan = view_plan(layout, torch.from_numpy(layout.pack(plan, pair_weights)).cuda())
    out = torch.empty(hidden_states.shape, dtype=torch.float32, device="cuda")
    seconds = time_median(lambda: launch_ffn(hidden_states, device_plan, stack, choice, line, out, exact=False))
    return seconds, out


if __name__ == "__main__":
    main()
