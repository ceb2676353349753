"""`shoal events`: what happened to the cluster and why, oldest first; with --follow until Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import json
import time

from cluster.admin_client import connect
from cluster.errors import RequestFailed
from cluster.status_view import render_event

FOLLOW_INTERVAL_S = 0.5


def run(options: argparse.Namespace) -> int:
    with contextlib.closing(connect(options.url)) as admin:
        last = 0
        while True:
            try:
                events = admin.fetch_events(last)
            except RequestFailed:
                # A restarted controller goes on where the other one ended.
                if not options.follow or last == 0:
                    raise
                events = []
            if options.json and not options.follow:
                print(json.dumps({"events": events}, indent=2))
                return 0
            for event in events:
                print(json.dumps(event) if options.json else render_event(event), flush=True)
                last = event["sequence"]
            if not options.follow:
                return 0
            time.sleep(FOLLOW_INTERVAL_S)
