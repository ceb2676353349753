"""What the loss of an expert replica costs the streams: errors, wrong tokens, and longer gaps between tokens.

    python tests/benchmarks/failover.py [--json] [--full] [--checkpoint DIR]

Two replicas of each expert group, a router and as many streams as asked for, all as plain processes; whatever is
killed is started again on its port, as a supervisor would. The same greedy streams run once without a fault, which
gives the tokens to compare with; then the gaps are measured without a fault; while replicas are killed with SIGKILL, at
random, each once all are ready again; while one is stopped with SIGSTOP, until it was found; and while one answers ten
times slower, by an in-path proxy that delays it by nine times what a frame took before. Every stream that ends is
replaced, so the load is the same all the time. "Added" by a kill is the longest gap of any stream from the kill until
all replicas are ready again, less the median gap without a fault. --full: the demo checkpoint, 4 groups, 16 streams and
10 kills; the default is a tiny random checkpoint, 2 groups, 4 streams and 1 kill, and only shows that it works.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import grpc
import grpc.aio

from router.v1 import router_pb2, router_pb2_grpc
from tests.benchmarks.report import REPOSITORY, Bar, Figure, add_json_option, print_report, summarize
from tests.local_stack import START_TIMEOUT_S, LocalStack, StackOptions, local_stack
from tests.random_checkpoint import write_random_checkpoint
from tests.tcp_proxy import TcpProxy

DEMO_CHECKPOINT = REPOSITORY / "deploy/demo/checkpoint"
NUM_REPLICAS = 2
PROMPT_TOKENS = 32
CALL_TIMEOUT_S = 300.0
# Issue 5, "What it must show".
MOST_ADDED_S, MOST_MEDIAN_ADDED_S, MOST_REROUTE_S, MOST_SLOWDOWN = 0.4, 0.1, 1.0, 2.0
SLOW_FACTOR = 10


class Gap(NamedTuple):
    """Between two messages of a stream, of time.monotonic."""

    began_s: float
    ended_s: float

    @property
    def length_s(self) -> float:
        return self.ended_s - self.began_s


class Streams:
    """So many greedy streams at once, each replaced when it ends. gaps: of all of them."""

    def __init__(self, channel: grpc.aio.Channel, sizes: Sizes) -> None:
        self._stub = router_pb2_grpc.RouterServiceStub(channel)
        self._sizes = sizes
        self._numbers = itertools.count()
        self._is_over = False
        self.expected: dict[int, list[int]] = {}
        self.gaps: list[Gap] = []
        self.num_ended = 0
        self.num_failed = 0
        self.num_wrong = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Streams inside; those that run at the end run to their own end."""
        self._is_over = False
        tasks = [asyncio.create_task(self._run()) for _ in range(self._sizes.num_streams)]
        try:
            yield
        finally:
            self._is_over = True
            await asyncio.gather(*tasks)

    def longest_gap(self, since_s: float) -> float:
        """Of those that ended since."""
        return max((gap.length_s for gap in self.gaps if gap.ended_s >= since_s), default=0.0)

    def gaps_since(self, since_s: float) -> list[float]:
        return [gap.length_s for gap in self.gaps if gap.began_s >= since_s]

    async def _run(self) -> None:
        while not self._is_over:
            prompt = next(self._numbers) % self._sizes.num_streams
            try:
                tokens = await self._stream(prompt)
            except grpc.RpcError as error:
                print(f"a stream failed: {error}", file=sys.stderr)
                self.num_failed += 1
                await asyncio.sleep(0.1)
                continue
            self.num_ended += 1
            self.num_wrong += tokens != self.expected.setdefault(prompt, tokens)

    async def _stream(self, prompt: int) -> list[int]:
        request = router_pb2.GenerateRequest(
            request_id=f"failover-{prompt}",
            prompt_token_ids=random.Random(prompt).sample(range(10, 200), PROMPT_TOKENS),
            sampling=router_pb2.SamplingParams(temperature=0.0, top_p=1.0),
            max_tokens=self._sizes.num_tokens,
            ignore_eos=True,
        )
        tokens: list[int] = []
        last_s: float | None = None
        async for response in self._stub.Generate(request, timeout=CALL_TIMEOUT_S):
            now_s = time.monotonic()
            tokens += [token.token_id for token in response.tokens]
            if last_s is not None:
                self.gaps.append(Gap(last_s, now_s))
            last_s = now_s
        return tokens


class Sizes(NamedTuple):
    num_groups: int
    num_streams: int
    num_tokens: int
    num_kills: int
    phase_s: float


class Results(NamedTuple):
    """Seconds. added_s: of each kill. slow_gaps_s: while a replica was slow, after calm_gaps_s."""

    calm_gaps_s: list[float]
    added_s: list[float]
    recovery_s: list[float]
    stop_gap_s: float
    found_s: float
    slow_gaps_s: list[float]
    frame_s: float
    num_ended: int
    num_failed: int
    num_wrong: int
    status: router_pb2.StatusResponse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    parser.add_argument("--full", action="store_true", help="the demo checkpoint and the load that was asked for")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--kills", type=int, help="default: 1, with --full 10")
    parser.add_argument("--phase-s", type=float, help="seconds of each measurement; default: 1, with --full 8")
    options = parser.parse_args()
    sizes = Sizes(4, 16, 100, 10, 8.0) if options.full else Sizes(2, 4, 40, 1, 1.0)
    sizes = sizes._replace(num_kills=options.kills or sizes.num_kills, phase_s=options.phase_s or sizes.phase_s)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.checkpoint or DEMO_CHECKPOINT
        if not options.full and options.checkpoint is None:
            checkpoint = Path(folder) / "checkpoint"
            write_random_checkpoint(checkpoint)
        results = measure(checkpoint, Path(folder) / "logs", sizes)
    report(results, sizes, checkpoint.name, options.full, options.json)


def measure(checkpoint: Path, logs: Path, sizes: Sizes) -> Results:
    stack_options = StackOptions(
        num_groups=sizes.num_groups,
        num_replicas=NUM_REPLICAS,
        dtype="bfloat16",
        wire_dtype="bfloat16",
        deterministic=True,
        proxied_expert=0,
        api=False,
    )
    with local_stack(checkpoint, logs, stack_options) as stack:
        assert stack.expert_proxy is not None
        return asyncio.run(disturb(stack, stack.expert_proxy, sizes))


async def disturb(stack: LocalStack, proxy: TcpProxy, sizes: Sizes) -> Results:
    async with grpc.aio.insecure_channel(stack.router_endpoint) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        streams = Streams(channel, sizes)
        async with streams.running():  # every prompt once: the tokens to compare with
            pass
        async with streams.running():
            calm = await watch(streams, sizes.phase_s)
            # The longest that happens anyway in so many seconds is no one's fault.
            usual_s = statistics.median(calm)
            added_s: list[float] = []
            recovery_s: list[float] = []
            chooser = random.Random(7)
            for _ in range(sizes.num_kills):
                await wait_whole(stub, stack)
                killed = chooser.randrange(len(stack.experts))
                killed_s = time.monotonic()
                stack.experts[killed].kill()
                stack.restart_expert(killed)
                await wait_whole(stub, stack)
                recovery_s.append(time.monotonic() - killed_s)
                added_s.append(streams.longest_gap(killed_s) - usual_s)
            await watch(streams, sizes.phase_s / 2)
            stop_gap_s, found_s = await stop_one(stack, stub, streams)
            await wait_whole(stub, stack)
            before = await watch(streams, sizes.phase_s)
            frame_s = await measure_frame(stub)
            proxy.set_delay((SLOW_FACTOR - 1) * frame_s * 1000 / 2)
            slow = await watch(streams, sizes.phase_s)
            proxy.set_delay(0.0)
        status = await stub.Status(router_pb2.StatusRequest(), timeout=CALL_TIMEOUT_S)
    return Results(
        [*calm, *before],
        added_s,
        recovery_s,
        stop_gap_s - usual_s,
        found_s,
        slow,
        frame_s,
        streams.num_ended,
        streams.num_failed,
        streams.num_wrong,
        status,
    )


async def watch(streams: Streams, seconds: float) -> list[float]:
    since_s = time.monotonic()
    await asyncio.sleep(seconds)
    return streams.gaps_since(since_s)


async def wait_whole(stub: router_pb2_grpc.RouterServiceStub, stack: LocalStack) -> None:
    """Until every replica is connected. Raises TimeoutError."""
    async with asyncio.timeout(START_TIMEOUT_S):
        while True:
            status = await stub.Status(router_pb2.StatusRequest(), timeout=CALL_TIMEOUT_S)
            if len(status.connected_replica_ids) == len(stack.experts):
                return
            await asyncio.sleep(0.05)


async def stop_one(stack: LocalStack, stub: router_pb2_grpc.RouterServiceStub, streams: Streams) -> tuple[float, float]:
    """SIGSTOP a replica until it was found. Returns the longest gap, and the seconds until it was found."""
    stopped = stack.experts[-1]
    stopped_s = time.monotonic()
    stopped.send_signal(signal.SIGSTOP)
    try:
        async with asyncio.timeout(CALL_TIMEOUT_S):
            while True:
                status = await stub.Status(router_pb2.StatusRequest(), timeout=CALL_TIMEOUT_S)
                if len(status.connected_replica_ids) < len(stack.experts):
                    break
                await asyncio.sleep(0.01)
        found_s = time.monotonic() - stopped_s
        await asyncio.sleep(1.0)
        return streams.longest_gap(stopped_s), found_s
    finally:
        stopped.send_signal(signal.SIGCONT)


async def measure_frame(stub: router_pb2_grpc.RouterServiceStub) -> float:
    """Seconds that a replica takes for a frame now, as the router sees it."""
    status = await stub.Status(router_pb2.StatusRequest(), timeout=CALL_TIMEOUT_S)
    return statistics.median(replica.frame_ms for replica in status.replicas) / 1000


def report(results: Results, sizes: Sizes, name: str, is_full: bool, as_line: bool) -> None:
    p99_calm_s, p99_slow_s = (find_p99(gaps) for gaps in (results.calm_gaps_s, results.slow_gaps_s))
    median_added_s = statistics.median(results.added_s)
    dispatch = results.status.dispatch
    note = "" if is_full else "a tiny checkpoint and few streams: shows that it works"
    counters = {field.name: value for field, value in dispatch.ListFields() if field.name != "errors"}
    milliseconds = [gap_s * 1000 for gap_s in results.calm_gaps_s]
    print_report(
        "failover",
        sizes={"checkpoint": name, "num_replicas": NUM_REPLICAS, **sizes._asdict()},
        limit=[summarize("gap without a fault", milliseconds, "ms")],
        figures=[
            Figure("longest gap added by a kill", max(results.added_s), "s", {"each": results.added_s}),
            Figure("all replicas ready again after a kill", statistics.median(results.recovery_s), "s"),
            Figure("frame that was made ten times slower", results.frame_s * 1000, "ms"),
            Figure("longest gap added by SIGSTOP", results.stop_gap_s, "s"),
            Figure("p99 gap without a fault", p99_calm_s * 1000, "ms"),
            Figure("p99 gap with a replica ten times slower", p99_slow_s * 1000, "ms"),
            Figure("streams that ended", results.num_ended, "streams", {**counters, "errors": dict(dispatch.errors)}),
        ],
        bars=[
            Bar("failed requests", 0, results.num_failed, "requests", "low", note),
            Bar("streams with other tokens than without a fault", 0, results.num_wrong, "streams", "low", note),
            Bar("longest gap added by SIGKILL", MOST_ADDED_S, max(results.added_s), "s", "low", note),
            Bar("median gap added by SIGKILL", MOST_MEDIAN_ADDED_S, median_added_s, "s", "low", note),
            Bar("SIGSTOP to rerouted", MOST_REROUTE_S, results.found_s, "s", "low", note),
            Bar("p99 gap, one replica 10x slower", MOST_SLOWDOWN, p99_slow_s / p99_calm_s, "times", "low", note),
        ],
        as_line=as_line,
    )  # fmt: skip


def find_p99(gaps: Sequence[float]) -> float:
    ordered = sorted(gaps)
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


if __name__ == "__main__":
    main()
