"""Sends fuzzed requests, many at once, and looks at every answer: no 5xx, no hang, one shape of error.

A victim sends a proper request over and over meanwhile, from a process of its own: what it waits for is the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import multiprocessing.synchronize
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import httpx
import psutil

from tests.fuzz.mutations import FuzzRequest, make_request

# A request that has no answer by then counts as hanging.
HANG_S = 60.0
VICTIM_BODY = {"prompt": "import os", "max_tokens": 4, "temperature": 0}
# For quantiles of its times.
MIN_VICTIM_REQUESTS = 20
STALL_INTERVAL_S = 0.1
# The client of a request that leaves is gone after this long.
LEAVING_S = 0.02


@dataclass
class FuzzReport:
    statuses: Counter[int] = field(default_factory=Counter[int])
    failures: list[str] = field(default_factory=list[str])
    """What was wrong, with the seed that repeats it."""
    victim_s: list[float] = field(default_factory=list[float])
    seconds: float = 0.0
    longest_stall_s: float = 0.0
    """Of the fuzzer itself: a request that hangs for less than that may be the machine's fault."""

    def add(self, other: FuzzReport) -> None:
        self.statuses += other.statuses
        self.failures += other.failures
        self.victim_s += other.victim_s
        self.seconds += other.seconds
        self.longest_stall_s = max(self.longest_stall_s, other.longest_stall_s)

    @property
    def num_requests(self) -> int:
        return self.statuses.total()

    def victim_quantile_s(self, percent: int) -> float:
        return statistics.quantiles(self.victim_s, n=100)[percent - 1]


class Keys(NamedTuple):
    """Of two teams, so that the one's requests are none of the other's business. Empty: the server has no keys."""

    fuzzer: str = ""
    victim: str = ""


NO_KEYS = Keys()


def run_fuzz(
    url: str,
    seeds: Sequence[int],
    *,
    parallel: int,
    make: Callable[[int], FuzzRequest] = make_request,
    keys: Keys = NO_KEYS,
) -> FuzzReport:
    """make: the request of a seed."""
    spawning = multiprocessing.get_context("spawn")
    has_begun, is_over = spawning.Event(), spawning.Event()
    with ProcessPoolExecutor(1, spawning, _keep, (has_begun, is_over)) as victims:
        victim = victims.submit(_suffer_on, url, keys.victim)
        try:
            assert has_begun.wait(HANG_S), "the victim did not begin"
            report = asyncio.run(_run(url, seeds, parallel, make, keys.fuzzer))
        finally:
            is_over.set()
        report.victim_s, failures = victim.result(2 * HANG_S)
    report.failures += failures
    return report


def measure_victim(url: str, num_requests: int, key: str = "") -> FuzzReport:
    """The victim alone."""
    report = FuzzReport()
    with httpx.Client(base_url=url, timeout=HANG_S, trust_env=False, headers=_write_key(key)) as client:
        for _ in range(num_requests):
            _suffer_once(client, report.victim_s, report.failures)
    return report


def read_resident_bytes(pids: Mapping[str, int]) -> dict[str, int]:
    """Of each process, and of the children that it has, together."""
    resident: dict[str, int] = {}
    for name, pid in pids.items():
        process = psutil.Process(pid)
        resident[name] = process.memory_info().rss
        if children := process.children(recursive=True):
            resident[f"{name}'s children"] = sum(child.memory_info().rss for child in children)
    return resident


def fill_kv_cache(url: str, num_tokens: int, length: int, vocab_size: int, key: str = "") -> None:
    """Have all blocks of a router's cache written once: pages that nobody has touched yet are no memory yet."""
    random_ = random.Random(0)
    with (
        httpx.Client(base_url=url, timeout=HANG_S, trust_env=False, headers=_write_key(key)) as client,
        ThreadPoolExecutor(4) as threads,
    ):

        def prefill(prompt: list[int]) -> None:
            client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1}).raise_for_status()

        # The last token's row is not written.
        prompts = [[random_.randrange(vocab_size) for _ in range(length - 1)] for _ in range(num_tokens // length + 1)]
        list(threads.map(prefill, prompts))


def _write_key(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


async def _run(
    url: str, seeds: Sequence[int], parallel: int, make: Callable[[int], FuzzRequest], key: str
) -> FuzzReport:
    report = FuzzReport()
    remaining = iter(seeds)
    limits = httpx.Limits(max_connections=parallel, max_keepalive_connections=parallel)
    started_s = time.monotonic()
    headers = _write_key(key)
    async with httpx.AsyncClient(
        base_url=url, timeout=HANG_S, limits=limits, trust_env=False, headers=headers
    ) as client:
        watch = asyncio.create_task(_watch(report))
        async with asyncio.TaskGroup() as group:
            for _ in range(parallel):
                group.create_task(_work(client, remaining, report, make))
        watch.cancel()
    report.seconds = time.monotonic() - started_s
    return report


async def _watch(report: FuzzReport) -> None:
    while True:
        before_s = time.monotonic()
        await asyncio.sleep(STALL_INTERVAL_S)
        report.longest_stall_s = max(report.longest_stall_s, time.monotonic() - before_s - STALL_INTERVAL_S)


async def _work(
    client: httpx.AsyncClient, remaining: Iterator[int], report: FuzzReport, make: Callable[[int], FuzzRequest]
) -> None:
    for seed in remaining:
        request = make(seed)
        try:
            status, problem = await _send(client, request)
        except httpx.TimeoutException:
            status, problem = 0, "no answer"
        except httpx.TransportError as error:
            status, problem = 0, f"connection: {error!r}"
        report.statuses[status] += 1
        if problem:
            report.failures.append(f"seed {seed}, {request.path}: {problem}")


async def _send(client: httpx.AsyncClient, request: FuzzRequest) -> tuple[int, str]:
    """Status (0: the client left), and what is wrong with the answer."""
    posting = client.post(request.path, content=request.body, headers=request.headers)
    if request.leaves:
        with contextlib.suppress(TimeoutError, httpx.TransportError):
            async with asyncio.timeout(LEAVING_S):
                await posting
        return 0, ""
    return _judge(await posting)


def _judge(answered: httpx.Response) -> tuple[int, str]:
    status = answered.status_code
    if status >= 500:
        return status, f"status {status}: {answered.text[:200]}"
    if status < 400:
        is_stream = answered.headers["content-type"].startswith("text/event-stream")
        if is_stream:
            return status, "" if "internal_error" not in answered.text else f"error event: {answered.text[-200:]}"
        return status, "" if _loads(answered.text) is not None else "no JSON"
    body = _loads(answered.text)
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or set(error) != {"message", "type", "param", "code"}:
        return status, f"not our shape of error: {answered.text[:200]}"
    return status, ""


def _loads(text: str) -> object:
    """None where it is no JSON in the strict sense."""

    def refuse(_: str) -> object:
        raise ValueError

    try:
        return json.loads(text, parse_constant=refuse)
    except ValueError:
        return None


_has_begun: multiprocessing.synchronize.Event
_is_over: multiprocessing.synchronize.Event


def _keep(has_begun: multiprocessing.synchronize.Event, is_over: multiprocessing.synchronize.Event) -> None:
    global _has_begun, _is_over
    _has_begun, _is_over = has_begun, is_over


def _suffer_on(url: str, key: str) -> tuple[list[float], list[str]]:
    """Until it is over. Returns how long each request took, and what went wrong."""
    times_s: list[float] = []
    failures: list[str] = []
    with httpx.Client(base_url=url, timeout=HANG_S, trust_env=False, headers=_write_key(key)) as client:
        while not _is_over.is_set() or len(times_s) < MIN_VICTIM_REQUESTS:
            _suffer_once(client, times_s, failures)
            _has_begun.set()
    return times_s, failures


def _suffer_once(client: httpx.Client, times_s: list[float], failures: list[str]) -> None:
    started_s = time.monotonic()
    try:
        answered = client.post("/v1/completions", json=VICTIM_BODY)
    except httpx.TransportError as error:
        failures.append(f"the victim's connection: {error!r}")
        return
    times_s.append(time.monotonic() - started_s)
    if answered.status_code != 200:
        failures.append(f"the victim got {answered.status_code}")
