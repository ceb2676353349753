"""`shoal batch`: many requests from a file, behind everybody else's, over the API like any other client.

Requests go out with the lowest priority. What is turned away for the moment is offered again, so a batch outlasts a
cluster that restarts; what can never succeed is recorded with its error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from cluster.batch_file import AnswerFile, BatchRequest, read_requests
from cluster.errors import RequestFailed

CONNECT_TIMEOUT_S = 5.0
# A request of the lowest priority may wait long before the server's own limit ends it.
READ_TIMEOUT_S = 900.0
FIRST_PAUSE_S, LAST_PAUSE_S = 0.5, 30.0
PRIORITY_HEADERS = {"X-Shoal-Priority": "batch"}


@dataclass(slots=True)
class BatchReport:
    num_skipped: int = 0
    num_done: int = 0
    num_failed: int = 0
    last_answer_s: float = field(default_factory=time.monotonic)
    """When a server last answered, of time.monotonic."""


def run(options: argparse.Namespace) -> int:
    """Returns 1 if any request failed for good. Raises RequestFailed if the server stays away."""
    if options.parallel < 1:
        raise RequestFailed("--parallel must be at least 1")
    with AnswerFile(options.output) as answers:
        try:
            report = asyncio.run(_run(options, answers))
        except BaseExceptionGroup as group:
            failures = group.subgroup(RequestFailed)
            if failures is None:
                raise
            raise failures.exceptions[0] from group  # every worker fails of the same
    figures = {"skipped": report.num_skipped, "done": report.num_done, "failed": report.num_failed}
    if options.json:
        print(json.dumps(figures))
    else:
        print(", ".join(f"{count} {what}" for what, count in figures.items()), file=sys.stderr)
    return 1 if report.num_failed else 0


async def _run(options: argparse.Namespace, answers: AnswerFile) -> BatchReport:
    url = options.url if "//" in options.url else f"http://{options.url}"
    key = options.api_key or os.environ.get("OPENAI_API_KEY")
    headers = {**PRIORITY_HEADERS, **({"Authorization": f"Bearer {key}"} if key else {})}
    timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    limits = httpx.Limits(max_connections=options.parallel)
    report = BatchReport()
    remaining = _skip_done(read_requests(options.input), answers, report)
    async with httpx.AsyncClient(
        base_url=url, timeout=timeout, headers=headers, limits=limits, trust_env=False
    ) as client:
        async with asyncio.TaskGroup() as group:
            for _ in range(options.parallel):
                group.create_task(_work(client, remaining, answers, report, options.give_up_after))
    return report


def _skip_done(requests: Iterator[BatchRequest], answers: AnswerFile, report: BatchReport) -> Iterator[BatchRequest]:
    for request in requests:
        if request.custom_id in answers.done:
            report.num_skipped += 1
        else:
            yield request


async def _work(
    client: httpx.AsyncClient,
    remaining: Iterator[BatchRequest],
    answers: AnswerFile,
    report: BatchReport,
    give_up_after_s: float,
) -> None:
    """Take requests until there are none."""
    for request in remaining:
        answered = await _send(client, request, report, give_up_after_s)
        answers.append(request.custom_id, _format(request, answered))
        report.num_done += answered.is_success
        report.num_failed += not answered.is_success


async def _send(
    client: httpx.AsyncClient, request: BatchRequest, report: BatchReport, give_up_after_s: float
) -> httpx.Response:
    """The answer that counts. Raises RequestFailed for a wrong key, or if no server answers anybody for so long."""
    pause_s = FIRST_PAUSE_S
    while True:
        reason, wait_s = "", pause_s
        try:
            answered = await client.post(request.url, json=request.body)
        except httpx.TransportError as error:
            reason = type(error).__name__
        else:
            if answered.status_code == 401:
                # Of no request in particular: recorded, it would be skipped when the key is right.
                raise RequestFailed("401: the API key is missing or not valid: give --api-key, or set OPENAI_API_KEY")
            if answered.status_code not in (408, 429, 502, 503, 504):
                report.last_answer_s = time.monotonic()
                return answered
            reason = f"status {answered.status_code}"
            advised = answered.headers.get("retry-after", "")
            wait_s = max(pause_s, min(float(advised), LAST_PAUSE_S)) if advised.isdecimal() else pause_s
        if time.monotonic() - report.last_answer_s + wait_s > give_up_after_s:
            raise RequestFailed(f"no answer for {give_up_after_s:g} s: {reason}; run the same command to go on")
        await asyncio.sleep(wait_s)
        pause_s = min(2 * pause_s, LAST_PAUSE_S)


def _format(request: BatchRequest, answered: httpx.Response) -> dict[str, Any]:
    """The line, as OpenAI's Batch API writes it."""
    try:
        body: Any = answered.json()
    except ValueError:
        body = None
    response = {
        "status_code": answered.status_code,
        "request_id": answered.headers.get("x-request-id"),
        "body": body,
    }
    error = None
    if not answered.is_success:
        inner = body.get("error") if isinstance(body, dict) else None
        error = inner if isinstance(inner, dict) else {"message": f"status {answered.status_code}"}
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": request.custom_id, "response": response, "error": error}
