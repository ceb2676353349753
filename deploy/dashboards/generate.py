"""Writes the Grafana dashboard and the alert rules that the Helm chart ships: `make dashboards`.

A test compares what is committed with what this writes, and the names with what /metrics really has.
"""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from deploy.dashboards.alert_rules import build_rules
from deploy.dashboards.board import build_board

FOLDER = Path(__file__).resolve().parents[1] / "helm" / "shoal" / "files"


def build_files() -> dict[Path, str]:
    """By path, what is to be there."""
    return {
        FOLDER / "dashboard.json": json.dumps(build_board(), indent=2) + "\n",
        FOLDER / "alerts.yaml": "# Written by `make dashboards`.\n"
        + yaml.safe_dump(build_rules(), sort_keys=False, width=120),
    }


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path, text in build_files().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
