"""What every benchmark prints: one JSON object with machine, commit, sizes, figures, limit and bars.

Not a benchmark itself. A bar is one line of what was asked for; the exit code never depends on it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]


class Figure(NamedTuple):
    """One measured number. details: what else it depends on."""

    name: str
    value: float
    unit: str
    details: Mapping[str, Any] = MappingProxyType({})

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "value": _shorten(self.value), "unit": self.unit, **self.details}


class Bar(NamedTuple):
    """One line that was asked for. measured: None if it was not measured in this run, with the reason as note."""

    name: str
    asked: float
    measured: float | None
    unit: str
    best: Literal["low", "high"]
    note: str = ""

    @property
    def ok(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.asked if self.best == "low" else self.measured >= self.asked

    def to_json(self) -> dict[str, Any]:
        measured = None if self.measured is None else _shorten(self.measured)
        asked = f"{'at most' if self.best == 'low' else 'at least'} {self.asked:g}"
        bar: dict[str, Any] = {
            "name": self.name, "asked": asked, "measured": measured, "unit": self.unit, "ok": self.ok
        }  # fmt: skip
        return {**bar, "note": self.note} if self.note else bar


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one line of JSON, not indented")


def print_report(
    benchmark: str,
    *,
    sizes: dict[str, Any],
    limit: Sequence[Figure],
    figures: Sequence[Figure],
    bars: Sequence[Bar],
    as_line: bool,
    notes: Sequence[str] = (),
) -> None:
    """limit: the bound measured in the same run."""
    report: dict[str, Any] = {
        "benchmark": benchmark,
        "machine": describe_machine(),
        "commit": read_commit(),
        "sizes": sizes,
        "limit": [figure.to_json() for figure in limit],
        "figures": [figure.to_json() for figure in figures],
        "bars": [bar.to_json() for bar in bars],
    }
    if notes:
        report["notes"] = list(notes)
    print(json.dumps(report, indent=None if as_line else 2))


def describe_machine() -> dict[str, Any]:
    """CPU, cores and load: figures of a busy machine are not worth much."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "kernel": platform.release(),
    }


def read_commit() -> str | None:
    """None outside a git checkout; "+changes" if the tree differs from the commit."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+changes"],
            cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=20,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None


def summarize(name: str, samples: Sequence[float], unit: str, **details: Any) -> Figure:
    """The median, with the 99th percentile and the number of samples beside it."""
    ordered = sorted(samples)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return Figure(name, statistics.median(ordered), unit, {"p99": _shorten(p99), "num": len(ordered), **details})


def _shorten(value: float) -> float:
    """Four significant digits are more than any of these measurements has."""
    return float(f"{value:.4g}")
