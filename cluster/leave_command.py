"""`shoal leave`: holds a pod that is being deleted until nothing of Shoal runs in it any more; for its preStop hook.

The controller sees that the pod is being deleted, lets another replica take over and ends the one here; only then may
Kubernetes end the container. It looks at the processes of its own container and needs neither Ray nor the network, so
it works just as well while both are failing.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterable

import psutil

# As Ray names the processes of actors: `ray::ExpertReplica`, and `ray::g1-0:ExpertReplica.drain` within a method.
_ACTOR_TITLE = re.compile(r"ray::(\S+:)?(ExpertReplica|Router)\b")
_INTERVAL_S = 0.5


def run(options: argparse.Namespace) -> int:
    """Returns 0 once they are gone, 1 if some were still there after the timeout: they end with the container then."""
    names = wait_until_gone(list_actors, options.timeout)
    if names:
        print(f"still here after {options.timeout:g} s: {', '.join(names)}", flush=True)
    return 1 if names else 0


def wait_until_gone(list_names: Callable[[], list[str]], timeout_s: float) -> list[str]:
    """Those that are still there after timeout_s; empty as soon as there are none."""
    deadline_s = time.monotonic() + timeout_s
    while (names := list_names()) and time.monotonic() < deadline_s:
        time.sleep(_INTERVAL_S)
    return names


def list_actors() -> list[str]:
    """Titles of the routers and replicas that run in this container."""
    return find_actors(psutil.process_iter())


def find_actors(processes: Iterable[psutil.Process]) -> list[str]:
    """Titles of the routers and replicas among these processes."""
    titles: list[str] = []
    for process in processes:
        try:
            title = " ".join(process.cmdline()[:1])
        except psutil.Error:
            continue
        if _ACTOR_TITLE.match(title):
            titles.append(title)
    return sorted(titles)
