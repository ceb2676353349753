"""`shoal plan`: what the controller does, what it waits for, and why."""

from __future__ import annotations

import argparse
import contextlib
import json

from cluster.admin_client import connect
from cluster.status_view import render_plan


def run(options: argparse.Namespace) -> int:
    with contextlib.closing(connect(options.url)) as admin:
        view = admin.fetch_plan()
    print(json.dumps(view, indent=2) if options.json else render_plan(view))
    return 0
