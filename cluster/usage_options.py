"""The options of `shoal usage`."""

from __future__ import annotations

import argparse
from pathlib import Path

GROUP_NAMES = {"team": "team", "key": "key_id", "model": "model", "day": "day"}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--team", help="only this one's")
    parser.add_argument("--since", metavar="TIME", help="a date, a time in ISO 8601 (UTC), or a span such as 7d")
    parser.add_argument("--until", metavar="TIME", help="the same; default: now")
    parser.add_argument("--by", default="team,key,model", metavar="COLUMNS", help="of team,key,model,day")
    parser.add_argument("--ledger", metavar="URL", help="default: SHOAL_LEDGER, of --config, or of the running cluster")
    parser.add_argument("--gpu-hour-price", type=float, metavar="P", help="for costs; default: the same")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of `shoal serve`")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument("--csv", action="store_true", help="print CSV with a header")
