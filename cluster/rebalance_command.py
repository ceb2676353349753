"""`shoal rebalance`: move and copy hot experts between groups while they serve, and tell what it gained.

With --dry-run only what it would gain, by what the groups have counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json

from cluster.admin_client import connect
from cluster.rebalance_view import render_measured, render_rebalance


def run(options: argparse.Namespace) -> int:
    with contextlib.closing(connect(options.url)) as admin:
        if options.dry_run:
            view = admin.fetch_rebalancing(options.extra_share)
            print(json.dumps(view, indent=2) if options.json else render_rebalance(view))
            return 0
        current = admin.rebalance(options.extra_share)
        if not options.json:
            print(render_rebalance(current["expected"]), flush=True)
        current = admin.wait_rebalanced(current["number"], options.timeout)
    print(json.dumps(current, indent=2) if options.json else render_measured(current["measured"]))
    return 0
