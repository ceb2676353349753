"""What keys, limits, accounting and fair sharing cost, and how well shares hold, on real processes.

    python tests/benchmarks/tenancy.py [--json] [--full] [--part overhead|fcfs|shares ...] [--rounds 7]

overhead: 32 streams at once through two HTTP fronts of the same router, in turns: one without keys, one with a key
file, limits, journal and ledger. Metrics are counted by both.
fcfs: a mix of teams with short and long answers on a router that shares out and on one that serves by arrival, in
turns.
shares: two teams of weights 1 and 2, each with more streams than run at once, at two fronts and two routers.
The client is a few lines on a socket in this process. --full: the demo checkpoint; the default is a tiny random one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from router.tenancy.key_file import Limits, TeamEntry, make_key, new_key_file, save_key_file, set_team
from tests.benchmarks.report import REPOSITORY, Bar, Figure, add_json_option, print_report, summarize
from tests.local_stack import (
    START_TIMEOUT_S,
    ExtraRouter,
    ManagedProcess,
    StackOptions,
    api_arguments,
    extra_router,
    local_stack,
)
from tests.random_checkpoint import write_random_checkpoint

DEMO_CHECKPOINT = REPOSITORY / "deploy/demo/checkpoint"
PARTS = ("overhead", "fcfs", "shares")
BATCH = 32
WEIGHTS = {"red": 1.0, "blue": 2.0}
# Far above what is used: kept, and never reached.
WIDE_LIMITS = Limits(requests_per_minute=10**6, tokens_per_minute=10**9, parallel=10**4)
NOT_IN_THIS_RUN = "not in this run: --part"


class Front(NamedTuple):
    port: int
    keys: dict[str, str]


class Stream(NamedTuple):
    """One request."""

    team: str
    num_prompt: int
    num_answer: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    parser.add_argument("--full", action="store_true", help="the demo checkpoint, and rounds of a few seconds")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all")
    parser.add_argument("--rounds", type=int, default=3, help="of each kind, in turns")
    arguments = parser.parse_args()
    parts = arguments.part or PARTS
    figures: list[Figure] = []
    measured: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = DEMO_CHECKPOINT
        if not arguments.full:
            checkpoint = Path(folder) / "checkpoint"
            write_random_checkpoint(checkpoint, seed=0)
        for part in parts:
            bench = Bench(checkpoint, Path(folder) / part, arguments.full, arguments.rounds)
            measured |= bench.run(part, figures)
    print_report(
        "tenancy",
        sizes={"checkpoint": checkpoint.name, "batch": BATCH, "rounds": arguments.rounds, "weights": WEIGHTS},
        limit=[figure for figure in figures if figure.name in ("tokens_per_s_without", "tokens_per_s_fcfs")],
        figures=figures,
        bars=[
            _bar("overhead of auth, limits, accounting", 3.0, measured.get("overhead"), "%", "low"),
            _bar(
                "throughput of fair sharing against first come, first served", 95.0, measured.get("fcfs"), "%", "high"
            ),
            _bar("weights of two teams, off by", 5.0, measured.get("shares"), "%", "low"),
        ],
        as_line=arguments.json,
    )


def _bar(name: str, asked: float, measured: float | None, unit: str, best: str) -> Bar:
    note = NOT_IN_THIS_RUN if measured is None else ""
    return Bar(name, asked, measured, unit, "low" if best == "low" else "high", note)


class Bench:
    """One part after the other, each on processes of its own."""

    def __init__(self, checkpoint: Path, folder: Path, is_full: bool, num_rounds: int) -> None:
        self._checkpoint = checkpoint
        self._folder = folder
        self._is_full = is_full
        self._num_rounds = num_rounds

    def run(self, part: str, figures: list[Figure]) -> dict[str, float]:
        self._folder.mkdir(parents=True)
        measure: Callable[[list[Figure]], float] = getattr(self, f"_measure_{part}")
        return {part: measure(figures)}

    def _measure_overhead(self, figures: list[Figure]) -> float:
        """Per cent of the throughput."""
        streams = [Stream("red", 16, 64 if self._is_full else 16)] * BATCH
        with ExitStack() as stack:
            routers = stack.enter_context(self._routers([()]))
            fronts = {
                "without": stack.enter_context(self._front(routers, has_keys=False)),
                "with": stack.enter_context(self._front(routers, has_keys=True)),
            }
            rates = self._alternate(fronts, streams)
        figures += [summarize(f"tokens_per_s_{name}", samples, "tokens/s") for name, samples in rates.items()]
        # Neighbours in time share the weather of the machine.
        ratios = [one / other for one, other in zip(rates["with"], rates["without"], strict=True)]
        figures.append(summarize("with_over_without", ratios, "ratio"))
        return 100 * (1 - median(ratios))

    def _measure_fcfs(self, figures: list[Figure]) -> float:
        """Per cent of the throughput by arrival."""
        scale = 2 if self._is_full else 1
        # By arrival, all long answers end at once; shared out, the last few decode in a batch that is not full, which
        # a load that goes on would fill. So many streams that this end is a small part of a round.
        streams = [Stream("red", 8, 8 * scale)] * 48 + [Stream("blue", 64, 48 * scale)] * 16
        streams *= 8 if self._is_full else 1
        few = ("--max-num-seqs", "16")
        with ExitStack() as stack:
            routers = stack.enter_context(self._routers([few, (*few, "--queue-policy", "fcfs")]))
            fronts = {
                name: stack.enter_context(self._front([router], has_keys=True))
                for name, router in zip(("fair", "fcfs"), routers, strict=True)
            }
            rates = self._alternate(fronts, streams)
        figures += [summarize(f"tokens_per_s_{name}", samples, "tokens/s") for name, samples in rates.items()]
        ratios = [one / other for one, other in zip(rates["fair"], rates["fcfs"], strict=True)]
        figures.append(summarize("fair_over_fcfs", ratios, "ratio"))
        return 100 * median(ratios)

    def _measure_shares(self, figures: list[Figure]) -> float:
        """Per cent by which the share of blue in what both got is off."""
        few = ("--max-num-seqs", "6")
        with ExitStack() as stack:
            routers = stack.enter_context(self._routers([few, few]))
            fronts = [stack.enter_context(self._front(routers, has_keys=True)) for _ in WEIGHTS]
            duration_s = 60.0 if self._is_full else 5.0
            served, elapsed_s = asyncio.run(_keep_both_busy(fronts, duration_s))
        ratio = served["blue"] / served["red"]
        figures.append(Figure("served_blue_over_red", ratio, "ratio", {"seconds": round(elapsed_s, 1), **served}))
        return 100 * abs(ratio / (WEIGHTS["blue"] / WEIGHTS["red"]) - 1)

    def _alternate(self, fronts: dict[str, Front], streams: Sequence[Stream]) -> dict[str, list[float]]:
        num_tokens = sum(stream.num_answer for stream in streams)
        rates: dict[str, list[float]] = {name: [] for name in fronts}
        for index in range(-1, self._num_rounds):  # the first one warms up
            names = list(fronts)
            for name in names if index % 2 else reversed(names):
                started_s = time.perf_counter()
                asyncio.run(_send_all(fronts[name], streams))
                if index >= 0:
                    rates[name].append(num_tokens / (time.perf_counter() - started_s))
        return rates

    @contextmanager
    def _routers(self, arguments: Sequence[tuple[str, ...]]) -> Iterator[list[ExtraRouter]]:
        options = [
            StackOptions(num_groups=2, dtype="bfloat16", wire_dtype="bfloat16", api=False, extra_router_arguments=each)
            for each in arguments
        ]
        with ExitStack() as stack:
            running = stack.enter_context(local_stack(self._checkpoint, self._folder / "stack", options[0]))
            further = [stack.enter_context(extra_router(running, each)) for each in options[1:]]
            yield [ExtraRouter(running.router, running.router_endpoint), *further]

    @contextmanager
    def _front(self, routers: Sequence[ExtraRouter], *, has_keys: bool) -> Iterator[Front]:
        arguments = api_arguments(self._checkpoint, [router.port for router in routers], 0)
        keys: dict[str, str] = {}
        if has_keys:
            path = self._folder / "keys.json"
            file, now = new_key_file(), datetime.now(UTC)
            for team, weight in WEIGHTS.items():
                file = set_team(file, team, TeamEntry(weight=weight, limits=WIDE_LIMITS))
                file, new = make_key(file, team, now, limits=WIDE_LIMITS)
                keys[team] = new.text
            path = path.with_stem(f"keys-{time.monotonic_ns()}")
            save_key_file(path, file)
            arguments += ["--keys-file", str(path), "--usage-journal", str(self._folder / "journal")]
            arguments += ["--ledger", f"sqlite:///{self._folder / 'ledger.db'}"]
        process = ManagedProcess("api", arguments, self._folder)
        try:
            url: str = process.wait_ready(time.monotonic() + START_TIMEOUT_S)["url"]
            yield Front(int(url.rpartition(":")[2]), keys)
        finally:
            process.stop()


async def _send_all(front: Front, streams: Sequence[Stream]) -> None:
    counts = await asyncio.gather(*(_send(front, stream, index) for index, stream in enumerate(streams)))
    assert counts == [stream.num_answer for stream in streams], "an answer was cut short"


async def _keep_both_busy(fronts: Sequence[Front], duration_s: float) -> tuple[dict[str, float], float]:
    """What each team was served (prompts once, answers twice) in duration_s, after a start."""
    served = dict.fromkeys(WEIGHTS, 0.0)
    lengths = {"red": 12, "blue": 20}

    async def keep_busy(front: Front, team: str, number: int) -> None:
        stream = Stream(team, 4, lengths[team])
        while True:
            await _send(front, stream, number, lambda count: served.update({team: served[team] + 2 * count}))
            served[team] += stream.num_prompt
            number += 1000

    tasks = [
        asyncio.create_task(keep_busy(front, team, number))
        for front, team in zip(fronts, WEIGHTS, strict=True)
        for number in range(30)
    ]
    await asyncio.sleep(duration_s / 6)
    before, started_s = dict(served), time.perf_counter()
    await asyncio.sleep(duration_s)
    elapsed_s = time.perf_counter() - started_s
    grown = {team: served[team] - before[team] for team in WEIGHTS}
    for task in tasks:
        task.cancel()
    failures = [one for one in await asyncio.gather(*tasks, return_exceptions=True) if isinstance(one, Exception)]
    assert not failures, failures[0]
    return grown, elapsed_s


async def _send(front: Front, stream: Stream, number: int, on_tokens: Callable[[int], None] = lambda _: None) -> int:
    """Stream one answer. on_tokens: called with the number of tokens of every piece. Returns their number."""
    prompt = [2 + (number * 7 + index * 13) % 190 for index in range(stream.num_prompt)]
    body = json.dumps(
        {"prompt": prompt, "max_tokens": stream.num_answer, "ignore_eos": True, "stream": True, "logprobs": 0,
         "seed": number}
    )  # fmt: skip
    key = f"Authorization: Bearer {front.keys[stream.team]}\r\n" if front.keys else ""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{key}"
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    try:
        writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        count = 0
        status = await reader.readline()
        assert b" 200 " in status, status + await reader.read()
        while line := await reader.readline():
            if line.startswith(b"data: {") and b'"token_logprobs":[' in line:
                tokens = line.partition(b'"token_logprobs":[')[2].partition(b"]")[0]
                num_tokens = tokens.count(b",") + 1 if tokens else 0
                count += num_tokens
                on_tokens(num_tokens)
        return count
    finally:
        writer.close()


if __name__ == "__main__":
    main()
