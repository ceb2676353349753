"""Keeps the objects of one kind as they are on the API server: list, watch for half a minute, list again, for ever.

The list that begins each round is what makes it safe: whatever a watch missed (a connection that died without a word, a
version too old to go on from, an API server that was away) is there after the next one.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from cluster.errors import ApiGone, ApiUnavailable, KubernetesError

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.2
_MAX_PAUSE_S = 5.0

Watcher = Callable[[str], AbstractContextManager[Iterator[dict[str, Any]]]]


class KubernetesWatch:
    """Owns a thread. `on_change` is called from it, with all objects by name, after each list and each event."""

    def __init__(
        self,
        kind: str,
        fetch_list: Callable[[], dict[str, Any]],
        open_watch: Watcher,
        on_change: Callable[[Mapping[str, dict[str, Any]]], None],
    ) -> None:
        """kind: for messages. open_watch: of the version that it goes on from."""
        self._kind = kind
        self._fetch_list = fetch_list
        self._open_watch = open_watch
        self._on_change = on_change
        self._stopped = threading.Event()
        self._pause_s = _FIRST_PAUSE_S
        self._objects: dict[str, dict[str, Any]] = {}
        # Why the last attempt did not succeed; None while all is well.
        self.error: KubernetesError | None = None
        self._thread = threading.Thread(target=self._run, name=f"watch {kind}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """The thread ends with its current watch; what that still sees is not told."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._follow()
            except ApiGone as error:
                # An immediate list is the cure; a server that answers so for ever is asked ever less often.
                logger.info("listing %s again: %s", self._kind, error)
                self._pause()
            except KubernetesError as error:
                if self.error is None:
                    logger.warning("%s are not seen: %s", self._kind, error)
                self.error = error
                self._pause()
            except Exception:
                logger.exception("watching %s failed", self._kind)
                self.error = ApiUnavailable(f"watching {self._kind} failed")
                self._pause()

    def _follow(self) -> None:
        """One list and one watch."""
        document = self._fetch_list()
        self._objects = {item["metadata"]["name"]: item for item in document["items"]}
        if self.error is not None:
            logger.info("%s are seen again", self._kind)
        self.error = None
        self._tell()
        with self._open_watch(document["metadata"]["resourceVersion"]) as events:
            for event in events:
                self._pause_s = _FIRST_PAUSE_S
                if self._stopped.is_set():
                    return
                self._apply(event)

    def _apply(self, event: Mapping[str, Any]) -> None:
        match event["type"]:
            case "ADDED" | "MODIFIED":
                self._objects[event["object"]["metadata"]["name"]] = event["object"]
            case "DELETED":
                self._objects.pop(event["object"]["metadata"]["name"], None)
            case _:
                # BOOKMARK: each round lists afresh, so the version is of no use.
                return
        self._tell()

    def _tell(self) -> None:
        if not self._stopped.is_set():
            self._on_change(dict(self._objects))

    def _pause(self) -> None:
        self._stopped.wait(self._pause_s * random.uniform(0.5, 1.0))
        self._pause_s = min(_MAX_PAUSE_S, self._pause_s * 2)
