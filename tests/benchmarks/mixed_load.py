"""Mixed requests on a router whose KV cache is too small for them: all answered, every block back, memory flat.

    python tests/benchmarks/mixed_load.py [--json] [--full] [--rounds 3] [--seed 0]

Expert groups as plain processes; the router runs in this one, so that its blocks can be checked, asked over gRPC.
In every round all requests come at once, with prompts and answers of random length; some share prefixes, and a third is
cancelled after a random number of tokens, or while it waits. Memory is what this process, clients included, and the
groups hold after each round. --full: the demo checkpoint, 200 requests of 10 to 1500 tokens in and 1 to 400 out; the
default is a tiny random checkpoint and 24 short requests.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import grpc
import psutil
import torch

from experts.checkpoint import Checkpoint
from router.server import RouterConfig, RouterServer
from router.v1 import router_pb2, router_pb2_grpc
from tests.benchmarks.report import REPOSITORY, Bar, Figure, add_json_option, print_report
from tests.benchmarks.worker_processes import restart_with_data_plane_env
from tests.local_stack import (
    START_TIMEOUT_S,
    ManagedProcess,
    StackOptions,
    expert_arguments,
    stop_all,
    wait_until,
    wait_until_ready,
)
from tests.random_checkpoint import write_random_checkpoint

DEMO_CHECKPOINT = REPOSITORY / "deploy/demo/checkpoint"
CALL_TIMEOUT_S = 1800.0
# What allocators may still take after the first round, which fills the cache and grows every buffer.
MOST_GROWTH = 0.02
NUM_PREFIXES = 5
# After which a request that is to be cancelled before its first token is in the router's queue, or in a step.
CANCEL_WAITING_S = 0.05


class Load(NamedTuple):
    num_requests: int
    prompt_tokens: tuple[int, int]
    answer_tokens: tuple[int, int]
    kv_cache_tokens: int


FULL = Load(200, (10, 1500), (1, 400), kv_cache_tokens=16384)
SMALL = Load(24, (10, 150), (20, 200), kv_cache_tokens=512)


class Planned(NamedTuple):
    """cancel_after: tokens; None: it runs to its end."""

    request: router_pb2.GenerateRequest
    cancel_after: int | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    parser.add_argument("--full", action="store_true", help="the demo checkpoint and the load that was asked for")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, help=f"of a round; default: {SMALL[0]}, with --full {FULL[0]}")
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kv-cache-tokens", type=int, help=f"default: {SMALL[-1]}, with --full {FULL[-1]}")
    parser.add_argument("--deterministic", action="store_true")
    arguments = parser.parse_args()
    restart_with_data_plane_env()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = DEMO_CHECKPOINT
        if not arguments.full:
            checkpoint = Path(folder) / "checkpoint"
            write_random_checkpoint(checkpoint, seed=0)
        measure(arguments, checkpoint, Path(folder))


def measure(arguments: argparse.Namespace, checkpoint: Path, logs: Path) -> None:
    load = FULL if arguments.full else SMALL
    load = load._replace(
        kv_cache_tokens=arguments.kv_cache_tokens or load.kv_cache_tokens,
        num_requests=arguments.requests or load.num_requests,
    )
    options = StackOptions(num_groups=arguments.groups, dtype="bfloat16")
    groups: list[ManagedProcess] = []
    router: RouterServer | None = None
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        for index in range(arguments.groups):
            groups.append(ManagedProcess(f"expert-{index}", expert_arguments(checkpoint, options, index, 0), logs))
        endpoints = tuple(str(group.wait_ready(deadline)["endpoint"]) for group in groups)
        router = RouterServer(
            RouterConfig(
                checkpoint=str(checkpoint),
                dtype=torch.bfloat16,
                deterministic=arguments.deterministic,
                kv_cache_tokens=load.kv_cache_tokens,
                num_threads=1,
                expert_endpoints=endpoints,
            )
        )
        endpoint = router.start()
        router.wait_loaded(START_TIMEOUT_S)
        vocab_size = Checkpoint(checkpoint).config.vocab_size
        rounds: list[Round] = []
        with grpc.insecure_channel(endpoint) as channel:
            wait_until_ready(channel, deadline)
            for number in range(arguments.rounds):
                planned = plan_round(load, vocab_size, arguments.seed + number)
                rounds.append(run_round(router, channel, groups, planned))
                print(f"round {number}: {rounds[-1]}", file=sys.stderr)
    finally:
        if router is not None:
            router.stop()
        stop_all(groups)
    report(arguments, load, checkpoint, rounds)


class Round(NamedTuple):
    """num_wrong: requests that ended in another way than they should have."""

    num_wrong: int
    num_cancelled: int
    num_tokens: int
    num_blocks_leaked: int
    num_preemptions: int
    router_bytes: int
    groups_bytes: int
    duration_s: float


def run_round(
    server: RouterServer, channel: grpc.Channel, groups: Sequence[ManagedProcess], planned: Sequence[Planned]
) -> Round:
    """Raises RuntimeError if the pool is not whole afterwards."""
    engine = server.engine
    assert engine is not None
    num_preemptions = engine.progress().num_preemptions
    started_s = time.monotonic()
    num_tokens = send_all(channel, planned)
    duration_s = time.monotonic() - started_s
    wait_until(
        lambda: engine.progress().num_running + engine.progress().num_waiting == 0,
        time.monotonic() + START_TIMEOUT_S,
        lambda: f"requests are left behind: {engine.progress()}",
    )
    engine.check_integrity()
    gc.collect()
    progress = engine.progress()
    return Round(
        num_wrong=sum(not ended_well(each, got) for each, got in zip(planned, num_tokens, strict=True)),
        num_cancelled=sum(each.cancel_after is not None for each in planned),
        num_tokens=sum(got or 0 for got in num_tokens),
        num_blocks_leaked=progress.num_blocks_held,
        num_preemptions=progress.num_preemptions - num_preemptions,
        router_bytes=psutil.Process().memory_info().rss,
        groups_bytes=sum(psutil.Process(group.pid).memory_info().rss for group in groups),
        duration_s=duration_s,
    )


def ended_well(planned: Planned, num_tokens: int | None) -> bool:
    """num_tokens: that came; None: the request failed."""
    if num_tokens is None:
        return False
    if planned.cancel_after is None:
        return num_tokens == planned.request.max_tokens
    return num_tokens >= planned.cancel_after


def plan_round(load: Load, vocab_size: int, seed: int) -> list[Planned]:
    """Half of the prompts begin as others do; a third of the requests is to be cancelled."""
    rng = random.Random(seed)

    def draw(count: int) -> list[int]:
        return [rng.randrange(3, vocab_size) for _ in range(count)]

    prefixes = [draw(load.prompt_tokens[1]) for _ in range(NUM_PREFIXES)]
    planned: list[Planned] = []
    for number in range(load.num_requests):
        length = rng.randint(*load.prompt_tokens)
        num_shared = rng.randrange(length) if rng.random() < 0.5 else 0
        request = router_pb2.GenerateRequest(
            request_id=f"mixed-{seed}-{number}",
            prompt_token_ids=[*rng.choice(prefixes)[:num_shared], *draw(length - num_shared)],
            sampling=router_pb2.SamplingParams(temperature=rng.choice([0.0, 1.0]), top_p=0.95, seed=number),
            max_tokens=rng.randint(*load.answer_tokens),
            ignore_eos=True,
        )
        is_cancelled = rng.random() < 1 / 3
        planned.append(Planned(request, rng.randrange(request.max_tokens) if is_cancelled else None))
    return planned


def send_all(channel: grpc.Channel, planned: Sequence[Planned]) -> list[int | None]:
    """All at once. Returns how many tokens each gave, None for one that failed."""
    stub = router_pb2_grpc.RouterServiceStub(channel)
    with ThreadPoolExecutor(len(planned)) as pool:
        return list(pool.map(lambda each: send(stub, each), planned))


def send(stub: router_pb2_grpc.RouterServiceStub, planned: Planned) -> int | None:
    call = stub.Generate(planned.request, timeout=CALL_TIMEOUT_S)
    num_tokens = 0
    try:
        if planned.cancel_after == 0:
            time.sleep(CANCEL_WAITING_S)
            call.cancel()
            return 0
        for response in call:
            num_tokens += len(response.tokens)
            if planned.cancel_after is not None and num_tokens >= planned.cancel_after:
                call.cancel()
                return num_tokens
            if response.finish_reason != router_pb2.FINISH_REASON_UNSPECIFIED:
                return num_tokens
    except grpc.RpcError as error:
        print(f"{planned.request.request_id} failed: {error}", file=sys.stderr)
    return None


def report(arguments: argparse.Namespace, load: Load, checkpoint: Path, rounds: Sequence[Round]) -> None:
    figures = [
        Figure(name, value, unit, {"round": number})
        for number, each in enumerate(rounds)
        for name, value, unit in (
            ("tokens answered", each.num_tokens, "tokens"),
            ("preemptions", each.num_preemptions, "sequences"),
            ("cancelled", each.num_cancelled, "requests"),
            ("memory of the router after the round", each.router_bytes / 1e6, "MB"),
            ("memory of the groups after the round", each.groups_bytes / 1e6, "MB"),
            ("duration", each.duration_s, "s"),
        )
    ]
    growth = max(
        rounds[-1].router_bytes / rounds[0].router_bytes - 1, rounds[-1].groups_bytes / rounds[0].groups_bytes - 1
    )
    note = "" if arguments.full else "a tiny load: use --full"
    bars = [
        Bar("requests not answered as asked", 0, sum(each.num_wrong for each in rounds), "requests", "low", note),
        Bar("blocks held after the last request", 0, sum(each.num_blocks_leaked for each in rounds), "blocks", "low"),
        Bar("preemptions: the cache was too small", 1, sum(each.num_preemptions for each in rounds), "", "high"),
        Bar(f"growth of memory from round 1 to {len(rounds)}", MOST_GROWTH, growth, "share", "low", note),
    ]
    print_report(
        "mixed_load",
        sizes={
            "checkpoint": checkpoint.name, "groups": arguments.groups, "rounds": len(rounds),
            "deterministic": arguments.deterministic, **load._asdict(),
        },
        limit=[],
        figures=figures,
        bars=bars,
        as_line=arguments.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
