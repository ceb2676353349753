"""The options of `shoal batch`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, metavar="IN", help="one request per line, as for OpenAI's Batch API")
    parser.add_argument("output", type=Path, metavar="OUT", help="one answer per line; what it holds is not done again")
    parser.add_argument("--parallel", type=int, default=16, metavar="N", help="requests at once (default: 16)")
    parser.add_argument(
        "--give-up-after", type=float, default=600.0, metavar="S", help="without any answer (default: 600)"
    )
    parser.add_argument("--api-key", help="bearer token; default: OPENAI_API_KEY, which no other user can read")
