"""Sends fuzzed requests, many at once, and looks at every answer: no 5xx, no hang, one shape of error.

A victim sends a proper request over and over meanwhile: it must be served as ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import httpx
import psutil

from tests.fuzz.mutations import FuzzRequest, make_request

# A request that has no answer by then counts as hanging.
HANG_S = 60.0
VICTIM_BODY = {"prompt": "import os", "max_tokens": 4, "temperature": 0}
# The client of a request that leaves is gone after this long.
LEAVING_S = 0.02


@dataclass
class FuzzReport:
    statuses: Counter[int] = field(default_factory=Counter[int])
    failures: list[str] = field(default_factory=list[str])
    """What was wrong, with the seed that repeats it."""
    victim_s: list[float] = field(default_factory=list[float])
    seconds: float = 0.0

    @property
    def num_requests(self) -> int:
        return self.statuses.total()

    def victim_quantile_s(self, percent: int) -> float:
        return statistics.quantiles(self.victim_s, n=100)[percent - 1]


async def run_fuzz(url: str, seeds: Sequence[int], *, parallel: int) -> FuzzReport:
    report = FuzzReport()
    remaining = iter(seeds)
    limits = httpx.Limits(max_connections=parallel + 1, max_keepalive_connections=parallel + 1)
    started_s = time.monotonic()
    async with httpx.AsyncClient(base_url=url, timeout=HANG_S, limits=limits, trust_env=False) as client:
        victim = asyncio.create_task(_suffer(url, report))
        async with asyncio.TaskGroup() as group:
            for _ in range(parallel):
                group.create_task(_work(client, remaining, report))
        victim.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await victim
    report.seconds = time.monotonic() - started_s
    return report


async def measure_victim(url: str, num_requests: int) -> FuzzReport:
    """The victim alone."""
    report = FuzzReport()
    async with httpx.AsyncClient(base_url=url, timeout=HANG_S, trust_env=False) as client:
        for _ in range(num_requests):
            await _suffer_once(client, report)
    return report


def sum_resident_bytes(pids: Sequence[int]) -> int:
    return sum(psutil.Process(pid).memory_info().rss for pid in pids)


async def _work(client: httpx.AsyncClient, remaining: Iterator[int], report: FuzzReport) -> None:
    for seed in remaining:
        request = make_request(seed)
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


async def _suffer(url: str, report: FuzzReport) -> None:
    """On connections of its own: those of broken requests are closed by the server."""
    async with httpx.AsyncClient(base_url=url, timeout=HANG_S, trust_env=False) as client:
        while True:
            await _suffer_once(client, report)


async def _suffer_once(client: httpx.AsyncClient, report: FuzzReport) -> None:
    started_s = time.monotonic()
    try:
        answered = await client.post("/v1/completions", json=VICTIM_BODY)
    except httpx.TransportError as error:
        report.failures.append(f"the victim's connection: {error!r}")
        return
    report.victim_s.append(time.monotonic() - started_s)
    if answered.status_code != 200:
        report.failures.append(f"the victim got {answered.status_code}")
