"""`shoal scale`, `drain` and `restart`: change what is desired, and wait for it if asked."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Sequence
from typing import Any

from cluster.admin_client import AdminClient, connect
from cluster.errors import SettingsError
from cluster.status_view import render_status


def run_scale(options: argparse.Namespace) -> int:
    counts = parse_counts(options.counts)
    with contextlib.closing(connect(options.url)) as admin:
        version = admin.scale(counts, options.force)
        _report(admin, options, version, options.wait)
    return 0


def run_drain(options: argparse.Namespace) -> int:
    """Returns when the replica has gone and its successor serves."""
    with contextlib.closing(connect(options.url)) as admin:
        _report(admin, options, admin.drain_replica(options.replica), wait=True)
    return 0


def run_restart(options: argparse.Namespace) -> int:
    with contextlib.closing(connect(options.url)) as admin:
        _report(admin, options, admin.restart(options.groups), options.wait)
    return 0


def parse_counts(pairs: Sequence[str]) -> dict[str, int]:
    """GROUP=N as given on the command line. Raises SettingsError."""
    counts: dict[str, int] = {}
    for pair in pairs:
        name, _, number = pair.partition("=")
        if not name or not (number.isascii() and number.isdigit() and len(number) <= 9):
            raise SettingsError(f"{pair!r} is not GROUP=N, as in g0=2")
        if name in counts:
            raise SettingsError(f"group {name} is given twice")
        counts[name] = int(number)
    return counts


def _report(admin: AdminClient, options: argparse.Namespace, version: int, wait: bool) -> None:
    status: dict[str, Any] | None = admin.wait_settled(version, options.timeout) if wait else None
    if options.json:
        print(json.dumps(status or {"desired_version": version}, indent=2))
    elif status is not None:
        print(render_status(status))
    else:
        print(f"accepted as version {version} of the desired state; `shoal plan` shows how far it is")
