"""Tokens per second of the whole engine against transformers, on one generated checkpoint, in one run.

    python tests/benchmarks/engine.py [--json] [--full] [--only ours|theirs] [--batches 1 8 32]

Ours: 4 expert-group processes and a router, started as users start them, FP8 weights, asked through the router's gRPC
Generate. A second router on the same expert groups runs with --deterministic. Theirs: DeepseekV3ForCausalLM in bf16,
grouped_mm, sdpa, a bare loop with a KV cache. All share the same --cores cores, and the arrangements take turns,
so that a machine whose speed swings favours none. Greedy, medians over the rounds, one round to warm up (shorter).

Decode is the steady state: from the moment when every sequence has its first token to the one when the first of them
ends. --full: 2.3 B parameters (2.3 GB in the cache folder, about 11 GB of memory, 5 minutes); the default is tiny and
only shows that it works.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import grpc.aio
import psutil
import uvloop

from router.v1 import router_pb2, router_pb2_grpc
from tests.benchmarks.generated_checkpoint import count_weight_bytes, prepare_checkpoint
from tests.benchmarks.report import Bar, Figure, add_json_option, print_report, summarize
from tests.benchmarks.worker_processes import (
    PeakMemory,
    Worker,
    answer_questions,
    restart_with_data_plane_env,
    run_workers,
)
from tests.local_stack import (
    ExtraRouter,
    ManagedProcess,
    StackOptions,
    extra_router,
    local_stack,
)
from tests.random_checkpoint import build_config

NUM_GROUPS = 4
# Issue 4, "What it must show".
DECODE_BARS = {1: 3.0, 8: 3.3, 32: 4.2}
PREFILL_BAR = 2.5
# Determinism is the default if it costs at most so much of the throughput.
DETERMINISM_BAR = 0.1
SHARED_PREFIX_BAR = 0.25
MEMORY_OVERHEAD_GB = 2.5
CALL_TIMEOUT_S = 300.0
# Rounds are many and transformers is slow: its steps are alike, so fewer of them do.
THEIR_STEPS = {1: 48, 8: 24, 32: 12}


@dataclass(frozen=True)
class Plan:
    """How much is measured. Lengths in tokens."""

    rounds: int
    batches: tuple[int, ...]
    prompt_length: int
    output_length: int
    prefill_length: int
    prefix_length: int
    cores: int
    expert_threads: int
    router_threads: int


class Decoding(NamedTuple):
    """One steady decode. Milliseconds of CPU per step: of the router, of all expert groups, of the client (this).
    parts_ms: where a step's time went (router/step_times.py), prefill included; None: of somebody who does not say."""

    tokens_per_s: float
    step_ms: float
    router_ms: float
    experts_ms: float
    client_ms: float
    parts_ms: dict[str, float] | None = None


@dataclass
class Samples:
    """One arrangement's measurements, by batch or over the rounds."""

    decoding: dict[int, list[Decoding]] = field(default_factory=dict)
    prefill_s: list[float] = field(default_factory=list)
    first_prefix_s: list[float] = field(default_factory=list)
    second_prefix_s: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    parser.add_argument("--full", action="store_true", help="2.3 B parameters")
    parser.add_argument("--only", choices=["ours", "theirs"], help="measure one side only")
    parser.add_argument("--no-deterministic", action="store_true", help="leave the deterministic router out")
    parser.add_argument("--batches", type=int, nargs="+", help="default: 1 8 32; tiny: 1 4")
    parser.add_argument("--rounds", type=int, help="default: 3; tiny: 1")
    parser.add_argument("--cores", type=int, default=2, help="cores that everything shares (default: 2)")
    parser.add_argument("--expert-threads", type=int, default=1, help="of each expert group (default: 1)")
    parser.add_argument("--router-threads", type=int, default=2, help="default: 2: the groups wait while it computes")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "shoal-benchmarks", metavar="DIR")
    parser.add_argument("--log-folder", type=Path, metavar="DIR", help="keep the logs of our processes")
    parser.add_argument("--transformers", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.transformers is not None:
        serve_transformers(arguments.transformers, arguments.cores)
        return
    restart_with_data_plane_env()
    # Inherited by every process that is started from here.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    plan = Plan(
        rounds=arguments.rounds or (3 if arguments.full else 1),
        batches=tuple(arguments.batches or ((1, 8, 32) if arguments.full else (1, 4))),
        prompt_length=48 if arguments.full else 8,
        output_length=64 if arguments.full else 12,
        prefill_length=512 if arguments.full else 64,
        prefix_length=1000 if arguments.full else 96,
        cores=arguments.cores,
        expert_threads=arguments.expert_threads,
        router_threads=arguments.router_threads,
    )
    checkpoint = prepare_checkpoint(arguments.cache, build_model(arguments.full))
    with contextlib.ExitStack() as stack:
        log_folder = arguments.log_folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        measure(checkpoint, plan, arguments, log_folder)


def build_model(full: bool) -> dict[str, Any]:
    """config.json. --full: the 2.3 B parameters that issue 4 names."""
    sizes: dict[str, Any] = {
        "vocab_size": 512, "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128,
        "num_hidden_layers": 3, "n_routed_experts": 32, "q_lora_rank": 128, "kv_lora_rank": 128,
        "num_attention_heads": 4, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
    }  # fmt: skip
    if full:
        sizes = {
            "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2816, "moe_intermediate_size": 512,
            "num_hidden_layers": 12, "n_routed_experts": 128, "q_lora_rank": 512, "kv_lora_rank": 512,
            "num_attention_heads": 8, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        }  # fmt: skip
    common: dict[str, Any] = {"num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "max_position_embeddings": 4096}
    return build_config(fp8=True, **common, **sizes)


def measure(checkpoint: Path, plan: Plan, arguments: argparse.Namespace, log_folder: Path) -> None:
    ours, exact, theirs = Samples(), Samples(), Samples()
    vocab_size: int = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    prompts = Prompts(vocab_size)
    figures: list[Figure] = []
    with contextlib.ExitStack() as stack:
        worker = ours_stack = exact_router = None
        memory = PeakMemory(every_s=0.5)
        if arguments.only != "ours":
            script = [__file__, "--transformers", str(checkpoint), "--cores", str(plan.cores)]
            (worker,) = stack.enter_context(run_workers([script]))
        if arguments.only != "theirs":
            options = StackOptions(
                num_groups=NUM_GROUPS, dtype="bfloat16", wire_dtype="bfloat16", deterministic=False, api=False,
                expert_threads=plan.expert_threads, router_threads=plan.router_threads,
            )  # fmt: skip
            ours_stack = stack.enter_context(local_stack(checkpoint, log_folder, options))
            memory.watch(list(ours_stack.pids().values()))
            stack.enter_context(memory)
            if not arguments.no_deterministic:
                exact_router = stack.enter_context(extra_router(ours_stack, replace(options, deterministic=True)))
        if ours_stack is not None and worker is not None:
            figures.append(measure_agreement(ours_stack.router_endpoint, worker, prompts))
        for turn in range(-1, plan.rounds):
            shown = plan if turn >= 0 else replace(plan, output_length=4)
            if ours_stack is not None:
                asked = ExtraRouter(ours_stack.router, ours_stack.router_endpoint)
                measure_router(asked, ours_stack.experts, prompts, shown, ours if turn >= 0 else Samples())
            if ours_stack is not None and exact_router is not None:
                measure_router(exact_router, ours_stack.experts, prompts, shown, exact if turn >= 0 else Samples())
            if worker is not None:
                measure_worker(worker, prompts, plan, theirs if turn >= 0 else Samples(), warm_up=turn < 0)
        if ours_stack is not None:
            peak_rss = sum(read_peak_rss_bytes(pid) for pid in ours_stack.pids().values())
            figures.append(Figure("our peak resident sets, loading included", peak_rss / 1e9, "GB"))
    figures += describe(ours, "ours") + describe(exact, "ours, deterministic") + describe(theirs, "transformers")
    weight_gb = count_weight_bytes(checkpoint) / 1e9
    figures.append(Figure("weights of the checkpoint", weight_gb, "GB"))
    figures.append(Figure("our peak memory (PSS)", memory.peak_bytes / 1e9, "GB"))
    print_report(
        "engine",
        sizes={**vars(plan), "groups": NUM_GROUPS, "model": checkpoint.name, "full": arguments.full},
        limit=[figure for figure in figures if figure.name.startswith("transformers")],
        figures=figures,
        bars=[
            *list_bars(plan, arguments.full, ours, theirs, memory.peak_bytes, weight_gb),
            *list_costs(arguments.full, ours, exact),
        ],
        as_line=arguments.json,
        notes=["ours is asked through the router's gRPC Generate, one call per sequence, all from one client process"],
    )


class Prompts:
    """Random token ids, none of them twice the same; the order of calls decides, so every run asks the same."""

    def __init__(self, vocab_size: int) -> None:
        self._random = random.Random(0)
        self._vocab_size = vocab_size

    def draw(self, length: int) -> list[int]:
        # The first ids are special tokens.
        return [self._random.randrange(5, self._vocab_size) for _ in range(length)]

    def draw_batch(self, count: int, length: int) -> list[list[int]]:
        return [self.draw(length) for _ in range(count)]


def measure_router(
    router: ExtraRouter, experts: Sequence[ManagedProcess], prompts: Prompts, plan: Plan, samples: Samples
) -> None:
    endpoint = router.endpoint
    pids = (router.process.pid, [process.pid for process in experts])
    for batch in plan.batches:
        drawn = prompts.draw_batch(batch, plan.prompt_length)
        decoding = uvloop.run(decode(endpoint, *pids, drawn, plan.output_length))
        print(f"{endpoint} batch {batch}: {decoding.tokens_per_s:.1f} tokens/s", file=sys.stderr, flush=True)
        samples.decoding.setdefault(batch, []).append(decoding)
    samples.prefill_s.append(uvloop.run(first_token_s(endpoint, prompts.draw(plan.prefill_length))))
    prefix = prompts.draw(plan.prefix_length)
    samples.first_prefix_s.append(uvloop.run(first_token_s(endpoint, prefix + prompts.draw(8))))
    samples.second_prefix_s.append(uvloop.run(first_token_s(endpoint, prefix + prompts.draw(8))))


async def decode(
    endpoint: str, router_pid: int, expert_pids: Sequence[int], prompts: Sequence[list[int]], num_tokens: int
) -> Decoding:
    """All prompts at once, num_tokens each."""
    arrivals_s: list[list[float]] = [[] for _ in prompts]
    num_waiting = len(prompts)
    processes = [[psutil.Process(router_pid)], [psutil.Process(pid) for pid in expert_pids], [psutil.Process()]]
    cpu_s: list[float] = []

    async with grpc.aio.insecure_channel(endpoint) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)

        async def generate(index: int) -> None:
            nonlocal num_waiting
            arrived = arrivals_s[index]
            async for response in stub.Generate(build_request(prompts[index], num_tokens), timeout=CALL_TIMEOUT_S):
                now_s = time.perf_counter()
                if not arrived:
                    num_waiting -= 1
                    if num_waiting == 0:
                        cpu_s.extend(map(sum_cpu_s, processes))
                arrived.extend([now_s] * len(response.tokens))

        before = await stub.Status(router_pb2.StatusRequest(), timeout=CALL_TIMEOUT_S)
        await asyncio.gather(*(generate(index) for index in range(len(prompts))))
        cpu_s.extend(map(sum_cpu_s, processes))
        after = await stub.Status(router_pb2.StatusRequest(), timeout=CALL_TIMEOUT_S)
    start_s = max(arrived[0] for arrived in arrivals_s)
    end_s = min(arrived[-1] for arrived in arrivals_s)
    num_in_window = sum(start_s < at_s <= end_s for arrived in arrivals_s for at_s in arrived)
    # Without speculative tokens every step gives every sequence one.
    num_steps = max(1.0, num_in_window / len(prompts))
    spent_ms = [(after - before) * 1e3 / num_steps for before, after in zip(cpu_s[:3], cpu_s[3:], strict=True)]
    window_s = end_s - start_s
    return Decoding(num_in_window / window_s, window_s * 1e3 / num_steps, *spent_ms, parts_ms=divide(before, after))


def divide(before: router_pb2.StatusResponse, after: router_pb2.StatusResponse) -> dict[str, float]:
    """Milliseconds of each part of the steps between two reports, per step."""
    num_steps = max(1, after.num_steps - before.num_steps)
    names = [name.removesuffix("_ns") for name in router_pb2.StepTimes.DESCRIPTOR.fields_by_name]
    return {
        name: round(
            (getattr(after.step_times, f"{name}_ns") - getattr(before.step_times, f"{name}_ns")) / num_steps / 1e6, 3
        )
        for name in names
    }


def sum_cpu_s(processes: Sequence[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


async def first_token_s(endpoint: str, prompt: list[int]) -> float:
    """Seconds from asking to the first token."""
    async with grpc.aio.insecure_channel(endpoint) as channel:
        await channel.channel_ready()
        stub = router_pb2_grpc.RouterServiceStub(channel)
        started_s = time.perf_counter()
        async for _ in stub.Generate(build_request(prompt, 1), timeout=CALL_TIMEOUT_S):
            pass
        return time.perf_counter() - started_s


def build_request(prompt: list[int], max_tokens: int) -> router_pb2.GenerateRequest:
    return router_pb2.GenerateRequest(
        request_id="benchmark",
        prompt_token_ids=prompt,
        sampling=router_pb2.SamplingParams(temperature=0.0, top_p=1.0),
        max_tokens=max_tokens,
        ignore_eos=True,
    )


def measure_agreement(endpoint: str, worker: Worker, prompts: Prompts) -> Figure:
    """Both serve the same model: the logprobs of a random prompt's tokens, side by side."""
    prompt = prompts.draw(64)
    request = build_request(prompt, 0)
    request.prompt_logprobs = 0

    async def fetch() -> list[float]:
        async with grpc.aio.insecure_channel(endpoint) as channel:
            stub = router_pb2_grpc.RouterServiceStub(channel)
            tokens: list[router_pb2.TokenOutput] = []
            async for response in stub.Generate(request, timeout=CALL_TIMEOUT_S):
                tokens.extend(response.prompt_tokens)
            return [token.logprob for token in tokens[1:]]

    theirs = worker.ask(kind="logprobs", prompt=prompt)["logprobs"]
    differences = [abs(ours - other) for ours, other in zip(uvloop.run(fetch()), theirs, strict=True)]
    return summarize("difference of logprobs, ours against transformers", differences, "nat")


def measure_worker(worker: Worker, prompts: Prompts, plan: Plan, samples: Samples, *, warm_up: bool) -> None:
    for batch in plan.batches:
        drawn = prompts.draw_batch(batch, plan.prompt_length)
        steps = 2 if warm_up else min(plan.output_length, THEIR_STEPS.get(batch, 12))
        taken_s: list[float] = worker.ask(kind="decode", prompts=drawn, steps=steps)["seconds"]
        step_s = sum(taken_s) / len(taken_s)
        samples.decoding.setdefault(batch, []).append(Decoding(batch / step_s, step_s * 1e3, 0, 0, 0))
    taken_s = worker.ask(kind="prefill", prompt=prompts.draw(plan.prefill_length))["seconds"]
    samples.prefill_s.extend(taken_s)


def serve_transformers(checkpoint: Path, num_threads: int) -> None:
    """The other side's process: answers one JSON line per question."""
    from tests.benchmarks.transformers_loop import TransformersLoop

    loop = TransformersLoop(checkpoint, num_threads)
    print(json.dumps({"version": loop.version}), flush=True)

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        if question["kind"] == "decode":
            return {"seconds": loop.decode_s(question["prompts"], question["steps"])}
        if question["kind"] == "prefill":
            return {"seconds": [loop.prefill_s(question["prompt"])]}
        return {"logprobs": loop.prompt_logprobs(question["prompt"])}

    answer_questions(answer)


def describe(samples: Samples, who: str) -> list[Figure]:
    figures: list[Figure] = []
    for batch, rounds in samples.decoding.items():
        middle = sorted(rounds)[len(rounds) // 2]
        details = {"batch": batch, "step_ms": round(statistics.median(one.step_ms for one in rounds), 2)}
        if middle.experts_ms:
            details["cpu_ms_per_step"] = {
                "router": round(middle.router_ms, 2),
                "expert_groups": round(middle.experts_ms, 2),
                "client": round(middle.client_ms, 2),
            }
        if middle.parts_ms is not None:
            details["parts_ms_per_step"] = middle.parts_ms
        figures.append(summarize(f"{who}: decode", [one.tokens_per_s for one in rounds], "tokens/s", **details))
    for name, taken_s in (
        ("prefill to the first token", samples.prefill_s),
        ("first token of a new prefix", samples.first_prefix_s),
        ("first token of the same prefix again", samples.second_prefix_s),
    ):
        if taken_s:
            figures.append(summarize(f"{who}: {name}", [second * 1e3 for second in taken_s], "ms"))
    return figures


def list_bars(plan: Plan, full: bool, ours: Samples, theirs: Samples, peak_bytes: int, weight_gb: float) -> list[Bar]:
    both = bool(ours.decoding and theirs.decoding)
    note = "" if full and both else "measured only with --full, and against transformers"
    bars: list[Bar] = []
    for batch, asked in DECODE_BARS.items():
        ratio = None
        if not note and batch in ours.decoding:
            ratio = median_rate(ours, batch) / median_rate(theirs, batch)
        bars.append(Bar(f"decode at batch {batch}, against transformers", asked, ratio, "x", "high", note))
    ratio = None if note else statistics.median(theirs.prefill_s) / statistics.median(ours.prefill_s)
    name = f"prefill of one {plan.prefill_length}-token prompt, against transformers"
    bars.append(Bar(name, PREFILL_BAR, ratio, "x", "high", note))
    note = "" if full and ours.prefill_s else "measured only with --full, for ours"
    excess = peak_bytes / 1e9 - weight_gb - count_cache_bytes(plan) / 1e9
    name = "memory of our processes over weights and KV"
    bars.append(Bar(name, MEMORY_OVERHEAD_GB, None if note else excess, "GB", "low", note))
    ratio = None if note else statistics.median(ours.second_prefix_s) / statistics.median(ours.first_prefix_s)
    name = f"first token of a {plan.prefix_length}-token prefix seen before, against the first time"
    bars.append(Bar(name, SHARED_PREFIX_BAR, ratio, "x", "low", note))
    return bars


def list_costs(full: bool, ours: Samples, exact: Samples) -> Iterator[Bar]:
    """Of determinism: the share of the fast way's throughput that is lost; below 0, it was faster."""
    note = "" if full and exact.decoding else "measured only with --full, and with the deterministic router"
    for batch in DECODE_BARS:
        cost = None
        if not note and batch in exact.decoding:
            cost = 1 - median_rate(exact, batch) / median_rate(ours, batch)
        yield Bar(f"cost of --deterministic, decode at batch {batch}", DETERMINISM_BAR, cost, "share", "low", note)
    cost = None if note else 1 - statistics.median(ours.prefill_s) / statistics.median(exact.prefill_s)
    yield Bar("cost of --deterministic, prefill", DETERMINISM_BAR, cost, "share", "low", note)


def count_cache_bytes(plan: Plan) -> int:
    """Of the tokens held at once, at most: nothing that the engine reserves beyond them."""
    config = build_model(full=True)
    num_tokens = max(max(plan.batches) * (plan.prompt_length + plan.output_length), plan.prefix_length)
    return num_tokens * config["num_hidden_layers"] * (config["kv_lora_rank"] + config["qk_rope_head_dim"]) * 2


def median_rate(samples: Samples, batch: int) -> float:
    return statistics.median(one.tokens_per_s for one in samples.decoding[batch])


def read_peak_rss_bytes(pid: int) -> int:
    """VmHWM: the largest resident set since the start, pages shared with other processes included."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main()
