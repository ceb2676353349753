"""`shoal rebalance --dry-run`: what hosting hot experts in more groups would gain, by what the groups have counted."""

from __future__ import annotations

import argparse
import contextlib
import json

from cluster.admin_client import connect
from cluster.rebalance_view import render_rebalance


def run(options: argparse.Namespace) -> int:
    with contextlib.closing(connect(options.url)) as admin:
        view = admin.fetch_rebalancing(options.extra_share)
    print(json.dumps(view, indent=2) if options.json else render_rebalance(view))
    return 0
