"""`shoal usage`: what teams used, from the ledger. It needs no running cluster; a request is in it about a second after
its end."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from cluster.errors import SettingsError
from cluster.settings import ServeSettings, load_settings
from cluster.state_file import get_state_dir, list_running
from cluster.time_arguments import parse_moment
from cluster.usage_options import GROUP_NAMES
from router.tenancy.ledger import GroupKey, Ledger, UsageSum, get_costs

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def run(options: argparse.Namespace) -> int:
    """Raises SettingsError, LedgerError."""
    given = {"ledger": options.ledger, "gpu_hour_price": options.gpu_hour_price}
    settings = load_settings(
        {name: value for name, value in given.items() if value is not None}, config_file=options.config
    )
    url, price = _choose(settings)
    if url is None:
        raise SettingsError("the ledger is off: give --ledger URL")
    by = _read_groups(options.by)
    now = datetime.now(UTC)
    since, until = (None if text is None else parse_moment(text, now) for text in (options.since, options.until))
    ledger = Ledger(url, must_exist=True)
    try:
        sums = ledger.summarise(
            by,
            since=None if since is None else since.timestamp(),
            until=None if until is None else until.timestamp(),
            team=options.team,
        )
    finally:
        ledger.close()
    rows = [_describe(total, by, price) for total in sums]
    if options.json:
        print(json.dumps({"gpu_hour_price": price, "usage": rows}, indent=2))
    elif options.csv:
        _print_csv(rows)
    else:
        _print_table(rows)
    return 0


def _choose(settings: ServeSettings) -> tuple[str | None, float | None]:
    """Ledger and price: those given, else those of the cluster that runs here, if there is one."""
    url, price = settings.ledger_url, settings.gpu_hour_price
    running = list_running(get_state_dir())
    if settings.ledger is None and len(running) == 1:
        url = running[0].ledger_url or url
    if price is None:
        price = next((state.gpu_hour_price for state in running if state.ledger_url == url), None)
    return url, price


def _read_groups(text: str) -> list[GroupKey]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in GROUP_NAMES]:
        raise SettingsError(f"--by {unknown[0]!r}: there are {', '.join(GROUP_NAMES)}")
    return [cast(GroupKey, GROUP_NAMES[name]) for name in names]


def _describe(total: UsageSum, by: Sequence[GroupKey], price: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {name: getattr(total, key) for name, key in GROUP_NAMES.items() if key in by}
    if total.day is not None:
        row["day"] = f"{_EPOCH + timedelta(days=total.day):%Y-%m-%d}"
    row |= {name: getattr(total, name) for name in ("num_requests", "tokens_in", "tokens_cached", "tokens_out")}
    row |= {"router_s": total.router_us / 1e6, "expert_s": total.expert_us / 1e6}
    if price is not None:
        row |= get_costs(total, price)
    return row


def _print_csv(rows: Sequence[dict[str, Any]]) -> None:
    if rows:
        writer = csv.DictWriter(sys.stdout, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        print("nothing was used")
        return
    lines = [[name.upper() for name in rows[0]], *([_show(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _show(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
