"""`shoal status`: what runs where. Exit code 0 also while the cluster is starting: the state is in the output."""

from __future__ import annotations

import argparse
import contextlib
import json

from cluster.admin_client import connect
from cluster.status_view import render_status


def run(options: argparse.Namespace) -> int:
    with contextlib.closing(connect(options.url)) as admin:
        status = admin.fetch_status()
    print(json.dumps(status, indent=2) if options.json else render_status(status))
    return 0
