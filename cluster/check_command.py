"""`shoal check CHECKPOINT`: validate the whole folder. Exit code 1 if anything is wrong with it."""

from __future__ import annotations

import argparse
import logging
import sys

from cluster.errors import SettingsError
from experts.check import check_checkpoint


def run(options: argparse.Namespace) -> int:
    if options.groups < 1:
        raise SettingsError(f"--groups must be at least 1, not {options.groups}")
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    report = check_checkpoint(options.checkpoint, options.groups)
    print(report.to_json() if options.json else report.to_text())
    return 0 if report.ok else 1
