"""A headless Chromium of the machine, driven over its DevTools protocol.

https://chromedevtools.github.io/devtools-protocol/. Debian's package `chromium` will do; where there is none,
tests that need it are skipped and say so.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import ClientConnection, connect

START_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 30.0
_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--remote-debugging-port=0",
)  # fmt: skip


class Page:
    """One tab. errors: what went wrong in it, exceptions and refusals by its content-security-policy included."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._last_id = 0
        self.errors: list[str] = []
        self.requested_urls: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Raises AssertionError if the browser refuses it, TimeoutError if it does not answer."""
        self._last_id += 1
        self._socket.send(json.dumps({"id": self._last_id, "method": method, "params": parameters}))
        deadline_s = time.monotonic() + CALL_TIMEOUT_S
        while True:
            message = json.loads(self._socket.recv(timeout=max(0.0, deadline_s - time.monotonic())))
            if message.get("id") == self._last_id:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def set_screen(self, width: int, height: int, *, is_phone: bool = False, is_dark: bool = False) -> None:
        scale = 2 if is_phone else 1
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=is_phone
        )
        scheme = "dark" if is_dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are waited for."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, expression: str, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Until a JavaScript expression is true."""
        deadline_s = time.monotonic() + timeout_s
        while not self.evaluate(f"Boolean({expression})"):
            assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {expression}; errors: {self.errors}"
            time.sleep(0.05)

    def take_screenshot(self, path: Path) -> bytes:
        """Of the whole page, as PNG."""
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"])
        path.write_bytes(data)
        return data

    def _note(self, message: dict[str, Any]) -> None:
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.errors.append(str(message["params"]["exceptionDetails"]))
            case "Log.entryAdded" if message["params"]["entry"]["level"] == "error":
                self.errors.append(str(message["params"]["entry"]))
            case "Network.requestWillBeSent":
                self.requested_urls.append(message["params"]["request"]["url"])


def find_chromium() -> str:
    """Skips the test where there is none."""
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    return found


@contextmanager
def open_page() -> Iterator[Page]:
    """A browser with a profile of its own; skips the test where there is none."""
    program = find_chromium()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            port = _wait_port(Path(profile) / "DevToolsActivePort", process)
            targets = httpx.get(f"http://127.0.0.1:{port}/json/list", timeout=CALL_TIMEOUT_S, trust_env=False).json()
            url = next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page")
            with connect(url, max_size=None, proxy=None) as socket:
                yield Page(socket)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


def _wait_port(path: Path, process: subprocess.Popen[bytes]) -> int:
    """The browser writes it there once it listens."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        assert process.poll() is None, f"Chromium ended with {process.returncode}"
        if path.exists() and (lines := path.read_text().splitlines()):
            return int(lines[0])
        assert time.monotonic() < deadline_s, "Chromium did not listen in time"
        time.sleep(0.05)
