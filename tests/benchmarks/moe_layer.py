"""One MoE layer over several expert-group processes against the same kernel in one process.

    python tests/benchmarks/moe_layer.py [--json] [--full] [--groups 4] [--draws 200]

Synthetic FP8 weights (one random panel repeated; every expert has the same values in memory of its own), tokens routed
by DeepSeek's gate with random logits, the same draws for both arrangements, which run one after the other: they would
not fit in memory together. One process: the kernel with 2 threads on the whole batch. Groups: the router's own scatter
and gather over gRPC to processes with 1 thread each. Means of the draws, after a few to warm up. Memory is the
proportional set size of the expert processes together, its peak from their start on. --full: DeepSeek-V3's
7168 x 2048 x 256 experts, 11.3 GB and some minutes; the default is tiny and only shows that it works. Progress goes to
stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import mmap
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import uvloop

from experts.expert_range import ExpertRange, split_experts
from experts.group import ExpertGroup
from experts.kernels.cpu_ffn import PackedExpert, PackedMatrix, ScaledWeight, WeightArena
from experts.kernels.expert_kernel import choose_expert_kernel
from experts.model_config import ModelConfig
from experts.quantization import quantize_block
from experts.server import ExpertServer, ReplicaIdentity
from experts.weights import ExpertWeights
from experts.wire import ComputeFrame, WireFormat
from router.dispatch import Dispatcher, DispatchOptions
from router.dispatch_plan import plan_frames
from router.expert_pool import ExpertPool
from router.expert_table import ExpertTable, GroupEntry, ReplicaEntry
from router.gate import select_experts
from tests.benchmarks.report import Bar, Figure, add_json_option, print_report
from tests.benchmarks.worker_processes import PeakMemory, answer_questions, restart_with_data_plane_env, run_workers
from tests.random_checkpoint import build_config

LAYER_ID = 1
BLOCK = (128, 128)
BATCHES = (1, 64)
# Issue 3, "What it must show": times the one process, and memory over the weights.
MOST_TIMES = {1: 1.4, 64: 1.08}
MOST_MEMORY = 1.10
NUM_WARM_UP = 10
TIMEOUT_S = 60.0
DIGEST = "0" * 64


class Draw(NamedTuple):
    """hidden_states: [num_tokens, hidden] bf16. topk_ids: int64, topk_weights: float32, [num_tokens, top_k]."""

    hidden_states: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    parser.add_argument("--full", action="store_true", help="11.3 GB of weights, 200 draws")
    parser.add_argument("--groups", type=int, default=4, help="expert-group processes")
    parser.add_argument("--draws", type=int, help="default: 5, with --full 200")
    parser.add_argument("--one-threads", type=int, default=2, help="threads of the one process")
    parser.add_argument("--serve", type=int, metavar="GROUP", help=argparse.SUPPRESS)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    config = build_model(arguments.full)
    if arguments.serve is not None:
        serve_group(config, arguments.groups, arguments.serve)
    elif arguments.one:
        serve_one(config, arguments.one_threads)
    else:
        restart_with_data_plane_env()
        measure(config, arguments, arguments.draws or (200 if arguments.full else 5))


def measure(config: ModelConfig, arguments: argparse.Namespace, num_draws: int) -> None:
    torch.set_num_threads(1)
    script = [__file__, "--groups", str(arguments.groups), "--one-threads", str(arguments.one_threads)]
    script += ["--full"] if arguments.full else []
    started_s = time.perf_counter()

    def tell(what: str) -> None:
        print(f"moe_layer: {time.perf_counter() - started_s:.0f} s: {what}", file=sys.stderr, flush=True)

    tell("one process loads")
    with run_workers([[*script, "--one"]]) as (one,):
        one_ms: dict[int, float] = {}
        for rows in BATCHES:
            tell(f"one process computes {num_draws} draws of {rows} token(s)")
            one_ms[rows] = one.ask(rows=rows, draws=num_draws)["mean_ms"]
    tell(f"{arguments.groups} groups load")
    serve = [[*script, "--serve", str(index)] for index in range(arguments.groups)]
    with PeakMemory() as memory, run_workers(serve, memory) as workers:
        replies = [worker.ready for worker in workers]
        tell(f"{arguments.groups} groups compute {num_draws} draws of {' and '.join(map(str, BATCHES))} token(s)")
        spread_ms = uvloop.run(dispatch_draws(config, replies, num_draws))
        tell("done")
    weight_bytes = 3 * config.hidden_size * config.moe_intermediate_size * config.n_routed_experts
    figures = [
        *(Figure("one process", one_ms[rows], "ms", {"rows": rows}) for rows in BATCHES),
        *(Figure("over the groups", spread_ms[rows], "ms", {"rows": rows}) for rows in BATCHES),
        Figure("weights in FP8", weight_bytes / 1e9, "GB"),
        Figure("peak memory of the expert groups", memory.peak_bytes / 1e9, "GB"),
    ]
    note = "" if arguments.full and arguments.groups == 4 else "measured only with --full and 4 groups"
    bars = [
        Bar(
            f"{rows} token(s) over {arguments.groups} groups, against one process",
            MOST_TIMES[rows],
            None if note else spread_ms[rows] / one_ms[rows],
            "x",
            "low",
            note,
        )
        for rows in BATCHES
    ]
    ratio = memory.peak_bytes / weight_bytes
    bars.append(
        Bar("peak memory of the groups, against the weights", MOST_MEMORY, None if note else ratio, "x", "low", note)
    )
    print_report(
        "moe_layer",
        sizes={
            "hidden": config.hidden_size,
            "inner": config.moe_intermediate_size,
            "experts": config.n_routed_experts,
            "groups": arguments.groups,
            "draws": num_draws,
            "one_threads": arguments.one_threads,
        },
        limit=figures[: len(BATCHES)],
        figures=figures,
        bars=bars,
        as_line=arguments.json,
        notes=[f"numerics_id {replies[0]['numerics_id']}"],
    )


def build_model(full: bool) -> ModelConfig:
    sizes: dict[str, Any] = {"hidden_size": 256, "moe_intermediate_size": 128, "n_routed_experts": 32}
    if full:
        sizes = {"hidden_size": 7168, "moe_intermediate_size": 2048, "n_routed_experts": 256}
    return ModelConfig.from_dict(build_config(fp8=True, num_experts_per_tok=8, n_group=8, topk_group=4, **sizes))


def make_draws(config: ModelConfig, num_tokens: int, count: int) -> Iterator[Draw]:
    """The same for the same arguments, in every process."""
    generator = torch.Generator().manual_seed(num_tokens)
    for _ in range(count):
        hidden_states = torch.randn(num_tokens, config.hidden_size, generator=generator).to(torch.bfloat16)
        logits = torch.randn(num_tokens, config.n_routed_experts, generator=generator)
        topk_weights, topk_ids = select_experts(logits, torch.zeros(config.n_routed_experts), config)
        yield Draw(hidden_states, topk_ids, topk_weights)


async def dispatch_draws(config: ModelConfig, replicas: list[dict[str, Any]], num_draws: int) -> dict[int, float]:
    """Mean milliseconds of scatter and gather by number of tokens."""
    pool = ExpertPool(config)
    groups = [
        GroupEntry(
            f"g{index}",
            hosted_of(config, len(replicas), index),
            (ReplicaEntry(f"g{index}-0", replica["endpoint"], 1, DIGEST, replica["numerics_id"]),),
        )
        for index, replica in enumerate(replicas)
    ]
    pool.apply(ExpertTable(1, tuple(groups)))
    dispatcher = Dispatcher(pool, DispatchOptions(WireFormat.BFLOAT16, "reduced", TIMEOUT_S, TIMEOUT_S))
    means: dict[int, float] = {}
    try:
        for num_tokens in BATCHES:
            taken_ms: list[float] = []
            for draw in make_draws(config, num_tokens, NUM_WARM_UP + num_draws):
                started_s = time.perf_counter()
                pending = await dispatcher.scatter(LAYER_ID, *draw)
                result = await pending.gather()
                taken_ms.append((time.perf_counter() - started_s) * 1e3)
                assert result.isfinite().all()
            means[num_tokens] = statistics.mean(taken_ms[NUM_WARM_UP:])
    finally:
        await pool.close()
        await asyncio.sleep(0)
    return means


def serve_group(config: ModelConfig, num_groups: int, index: int) -> None:
    """One expert group with one thread, until standard input ends."""
    group = build_group(config, hosted_of(config, num_groups, index), num_threads=1)
    server = ExpertServer(group, ReplicaIdentity(f"g{index}", f"g{index}-0", incarnation=1))
    ready = {"endpoint": server.start(), "numerics_id": group.numerics_id}
    print_line(ready)
    sys.stdin.read()
    server.stop(0.1)


def serve_one(config: ModelConfig, num_threads: int) -> None:
    """All experts in this process, timed here on request."""
    group = build_group(config, hosted_of(config, 1, 0), num_threads)
    print_line({"numerics_id": group.numerics_id})

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        taken_ms: list[float] = []
        for draw in make_draws(config, question["rows"], NUM_WARM_UP + question["draws"]):
            frame = make_frame(config, draw)
            started_s = time.perf_counter()
            result = group.compute(frame)
            taken_ms.append((time.perf_counter() - started_s) * 1e3)
            assert result.isfinite().all()
        return {"mean_ms": statistics.mean(taken_ms[NUM_WARM_UP:])}

    answer_questions(answer)


def make_frame(config: ModelConfig, draw: Draw) -> ComputeFrame:
    """The whole batch as one frame for a group that hosts everything."""
    everything = np.zeros((1, config.n_routed_experts), dtype=np.int64)
    (plan,) = plan_frames(draw.topk_ids.numpy(), draw.topk_weights.numpy(), everything)
    return ComputeFrame(
        frame_id=1,
        incarnation=1,
        table_version=1,
        layer_id=LAYER_ID,
        hidden_states=draw.hidden_states,
        pair_rows=plan.pair_rows,
        pair_experts=plan.pair_experts,
        pair_weights=plan.pair_weights,
        exact=False,
        deadline_ms=60_000,
        reply_dtype=torch.bfloat16,
    )


def hosted_of(config: ModelConfig, num_groups: int, index: int) -> tuple[ExpertRange, ...]:
    """Of the one layer that there is here."""
    return tuple(
        ExpertRange(LAYER_ID, LAYER_ID + 1, hosted.expert_start, hosted.expert_end)
        for hosted in split_experts(config, num_groups)[index]
    )


def build_group(config: ModelConfig, hosted: tuple[ExpertRange, ...], num_threads: int) -> ExpertGroup:
    """Packed once, then copied within the kernel's own memory: seconds instead of minutes, and no byte held twice."""
    torch.set_num_threads(num_threads)
    kernel = choose_expert_kernel(torch.bfloat16, {torch.float8_e4m3fn}, BLOCK)
    experts = [expert for block in hosted for expert in range(block.expert_start, block.expert_end)]
    inner, hidden = config.moe_intermediate_size, config.hidden_size
    shape = (len(experts), hidden, inner, torch.float8_e4m3fn)
    room = kernel.reserve(*shape)
    generator = np.random.default_rng(0)
    gate, up, down = (draw_weight(*size, generator) for size in ((inner, hidden), (inner, hidden), (hidden, inner)))
    first = kernel.pack_expert(gate, up, down, room)
    if not isinstance(first, PackedExpert):
        raise SystemExit("this benchmark measures the native CPU kernel, which could not be built here")
    del gate, up, down
    packed = {experts[0]: first}
    for expert in experts[1:]:
        packed[expert] = PackedExpert(copy_matrix(first.gate_up, room), copy_matrix(first.down, room))
    num_bytes = kernel.count_bytes(*shape)
    layers = {LAYER_ID: kernel.build_layer(packed)}
    return ExpertGroup(ExpertWeights(config, hosted, torch.bfloat16, kernel, layers, {}, DIGEST, num_bytes))


def copy_matrix(matrix: PackedMatrix, room: WeightArena) -> PackedMatrix:
    memory = room.allocate(matrix.nbytes)
    memory.copy_(matrix.memory)
    return dataclasses.replace(matrix, memory=memory)


def draw_weight(rows: int, columns: int, generator: np.random.Generator) -> ScaledWeight:
    """A panel of normally distributed weights over and over: as in a checkpoint, few are zero or subnormal, which takes
    longer.

    In a mapping that ends with it: malloc would keep its memory (cluster/data_plane_env.py).
    """
    normal = generator.standard_normal((min(rows, BLOCK[0]), columns), dtype=np.float32) / columns**0.5
    panel, scales = quantize_block(torch.from_numpy(normal), BLOCK)
    panel = panel.view(torch.uint8)
    values = torch.frombuffer(mmap.mmap(-1, rows * columns), dtype=torch.uint8).view(rows, columns)
    for start in range(0, rows, len(panel)):
        values[start : start + len(panel)] = panel[: rows - start]
    return ScaledWeight(values.view(torch.float8_e4m3fn), scales.repeat(-(-rows // BLOCK[0]), 1), BLOCK)


def print_line(ready: dict[str, Any]) -> None:
    print(json.dumps(ready), flush=True)


if __name__ == "__main__":
    main()
