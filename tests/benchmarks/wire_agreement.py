"""What rounding activations on the wire does to a model: how often its most probable next token stays the same.

    python tests/benchmarks/wire_agreement.py [--json] [--full] [--checkpoint DIR]

The same text goes through one router for each wire format, teacher-forced, over the same expert groups; the most
probable token at every position is compared with bfloat16's. --full: the demo checkpoint on text that it was not
trained on; the default is a tiny random checkpoint on random tokens, whose ties say nothing and only show that it
works.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import grpc
from tokenizers import Tokenizer

from experts.model_config import ModelConfig
from router.v1 import router_pb2, router_pb2_grpc
from tests.benchmarks.report import REPOSITORY, Bar, Figure, add_json_option, print_report
from tests.local_stack import (
    START_TIMEOUT_S,
    ManagedProcess,
    StackOptions,
    expert_arguments,
    router_arguments,
    stop_all,
    wait_until_ready,
)
from tests.random_checkpoint import write_random_checkpoint

DEMO_FOLDER = REPOSITORY / "deploy/demo"
# Issue 3, "What it must show".
LEAST_AGREEMENT = 0.98
REFERENCE = "bfloat16"
COMPARED = ("fp8", "fp8-both")
CALL_TIMEOUT_S = 300.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    parser.add_argument("--full", action="store_true", help="the demo checkpoint on held-out text")
    parser.add_argument("--checkpoint", type=Path, help="another checkpoint for --full")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--windows", type=int, help="pieces of text; default: 2, with --full 64")
    parser.add_argument("--window-tokens", type=int, default=512, help="most tokens of a piece")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.full:
            checkpoint = arguments.checkpoint or DEMO_FOLDER / "checkpoint"
            if not checkpoint.exists():
                parser.error(f"no checkpoint at {checkpoint}")
        else:
            checkpoint = Path(folder) / "checkpoint"
            write_random_checkpoint(checkpoint)
        measure(arguments, checkpoint, Path(folder))


def measure(arguments: argparse.Namespace, checkpoint: Path, logs: Path) -> None:
    config = ModelConfig.from_folder(checkpoint)
    length = min(arguments.window_tokens, config.max_position_embeddings - 1)
    count = arguments.windows or (64 if arguments.full else 2)
    windows = (
        read_held_out(checkpoint, length, count) if arguments.full else draw_tokens(config, min(length, 64), count)
    )
    options = StackOptions(num_groups=arguments.groups, dtype="bfloat16")
    processes: list[ManagedProcess] = []
    chosen: dict[str, list[int]] = {}
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        for index in range(arguments.groups):
            processes.append(
                ManagedProcess(f"expert-{index}", expert_arguments(checkpoint, options, index, port=0), logs)
            )
        ports = [int(process.wait_ready(deadline)["endpoint"].rpartition(":")[2]) for process in processes]
        for wire_dtype in (REFERENCE, *COMPARED):
            router_options = dataclasses.replace(options, wire_dtype=wire_dtype)
            router = ManagedProcess(
                f"router-{wire_dtype}", router_arguments(checkpoint, router_options, ports, 0), logs
            )
            processes.append(router)
            deadline = time.monotonic() + START_TIMEOUT_S
            with grpc.insecure_channel(router.wait_ready(deadline)["endpoint"]) as channel:
                wait_until_ready(channel, deadline, router.stderr_tail)
                chosen[wire_dtype] = [token for window in windows for token in choose_tokens(channel, window)]
            router.stop()
    finally:
        stop_all(processes)
    agreement = {name: compute_share(chosen[name], chosen[REFERENCE]) for name in COMPARED}
    note = "" if arguments.full else "measured only with --full"
    print_report(
        "wire_agreement",
        sizes={"checkpoint": checkpoint.name, "groups": arguments.groups, "positions": len(chosen[REFERENCE])},
        limit=[],
        figures=[
            Figure("same most probable token", share, "share", {"wire_dtype": n}) for n, share in agreement.items()
        ],
        bars=[
            Bar(
                f"top-1 agreement of {name} with {REFERENCE} on the wire",
                LEAST_AGREEMENT,
                None if note else share,
                "share",
                "high",
                note,
            )
            for name, share in agreement.items()
        ],
        as_line=arguments.json,
    )


def choose_tokens(channel: grpc.Channel, window: Sequence[int]) -> list[int]:
    """The most probable token after each position of the window but the last."""
    request = router_pb2.GenerateRequest(
        request_id="agreement",
        prompt_token_ids=window,
        sampling=router_pb2.SamplingParams(temperature=0.0, top_p=1.0),
        max_tokens=1,
        ignore_eos=True,
        prompt_logprobs=1,
    )
    tokens: list[router_pb2.TokenOutput] = []
    for response in router_pb2_grpc.RouterServiceStub(channel).Generate(request, timeout=CALL_TIMEOUT_S):
        tokens.extend(response.prompt_tokens)
    return [token.top_token_ids[0] for token in tokens[1:]]  # nothing comes before the first


def compute_share(found: Sequence[int], expected: Sequence[int]) -> float:
    return sum(one == other for one, other in zip(found, expected, strict=True)) / len(expected)


def read_held_out(checkpoint: Path, length: int, count: int) -> list[list[int]]:
    """Pieces of the files that the demo's training left out, spread over all of them."""
    sys.path.insert(0, str(DEMO_FOLDER))
    from data import load_documents  # pyright: ignore[reportMissingImports]

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    bos = ModelConfig.from_folder(checkpoint).bos_token_id
    texts = [document.text for document in load_documents() if document.held_out]
    step = max(1, len(texts) // count)
    windows = [tokenizer.encode(text, add_special_tokens=False).ids[: length - 1] for text in texts[::step]]
    start = [] if bos is None else [bos]
    return [[*start, *window] for window in windows if len(window) > 1][:count]


def draw_tokens(config: ModelConfig, length: int, count: int) -> list[list[int]]:
    generator = random.Random(0)
    return [[generator.randrange(2, config.vocab_size) for _ in range(length)] for _ in range(count)]


if __name__ == "__main__":
    main()
