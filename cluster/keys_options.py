"""The options of `shoal keys`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from router.tenancy.priority import PriorityClass

PRIORITIES = ",".join(PriorityClass)


def add_options(parser: argparse.ArgumentParser) -> None:
    actions: Any = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = actions.add_parser("create", help="make a key for a team; it is shown once")
    create.add_argument("--team", required=True, help="whose key it is")
    create.add_argument("--note", default="", help="for people, e.g. who uses it")
    create.add_argument("--expires", metavar="SPAN", help="e.g. 90d; default: never")
    create.add_argument("--models", metavar="NAMES", help="that it may use, with commas; default: all")
    create.add_argument("--priorities", metavar="CLASSES", help=f"that it may ask for; default: {PRIORITIES}")
    _add_limits(create)
    listing = actions.add_parser("list", help="the keys and teams there are")
    listing.add_argument("--team", help="only this one's")
    rotate = actions.add_parser("rotate", help="make a key anew; the old one stays valid for a while")
    rotate.add_argument("--grace", default="24h", metavar="SPAN", help="until the old key ends (default: 24h)")
    revoke = actions.add_parser("revoke", help="end a key at once")
    for each, what in ((rotate, "its valid keys"), (revoke, "its keys")):
        which = each.add_mutually_exclusive_group(required=True)
        which.add_argument("--key", metavar="ID", help="see `shoal keys list`")
        which.add_argument("--team", help=f"all of {what}")
    team = actions.add_parser("team", help="set a team's share and limits")
    team.add_argument("--team", required=True)
    team.add_argument("--weight", type=float, metavar="W", help="share relative to other teams (default: 1)")
    _add_limits(team)
    for each in (create, listing, rotate, revoke, team):
        each.add_argument("--keys-file", type=Path, metavar="FILE", help="default: SHOAL_KEYS_FILE, or of --config")
        each.add_argument("--config", type=Path, metavar="FILE", help="YAML file of `shoal serve`")
        each.add_argument("--json", action="store_true", help="print one JSON object")


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rpm", type=int, metavar="N", help="requests per minute at most")
    parser.add_argument("--tpm", type=int, metavar="N", help="tokens per minute at most, prompts and answers")
    parser.add_argument("--parallel", type=int, metavar="N", help="requests at once at most")
