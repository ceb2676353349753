"""How far the reading of weights is: a bar on a terminal, log lines otherwise, and a callback for whoever asks."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import TextIO

logger = logging.getLogger(__name__)

_BAR_WIDTH = 30
# A terminal is redrawn at most this often; a log gets a line at most this often.
_REDRAW_S = 0.1
_LOG_S = 5.0


class LoadProgress:
    """Counts bytes read out of total_bytes and reports them, at a bounded rate.

    on_fraction: called with a number from 0 to 1 after every piece. clock: seconds, monotonic.
    """

    def __init__(
        self,
        total_bytes: int,
        label: str,
        *,
        stream: TextIO | None = None,
        on_fraction: Callable[[float], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_bytes = total_bytes
        self._label = label
        self._stream = stream if stream is not None else sys.stderr
        self._is_terminal = self._stream.isatty()
        self._on_fraction = on_fraction
        self._clock = clock
        self._started_s = clock()
        self._reported_s = self._started_s
        self.done_bytes = 0

    def advance(self, num_bytes: int) -> None:
        self.done_bytes += num_bytes
        if self._on_fraction is not None:
            self._on_fraction(self.done_bytes / self._total_bytes if self._total_bytes else 1.0)
        now_s = self._clock()
        if now_s - self._reported_s >= (_REDRAW_S if self._is_terminal else _LOG_S):
            self._reported_s = now_s
            self._report(now_s - self._started_s)

    def finish(self) -> None:
        """Report the whole, once, and leave the terminal on a fresh line."""
        elapsed_s = self._clock() - self._started_s
        if self._is_terminal:
            self._report(elapsed_s)
            self._stream.write("\n")
            self._stream.flush()
        gigabytes = self.done_bytes / 1e9
        rate = gigabytes / elapsed_s if elapsed_s > 0 else 0.0
        logger.info("%s: %.3f GB in %.1f s, %.2f GB/s", self._label, gigabytes, elapsed_s, rate)

    def _report(self, elapsed_s: float) -> None:
        fraction = min(1.0, self.done_bytes / self._total_bytes) if self._total_bytes else 1.0
        rate = self.done_bytes / elapsed_s if elapsed_s > 0 else 0.0
        remaining = f"{(self._total_bytes - self.done_bytes) / rate:.0f} s left" if rate > 0 else "starting"
        figures = f"{self.done_bytes / 1e9:.2f}/{self._total_bytes / 1e9:.2f} GB  {rate / 1e9:.2f} GB/s  {remaining}"
        if self._is_terminal:
            filled = int(fraction * _BAR_WIDTH)
            bar = "#" * filled + "-" * (_BAR_WIDTH - filled)
            self._stream.write(f"\r\x1b[2K{self._label} [{bar}] {fraction:4.0%}  {figures}")
            self._stream.flush()
        else:
            logger.info("%s: %.0f %%, %s", self._label, 100 * fraction, figures)
