"""`shoal top`: the status page in a terminal, drawn anew every two seconds until Ctrl-C; with --once a single time."""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

import httpx
from rich.console import Console
from rich.live import Live

from cluster.errors import NotRunning, RequestFailed
from cluster.state_file import find_state, get_state_dir
from cluster.top_view import render_top

CALL_TIMEOUT_S = 10.0
INTERVAL_S = 2.0
KEY_VARIABLE = "SHOAL_API_KEY"
MAX_EVENTS = 100


def run(options: argparse.Namespace) -> int:
    url = options.url if "//" in options.url else f"http://{options.url}"
    key = find_key(options.url)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=url, headers=headers, timeout=CALL_TIMEOUT_S, trust_env=False) as client:
        pages = _Pages(client)
        if options.json:
            print(json.dumps(pages.fetch("/ui/state"), indent=2))
            return 0
        console = Console()
        if options.once or not console.is_terminal:
            console.print(pages.render(console.width))
            return 0
        with Live(pages.render(console.width), console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(INTERVAL_S)
                live.update(pages.render(console.width), refresh=True)


def find_key(url: str) -> str | None:
    """SHOAL_API_KEY, else the admin token of a cluster that runs on this machine; None: try without."""
    key = os.environ.get(KEY_VARIABLE)
    if key:
        return key
    try:
        return find_state(get_state_dir(), url).token
    except NotRunning:
        return None


class _Pages:
    """What the front said last."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        self._events: list[dict[str, Any]] = []

    def render(self, width: int) -> Any:
        page = self.fetch("/ui/state")
        last = self._events[-1]["sequence"] if self._events else 0
        found = self._fetch_if_known(f"/ui/events?after={last}")
        self._events = [*self._events, *(found or {"events": []})["events"]][-MAX_EVENTS:]
        return render_top(page, self._events, self._fetch_if_known("/ui/experts"), width=width)

    def fetch(self, path: str) -> dict[str, Any]:
        """Raises RequestFailed."""
        try:
            response = self._client.get(path)
        except httpx.HTTPError as error:
            raise RequestFailed(f"{self._client.base_url} does not answer: {error or type(error).__name__}") from error
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise RequestFailed(f"{self._client.base_url} wants a key: set {KEY_VARIABLE}")
        if not response.is_success:
            raise RequestFailed(f"{self._client.base_url}{path} answered {response.status_code}")
        return response.json()

    def _fetch_if_known(self, path: str) -> dict[str, Any] | None:
        """None where no controller answers."""
        try:
            return self.fetch(path)
        except RequestFailed:
            return None
