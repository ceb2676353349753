"""Streams that run one after another in threads while a scenario happens, and what became of them."""

from __future__ import annotations

import math
import threading
import time
from typing import NamedTuple

from tests.ray.serve_process import stream_chat, wait_for

JOIN_S = 60.0


class Gap(NamedTuple):
    """Between two pieces of one stream. ended_s: of time.time(), as the times of events are."""

    length_s: float
    ended_s: float


class StreamLoad:
    """A context manager: streams run inside it; leaving it waits for the last ones."""

    def __init__(self, url: str, num_streams: int, max_tokens: int) -> None:
        self.texts: list[str] = []
        self.failures: list[str] = []
        self.gaps: list[Gap] = []
        self._url = url
        self._max_tokens = max_tokens
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(num_streams)]

    def list_gaps(self, since_s: float = 0.0, until_s: float = math.inf) -> list[float]:
        """In seconds, of those that ended in a span of time.time()."""
        return [gap.length_s for gap in self.gaps if since_s <= gap.ended_s < until_s]

    def __enter__(self) -> StreamLoad:
        for thread in self._threads:
            thread.start()
        # What happens inside happens under load.
        wait_for(lambda: bool(self.texts or self.failures), JOIN_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(JOIN_S)
            assert not thread.is_alive(), "a stream did not end"

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.texts.append(self._stream())
            except Exception as error:
                self.failures.append(repr(error))

    def _stream(self) -> str:
        text = ""
        last_s: float | None = None
        for piece in stream_chat(self._url, self._max_tokens):
            now_s = time.time()
            if last_s is not None:
                self.gaps.append(Gap(now_s - last_s, now_s))
            text, last_s = text + piece, now_s
        return text
