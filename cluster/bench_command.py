"""`shoal bench`: load for any OpenAI endpoint, and how it coped.

Latencies count from when a request was due, so a server that falls behind a given rate cannot hide it. If the endpoint
is Shoal's own on this machine, the figures of its routers before and after stand beside the client's.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import httpx

from cluster.admin_client import connect
from cluster.bench_client import Api, Target, send
from cluster.bench_load import (
    FilePrompt,
    LoadOptions,
    PlannedRequest,
    parse_lengths,
    parse_prompts,
    plan_load,
)
from cluster.bench_options import DEFAULT_CONCURRENCY, DEFAULT_REQUESTS
from cluster.bench_router import render_router, summarize_router
from cluster.bench_statistics import Outcome, parse_slo, summarize
from cluster.errors import ClusterError, RequestFailed, SettingsError
from cluster.router_figures import flatten

# The official clients' own.
KEY_VARIABLE = "OPENAI_API_KEY"
CONNECT_TIMEOUT_S = 10.0
# Random token ids lie below the first of these that the endpoint takes: many ids, many experts.
VOCABULARIES = (30_000, 8_000, 2_000, 256)
PROGRESS_INTERVAL_S = 0.2
FIGURES_WAIT_S, FIGURES_PAUSE_S = 4.0, 0.1
PROGRESS_WIDTH = 30


def run(options: argparse.Namespace) -> int:
    """Exit code 1 if any request failed; the report is printed all the same."""
    _check(options)
    limits_s = parse_slo(options.slo) if options.slo else {}
    load = LoadOptions(
        num_requests=options.requests or (None if options.duration else DEFAULT_REQUESTS),
        rate=options.rate,
        input_lengths=parse_lengths(options.input_length),
        output_lengths=parse_lengths(options.output_length),
        shared_prefix=options.shared_prefix,
        kind="text" if options.prompt_kind == "text" or options.api == "chat" else "ids",
        seed=options.seed,
        file_prompts=_read_prompts(options.prompts),
    )
    report = asyncio.run(_bench(options, load, limits_s))
    print(json.dumps(report, indent=2) if options.json else render(report))
    return 1 if report["errors"] or not report["num_answered"] else 0


def render(report: Mapping[str, Any]) -> str:
    """The report for a terminal."""
    lines = [
        f"{report['num_answered']} of {report['num_requests']} requests answered in {report['duration_s']:.2f} s",
        f"  requests        {report['requests_per_s']:>10.2f} /s",
        f"  output tokens   {report['output_tokens_per_s']:>10.2f} /s",
        f"  all tokens      {report['total_tokens_per_s']:>10.2f} /s",
    ]
    if "slo_ms" in report:
        limits = ", ".join(f"{name} <= {limit:g} ms" for name, limit in report["slo_ms"].items())
        fraction = report["goodput_fraction"] or 0.0
        lines.append(f"  goodput         {report['goodput_requests_per_s']:>10.2f} /s  ({fraction:.0%} met {limits})")
    lines.append(f"  {'ms':<8}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}")
    for name in ("ttft", "tpot", "itl", "e2e"):
        if figures := report[f"{name}_ms"]:
            lines.append(f"  {name.upper():<8}" + "".join(f"{value:>10.2f}" for value in figures.values()))
    lines.extend(f"  error: {kind}: {count}" for kind, count in report["errors"].items())
    for router_id, figures in (report.get("routers") or {}).items():
        lines.extend(render_router(router_id, figures["during"]))
    return "\n".join(lines)


async def _bench(options: argparse.Namespace, load: LoadOptions, limits_s: dict[str, float]) -> dict[str, Any]:
    url = options.url if "//" in options.url else f"http://{options.url}"
    key = options.api_key or os.environ.get(KEY_VARIABLE)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(options.timeout, connect=CONNECT_TIMEOUT_S)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(
        base_url=url, limits=limits, timeout=timeout, headers=headers, trust_env=False
    ) as client:
        target = Target(
            model=options.model or await _fetch_model(client),
            api=_read_api(options.api),
            stream=not options.no_stream,
            temperature=options.temperature,
            ignore_eos=not options.no_ignore_eos,
        )
        target, load = await _settle(client, target, load, may_be_text=options.prompt_kind == "auto")
        await _warm_up(client, target, load, options.warm_up)
        before = await _fetch_fresh_figures(url)
        driver = _Driver(client, target, options)
        duration_s = await driver.drive(plan_load(load))
        after = await _fetch_fresh_figures(url)
    report = {"url": url, "model": target.model, "api": target.api, "prompt_kind": load.kind, "seed": load.seed}
    report |= {"rate": load.rate, "concurrency": driver.concurrency}
    report |= summarize(driver.outcomes, duration_s, limits_s)
    if after:
        report["routers"] = {
            router_id: {
                "during": summarize_router(before.get(router_id, {}), figures),
                "before": before.get(router_id, {}),
                "after": figures,
            }
            for router_id, figures in after.items()
        }
    return report


class _Driver:
    """Sends planned requests when they are due, never more at once than allowed."""

    def __init__(self, client: httpx.AsyncClient, target: Target, options: argparse.Namespace) -> None:
        self.outcomes: list[Outcome] = []
        self.concurrency: int | None = options.concurrency
        if self.concurrency is None and options.rate is None:
            self.concurrency = DEFAULT_CONCURRENCY
        self._client = client
        self._target = target
        self._duration_s: float | None = options.duration
        self._running: set[asyncio.Task[None]] = set()
        self._num_pieces = 0
        self._progress = _Progress(sys.stderr, options.requests or (None if options.duration else DEFAULT_REQUESTS))

    async def drive(self, planned: Iterator[PlannedRequest]) -> float:
        """Until every request has ended. Returns the seconds from the start to the end of the last."""
        started_s = time.perf_counter()
        ticker = asyncio.create_task(self._tick(started_s))
        room = asyncio.Semaphore(self.concurrency) if self.concurrency is not None else None
        try:
            for request in planned:
                if not await self._wait_turn(request, room, started_s):
                    break
                due_s = time.perf_counter() - started_s if request.at_s is None else request.at_s
                task = asyncio.create_task(self._send(request, started_s, due_s, room))
                self._running.add(task)
                task.add_done_callback(self._running.discard)
            await asyncio.gather(*self._running)
        finally:
            for task in (*self._running, ticker):
                task.cancel()
            await asyncio.gather(*self._running, ticker, return_exceptions=True)
            self._progress.clear()
        return max((outcome.ended_s for outcome in self.outcomes), default=0.0)

    async def _wait_turn(self, request: PlannedRequest, room: asyncio.Semaphore | None, started_s: float) -> bool:
        """Until the request is due and there is room. False if the time for beginning requests is over before."""
        left_s = None if self._duration_s is None else started_s + self._duration_s - time.perf_counter()
        try:
            async with asyncio.timeout(left_s):
                if request.at_s is not None:
                    await asyncio.sleep(started_s + request.at_s - time.perf_counter())
                if room is not None:
                    await room.acquire()
        except TimeoutError:
            return False
        return True

    async def _send(
        self, request: PlannedRequest, started_s: float, due_s: float, room: asyncio.Semaphore | None
    ) -> None:
        try:
            outcome = await send(
                self._client, self._target, request, started_s=started_s, due_s=due_s, on_piece=self._count_piece
            )
            self.outcomes.append(outcome)
        finally:
            if room is not None:
                room.release()

    def _count_piece(self) -> None:
        self._num_pieces += 1

    async def _tick(self, started_s: float) -> None:
        while self._progress.is_shown:
            num_errors = sum(outcome.error is not None for outcome in self.outcomes)
            elapsed_s = time.perf_counter() - started_s
            self._progress.show(
                len(self.outcomes), len(self._running), num_errors, elapsed_s, self._num_pieces / max(elapsed_s, 1e-9)
            )
            await asyncio.sleep(PROGRESS_INTERVAL_S)


class _Progress:
    """A bar on a terminal; nothing anywhere else. total: None where only the duration is known."""

    def __init__(self, stream: TextIO, total: int | None) -> None:
        self._stream = stream
        self._total = total
        self.is_shown = stream.isatty()

    def show(self, num_done: int, num_running: int, num_errors: int, elapsed_s: float, pieces_per_s: float) -> None:
        bar = ""
        if self._total:
            filled = PROGRESS_WIDTH * num_done // self._total
            bar = f"[{'#' * filled}{'.' * (PROGRESS_WIDTH - filled)}] "
        of = f"/{self._total}" if self._total else ""
        text = f"{bar}{num_done}{of} done, {num_running} running, {num_errors} failed, {pieces_per_s:.0f} pieces/s"
        self._stream.write(f"\r\x1b[2K{text}, {elapsed_s:.0f} s")
        self._stream.flush()

    def clear(self) -> None:
        if self.is_shown:
            self._stream.write("\r\x1b[2K")
            self._stream.flush()


async def _settle(
    client: httpx.AsyncClient, target: Target, load: LoadOptions, *, may_be_text: bool
) -> tuple[Target, LoadOptions]:
    """One short request, to learn what the endpoint takes: token ids or only text, ignore_eos or not.

    Raises RequestFailed if nothing helps.
    """
    loads = [load]
    if load.kind == "ids" and not load.file_prompts:
        loads = [replace(load, num_ids=count) for count in VOCABULARIES]
        loads += [replace(load, kind="text")] if may_be_text else []
    # ignore_eos is no part of OpenAI's own API.
    targets = [target, replace(target, ignore_eos=False)] if target.ignore_eos else [target]
    errors: list[str] = []
    for one, other in itertools.product(targets, loads):
        (request, *_) = plan_load(replace(other, num_requests=1))
        if loads[1:] and other.kind == "ids":
            # The largest id that may come: a vocabulary without it says so.
            request = request._replace(prompt=[other.num_ids - 1])
        try:
            outcome = await send(
                client, one, request._replace(max_tokens=1), started_s=time.perf_counter(), due_s=0.0, on_piece=_ignore
            )
        except ValueError as error:
            raise SettingsError(str(error)) from None
        if outcome.error is None:
            return one, other
        errors.append(outcome.error)
        if not outcome.error.startswith(("HTTP 400", "HTTP 422")):
            break
    raise RequestFailed(f"{client.base_url} does not answer a first request: {'; '.join(dict.fromkeys(errors))}")


async def _warm_up(client: httpx.AsyncClient, target: Target, load: LoadOptions, count: int) -> None:
    # Other prompts than those measured, or a prefix cache would know them already.
    requests = plan_load(replace(load, num_requests=count, seed=load.seed + 1_000_003))
    started_s = time.perf_counter()
    await asyncio.gather(
        *(send(client, target, request, started_s=started_s, due_s=0.0, on_piece=_ignore) for request in requests)
    )


async def _fetch_model(client: httpx.AsyncClient) -> str:
    try:
        response = await client.get("/v1/models")
        return str(response.json()["data"][0]["id"])
    except httpx.HTTPError as error:
        reason = error or type(error).__name__
        raise RequestFailed(f"{client.base_url} does not answer ({reason}): name another with --url") from error
    except (ValueError, KeyError, IndexError, TypeError):
        raise RequestFailed(f"{client.base_url}/v1/models names no model: name one with --model") from None


async def _fetch_fresh_figures(url: str) -> dict[str, dict[str, float]]:
    """Of this moment: the controller asks routers once per second. Something in them, such as processor time, always
    differs from one time to the next."""
    first = await asyncio.to_thread(_fetch_figures, url)
    figures = first
    deadline_s = time.monotonic() + (FIGURES_WAIT_S if first else 0.0)
    while time.monotonic() < deadline_s and any(figures.get(router_id) == old for router_id, old in first.items()):
        await asyncio.sleep(FIGURES_PAUSE_S)
        figures = await asyncio.to_thread(_fetch_figures, url)
    return figures


def _fetch_figures(url: str) -> dict[str, dict[str, float]]:
    """What each router says of itself, by id; empty if the endpoint is no Shoal that this user runs."""
    try:
        admin = connect(url)
    except ClusterError:
        return {}
    try:
        routers = admin.fetch_status()["routers"]
        return {str(router["id"]): flatten(router.get("figures", {})) for router in routers}
    except (ClusterError, KeyError, TypeError):
        return {}
    finally:
        admin.close()


def _check(options: argparse.Namespace) -> None:
    for name in ("rate", "concurrency", "requests", "duration"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise SettingsError(f"--{name} must be more than 0, not {value:g}")
    for name in ("warm_up", "shared_prefix"):
        if getattr(options, name) < 0:
            raise SettingsError(f"--{name.replace('_', '-')} must not be negative")


def _read_prompts(path: Path | None) -> tuple[FilePrompt, ...]:
    if path is None:
        return ()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read the prompts file {path}: {error}") from None
    return parse_prompts(text, is_jsonl=path.suffix in (".jsonl", ".json"))


def _read_api(text: str) -> Api:
    return "chat" if text == "chat" else "completions"


def _ignore() -> None:
    pass
