"""Time to the first token of requests that share a long prefix: the first of them against those that follow.

    python tests/benchmarks/prefix_reuse.py [--json] [--full] [--repeats 5]

The whole stack as plain processes, asked over HTTP. For every repeat there is a new prefix; the first request computes
it, the second has the same prefix and another end. --full: the demo checkpoint and prefixes of 1000 tokens; the default
is a tiny random checkpoint and prefixes of 300. Medians.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import httpx

from experts.checkpoint import Checkpoint
from tests.benchmarks.report import REPOSITORY, Bar, Figure, add_json_option, print_report, summarize
from tests.benchmarks.worker_processes import restart_with_data_plane_env
from tests.local_stack import StackOptions, local_stack
from tests.random_checkpoint import write_random_checkpoint

DEMO_CHECKPOINT = REPOSITORY / "deploy/demo/checkpoint"
OWN_TOKENS = 20
ANSWER_TOKENS = 4
# Issue 4, "What it must show".
MOST_OF_FIRST = 0.25


class FirstToken(NamedTuple):
    latency_ms: float
    cached_tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    parser.add_argument("--full", action="store_true", help="the demo checkpoint, 1000 shared tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--groups", type=int, default=2)
    arguments = parser.parse_args()
    restart_with_data_plane_env()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = DEMO_CHECKPOINT
        if not arguments.full:
            checkpoint = Path(folder) / "checkpoint"
            write_random_checkpoint(checkpoint, seed=0)
        measure(arguments, checkpoint, Path(folder))


def measure(arguments: argparse.Namespace, checkpoint: Path, logs: Path) -> None:
    shared_tokens = 1000 if arguments.full else 300
    vocab_size = Checkpoint(checkpoint).config.vocab_size
    rng = random.Random(0)

    def draw(count: int) -> list[int]:
        return [rng.randrange(3, vocab_size) for _ in range(count)]

    options = StackOptions(num_groups=arguments.groups, dtype="bfloat16", wire_dtype="bfloat16")
    first: list[FirstToken] = []
    second: list[FirstToken] = []
    short: list[FirstToken] = []
    with local_stack(checkpoint, logs, options) as stack, stack.client() as client:
        for _ in range(2):
            ask(client, draw(shared_tokens + OWN_TOKENS))  # warm up
        for _ in range(arguments.repeats):
            prefix = draw(shared_tokens)
            first.append(ask(client, [*prefix, *draw(OWN_TOKENS)]))
            second.append(ask(client, [*prefix, *draw(OWN_TOKENS)]))
            short.append(ask(client, draw(OWN_TOKENS)))
    figures = [
        summarize(name, [each.latency_ms for each in found], "ms", cached_tokens=found[-1].cached_tokens)
        for name, found in (("first with its prefix", first), ("second with the same prefix", second))
    ]
    ratio = figures[1].value / figures[0].value
    bar = Bar(
        f"time to first token, second of first, {shared_tokens} shared tokens", MOST_OF_FIRST, ratio, "share", "low",
        "" if arguments.full else "a tiny model, where little depends on the prompt: use --full",
    )  # fmt: skip
    print_report(
        "prefix_reuse",
        sizes={"checkpoint": checkpoint.name, "groups": arguments.groups, "shared_tokens": shared_tokens},
        limit=[summarize("without the prefix", [each.latency_ms for each in short], "ms")],
        figures=[*figures, Figure("second of first", ratio, "share")],
        bars=[bar],
        as_line=arguments.json,
    )


def ask(client: httpx.Client, prompt: list[int]) -> FirstToken:
    """Stream a short answer; from sending the request to the first piece of the answer."""
    body = {
        "prompt": prompt,
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started_s = time.perf_counter()
    latency_ms: float | None = None
    cached_tokens = 0
    with client.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if latency_ms is None:
                latency_ms = (time.perf_counter() - started_s) * 1000
            if event.get("usage"):
                cached_tokens = event["usage"]["prompt_tokens_details"]["cached_tokens"]
    if latency_ms is None:
        raise SystemExit(f"no answer: HTTP {response.status_code}")
    return FirstToken(latency_ms, cached_tokens)


if __name__ == "__main__":
    main()
