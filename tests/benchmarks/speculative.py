"""What drafting with the MTP layer is worth on the demo: tokens per step, acceptance, tokens/s with and without.

    python tests/benchmarks/speculative.py [--json] [--full]

Expert groups, router and HTTP front are processes of their own, as users run them. Each batch size decodes the same
prompts, at the recommended temperature, with the same seeds, so the text is the same with and without drafts. There is
one stack for each depth; they take turns, so that a machine that gets slower slows all, and the median over the turns
counts. Tokens/s are end to end: all tokens of a turn by the time it took, prefill included.

A batch is held by as many clients, each of which asks for its next answer when it has one: with drafts sequences of one
length end at different times, and of a single round the last part would be measured at ever fewer sequences (--rounds 1
is that). Drafts save rounds to the expert groups, so what they gain grows with what a round takes: --round-trip-ms adds
a network, which the asked form, on one machine, has none of.

The default decodes a few tokens once and only shows that it works; --full: 4 rounds of 128 tokens, 5 turns.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import httpx

from tests.benchmarks.report import REPOSITORY, Bar, Figure, add_json_option, print_report, summarize
from tests.local_stack import LocalStack, StackOptions, local_stack

DEMO = REPOSITORY / "deploy" / "demo" / "checkpoint"
PROMPTS = (
    "import os\nimport unittest\n\n\nclass QueueTest(unittest.TestCase):\n    def test_",
    'def read_config(path):\n    """Return the settings in path."""\n',
    "class Counter:\n    def __init__(self):\n",
    "import asyncio\n\n\nasync def main():\n",
    "from collections import defaultdict\n\n\ndef group_by(items, key):\n",
    "class Parser:\n    def parse(self, text):\n",
    "import socket\nimport threading\n\n\nclass Server:\n",
    "def test_round_trip(self):\n",
)


class Turn(NamedTuple):
    """One run of a batch. tokens_per_step: of each sequence. drafted, accepted: by depth."""

    tokens_per_second: float
    tokens_per_step: float
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]
    texts: tuple[str, ...]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=DEMO)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--depth", type=int, nargs="+", default=[1], help="most drafts per step, besides none")
    parser.add_argument("--full", action="store_true", help="long enough to be measured")
    parser.add_argument("--tokens", type=int, help="generated per sequence (default: 8, with --full 128)")
    parser.add_argument("--rounds", type=int, help="answers of each client in a turn (default: 1, with --full 4)")
    parser.add_argument("--turns", type=int, help="default: 1, with --full 5")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument(
        "--round-trip-ms", type=float, default=0.0, help="to the first expert group, through a proxy (default: none)"
    )
    add_json_option(parser)
    options = parser.parse_args()
    options.tokens = options.tokens or (128 if options.full else 8)
    options.rounds = options.rounds or (4 if options.full else 1)
    options.turns = options.turns or (5 if options.full else 1)
    return options


def main() -> None:
    options = parse_arguments()
    depths = [0, *sorted(set(options.depth) - {0})]
    turns: dict[tuple[int, int], list[Turn]] = {(batch, depth): [] for batch in options.batch for depth in depths}
    with contextlib.ExitStack() as running, tempfile.TemporaryDirectory() as folder:
        stacks = {depth: start_stack(running, options, depth, Path(folder)) for depth in depths}
        for stack in stacks.values():
            for batch in options.batch:
                run_turn(stack, batch, options)  # buffers, connections, and what the policy wants to know first
        for _ in range(options.turns):
            for batch, depth in turns:
                turns[batch, depth].append(run_turn(stacks[depth], batch, options))
    print_report(
        "speculative",
        sizes={"checkpoint": str(options.checkpoint.relative_to(REPOSITORY)), "groups": options.groups,
               "tokens": options.tokens, "rounds": options.rounds, "temperature": options.temperature,
               "turns": options.turns, "round_trip_ms": options.round_trip_ms},
        limit=[],
        figures=build_figures(turns),
        bars=build_bars(turns, options.batch, depths, is_full=options.full),
        as_line=options.json,
    )  # fmt: skip


def start_stack(running: contextlib.ExitStack, options: argparse.Namespace, depth: int, folder: Path) -> LocalStack:
    """In bf16, as served by default, but with a fixed most of drafts."""
    stack_options = StackOptions(
        num_groups=options.groups,
        proxied_expert=0 if options.round_trip_ms else None,
        dtype="bfloat16",
        wire_dtype="bfloat16",
        extra_router_arguments=("--speculative-tokens", str(depth)),
    )
    stack = running.enter_context(local_stack(options.checkpoint, folder / str(depth), stack_options))
    if stack.expert_proxy is not None:
        stack.expert_proxy.set_delay(options.round_trip_ms / 2)
    return stack


def run_turn(stack: LocalStack, batch: int, options: argparse.Namespace) -> Turn:
    """Every client one prompt after the other, each answered to the full length."""
    before = stack.status()
    with stack.client() as client, concurrent.futures.ThreadPoolExecutor(batch) as threads:

        def answer_all(first: int) -> list[str]:
            return [complete(client, first + batch * number, options) for number in range(options.rounds)]

        started_s = time.perf_counter()
        texts = tuple(itertools.chain.from_iterable(threads.map(answer_all, range(batch))))
        seconds = time.perf_counter() - started_s
    after = stack.status()
    num_tokens = after.num_generated_tokens - before.num_generated_tokens
    return Turn(
        tokens_per_second=num_tokens / seconds,
        tokens_per_step=num_tokens / (after.num_turns - before.num_turns),
        drafted=subtract(after.num_drafted, before.num_drafted),
        accepted=subtract(after.num_accepted, before.num_accepted),
        texts=texts,
    )


def complete(client: httpx.Client, index: int, options: argparse.Namespace) -> str:
    body = {"prompt": PROMPTS[index % len(PROMPTS)], "seed": index, "max_tokens": options.tokens, "ignore_eos": True,
            "temperature": options.temperature}  # fmt: skip
    answered = client.post("/v1/completions", json=body)
    answered.raise_for_status()
    return answered.json()["choices"][0]["text"]


def subtract(after: Sequence[int], before: Sequence[int]) -> tuple[int, ...]:
    return tuple(count - (before[index] if index < len(before) else 0) for index, count in enumerate(after))


def build_figures(turns: Mapping[tuple[int, int], Sequence[Turn]]) -> list[Figure]:
    figures: list[Figure] = []
    for (batch, depth), measured in turns.items():
        details = {"batch": batch, "speculative_tokens": depth}
        figures.append(summarize("end_to_end", [turn.tokens_per_second for turn in measured], "tokens/s", **details))
        if depth == 0:
            continue
        figures.append(summarize("tokens_per_step", [turn.tokens_per_step for turn in measured], "tokens", **details))
        for index in range(len(measured[-1].drafted)):
            counts = [count_at(turn, index) for turn in measured]
            drafted, accepted = sum(count for count, _ in counts), sum(count for _, count in counts)
            if drafted > 0:
                figures.append(Figure("acceptance", accepted / drafted, "", {**details, "draft": index + 1}))
        plain = turns[batch, 0][0].texts
        same = statistics.mean(one == other for one, other in zip(measured[0].texts, plain, strict=True))
        figures.append(Figure("same_text_as_without_drafts", same, "of sequences", details))
    return figures


def count_at(turn: Turn, index: int) -> tuple[int, int]:
    """Drafted and accepted at a depth."""
    return (turn.drafted[index], turn.accepted[index]) if index < len(turn.drafted) else (0, 0)


def build_bars(
    turns: Mapping[tuple[int, int], Sequence[Turn]], batches: Sequence[int], depths: Sequence[int], *, is_full: bool
) -> list[Bar]:
    """For one draft per step, as asked."""
    if 1 not in depths:
        return []
    bars: list[Bar] = []
    note = "" if is_full else "measured only with --full"
    for batch in batches:
        plain, drafting = turns[batch, 0], turns[batch, 1]
        per_step = statistics.median(turn.tokens_per_step for turn in drafting)
        name = f"tokens per step at k=1, batch {batch}"
        bars.append(Bar(name, 1.5, per_step if is_full else None, "tokens", "high", note))
        # The two of a turn ran side by side: their ratio is what a machine of varying speed leaves.
        gain = statistics.median(
            one.tokens_per_second / other.tokens_per_second for one, other in zip(drafting, plain, strict=True)
        )
        name = f"end-to-end tokens/s with k=1 over without, batch {batch}"
        bars.append(Bar(name, 1.0, gain if is_full else None, "x", "high", note))
    return bars


if __name__ == "__main__":
    main()
