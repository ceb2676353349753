"""The command line of `shoal bench`; apart from the command, so that the other commands do not load an HTTP client."""

from __future__ import annotations

import argparse
from pathlib import Path

DEFAULT_REQUESTS = 100
DEFAULT_CONCURRENCY = 8


def add_options(parser: argparse.ArgumentParser) -> None:
    """All but --url and --json, which other commands have too."""
    load = parser.add_argument_group("load")
    load.add_argument("--rate", type=float, metavar="R", help="requests per second, Poisson; default: by --concurrency")
    load.add_argument(
        "--concurrency", type=int, metavar="N", help=f"most running at once (default: {DEFAULT_CONCURRENCY} w/o --rate)"
    )
    load.add_argument(
        "--requests", type=int, metavar="N", help=f"how many (default: {DEFAULT_REQUESTS} w/o --duration)"
    )
    load.add_argument("--duration", type=float, metavar="S", help="seconds in which requests are begun")
    load.add_argument(
        "--warm-up", type=int, default=1, metavar="N", help="requests beforehand, not counted (default: 1)"
    )
    load.add_argument("--seed", type=int, default=0, help="of arrivals, prompts and lengths (default: 0)")
    lengths = "tokens: N, LOW:HIGH, normal:MEAN,STD or lognormal:MEDIAN,SIGMA"
    load.add_argument("--input-length", default="128", metavar="L", help=f"{lengths} (default: 128)")
    load.add_argument("--output-length", default="64", metavar="L", help="the same, for answers (default: 64)")
    load.add_argument("--shared-prefix", type=int, default=0, metavar="N", help="first tokens that all prompts share")
    load.add_argument("--prompts", type=Path, metavar="FILE", help=".jsonl (prompt or messages, max_tokens) or lines")
    request = parser.add_argument_group("requests")
    request.add_argument("--model", help="default: the first one that /v1/models names")
    request.add_argument("--api-key", help="bearer token; default: OPENAI_API_KEY, which no other user can read")
    request.add_argument("--api", choices=["completions", "chat"], default="completions", help="default: completions")
    request.add_argument(
        "--prompt-kind", choices=["auto", "ids", "text"], default="auto", help="random prompts as (default: auto)"
    )
    request.add_argument("--no-stream", action="store_true", help="whole answers: no TTFT, TPOT and ITL")
    request.add_argument("--no-ignore-eos", action="store_true", help="let answers end early")
    request.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0")
    request.add_argument("--timeout", type=float, default=600.0, metavar="S", help="silence that ends a request")
    parser.add_argument("--slo", metavar="LIMITS", help="for goodput: ttft=500,tpot=50,e2e=10s (milliseconds)")
