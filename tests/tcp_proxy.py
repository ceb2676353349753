"""An in-path TCP proxy in a process of its own: delay, stall, cut, one-way black hole. Loopback only.

    with tcp_proxy(["127.0.0.1:5001", "127.0.0.1:5002"], delay_ms=0.5) as proxy:
        router(proxy.endpoints)
        proxy.stall(); proxy.resume(); proxy.cut()

delay_ms is for each direction, so a round trip takes twice as long. The proxy is one thread around select(), whose
timeout, other than epoll's in Python and uvloop's timers, is finer than a millisecond. Bytes are only ever delayed,
held or lost, never changed. The kernels that the tests run on have no netem.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

HOST = "127.0.0.1"
START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 5.0
REPOSITORY = Path(__file__).resolve().parent.parent
Direction = Literal["to_server", "to_client"]

# Below malloc's mmap threshold: a larger buffer is mapped and cleared for every read, which doubles the proxy's cost.
_CHUNK_BYTES = 64 * 1024
# Of one direction, held back for delay or because the receiver is slow; then the sender is slowed down, too.
_MAX_HELD_BYTES = 16 * 1024 * 1024


class TcpProxy:
    """The handle of a running proxy. endpoints[i] leads to the i-th target; target=None in a method means all."""

    def __init__(self, process: subprocess.Popen[str], endpoints: list[str]) -> None:
        self._process = process
        self.endpoints = endpoints

    @property
    def pid(self) -> int:
        return self._process.pid

    def set_delay(self, delay_ms: float, target: int | None = None) -> None:
        """Delay what is read from now on by so much in each direction."""
        self._command("delay", target, delay_ms=delay_ms)

    def stall(self, target: int | None = None) -> None:
        """Hold everything in both directions, connections stay open and new ones are accepted."""
        self._command("stall", target)

    def resume(self, target: int | None = None) -> None:
        """End a stall: what was held goes on."""
        self._command("resume", target)

    def black_hole(self, direction: Direction, target: int | None = None) -> None:
        """Lose everything in one direction until restore()."""
        self._command("black_hole", target, direction=direction)

    def restore(self, target: int | None = None) -> None:
        """End a black hole. Connections open now are cut: bytes are missing from their streams."""
        self._command("restore", target)

    def cut(self, target: int | None = None) -> int:
        """Reset all connections, as a dead process does; new ones are accepted. Returns how many there were."""
        return self._command("cut", target)

    def refuse(self, refused: bool = True, target: int | None = None) -> None:
        """Reset new connections at once, or stop doing so."""
        self._command("refuse", target, refused=refused)

    def _command(self, name: str, target: int | None, **arguments: Any) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"name": name, "target": target, **arguments}) + "\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], STOP_TIMEOUT_S)
        if not ready:
            raise AssertionError(f"the proxy did not answer {name}")
        return json.loads(self._process.stdout.readline())["done"]


@contextlib.contextmanager
def tcp_proxy(targets: Sequence[str], *, delay_ms: float = 0.0) -> Iterator[TcpProxy]:
    """Run a proxy in front of targets ("host:port") until the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.tcp_proxy", "--delay-ms", str(delay_ms), *targets],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], START_TIMEOUT_S)
        if not ready:
            raise AssertionError("the proxy did not start")
        yield TcpProxy(process, json.loads(process.stdout.readline())["endpoints"])
    finally:
        assert process.stdin is not None
        process.stdin.close()  # it ends with its standard input
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_TIMEOUT_S)


class _Flow:
    """One direction of a connection: bytes read from source, each chunk with the time it may go on."""

    def __init__(self, source: socket.socket, sink: socket.socket, direction: Direction) -> None:
        self.source = source
        self.sink = sink
        self.direction: Direction = direction
        self.held: collections.deque[tuple[float, memoryview]] = collections.deque()
        self.held_bytes = 0
        self.at_end = False
        self.closed = False

    def read(self, due_s: float, *, lost: bool) -> None:
        data = self.source.recv(_CHUNK_BYTES)
        if not data:
            self.at_end = True
        elif not lost:
            self.held.append((due_s, memoryview(data)))
            self.held_bytes += len(data)

    def write(self, now_s: float) -> None:
        """Send what is due, as far as the sink takes it."""
        while self.held and self.held[0][0] <= now_s:
            due_s, data = self.held[0]
            sent = self.sink.send(data)
            self.held_bytes -= sent
            if sent < len(data):
                self.held[0] = (due_s, data[sent:])
                return
            self.held.popleft()
        if self.at_end and not self.held and not self.closed:
            self.closed = True
            self.sink.shutdown(socket.SHUT_WR)


class _Target:
    """A listener, where it leads, and its connections."""

    def __init__(self, address: str, delay_s: float) -> None:
        host, _, port = address.rpartition(":")
        self.address = (host, int(port))
        self.listener = socket.create_server((HOST, 0))
        self.listener.setblocking(False)
        self.delay_s = delay_s
        self.stalled = False
        self.refused = False
        self.lost: Direction | None = None
        self.links: list[tuple[_Flow, _Flow]] = []

    @property
    def endpoint(self) -> str:
        return f"{HOST}:{self.listener.getsockname()[1]}"

    def accept(self) -> None:
        client, _ = self.listener.accept()
        try:
            if self.refused:
                raise ConnectionRefusedError
            server = socket.create_connection(self.address, timeout=STOP_TIMEOUT_S)
        except OSError:
            _reset(client)
            return
        for side in (client, server):
            side.setblocking(False)
            side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.links.append((_Flow(client, server, "to_server"), _Flow(server, client, "to_client")))

    def drop(self, link: tuple[_Flow, _Flow]) -> None:
        self.links.remove(link)
        for flow in link:
            if flow.closed:
                flow.source.close()
            else:
                _reset(flow.source)

    def cut(self) -> int:
        count = len(self.links)
        for link in list(self.links):
            self.drop(link)
        return count

    def obey(self, command: dict[str, Any]) -> int:
        """Returns the number of connections concerned."""
        match command["name"]:
            case "delay":
                self.delay_s = command["delay_ms"] / 1000
            case "stall":
                self.stalled = True
            case "resume":
                self.stalled = False
            case "black_hole":
                self.lost = command["direction"]
            case "restore":
                self.lost = None
                return self.cut()
            case "cut":
                return self.cut()
            case "refuse":
                self.refused = command["refused"]
            case name:
                raise ValueError(f"unknown command {name}")
        return len(self.links)


def _serve(targets: list[_Target]) -> None:
    """Until standard input ends."""
    pending = b""
    while True:
        now_s = time.monotonic()
        flows = [
            (target, link, flow) for target in targets if not target.stalled for link in target.links for flow in link
        ]
        readers: dict[Any, Any] = {sys.stdin.fileno(): None}
        readers.update((target.listener, target) for target in targets)
        writers: dict[Any, Any] = {}
        next_due_s: float | None = None
        for target, link, flow in flows:
            if not flow.at_end and flow.held_bytes < _MAX_HELD_BYTES:
                readers[flow.source] = (target, link, flow)
            if flow.held:
                due_s = flow.held[0][0]
                if due_s <= now_s:
                    writers[flow.sink] = (target, link, flow)
                elif next_due_s is None or due_s < next_due_s:
                    next_due_s = due_s
        timeout_s = None if next_due_s is None else max(0.0, next_due_s - now_s)
        readable, _, _ = select.select(readers, writers, [], timeout_s)
        for ready in readable:
            found = readers[ready]
            if found is None:
                data = os.read(sys.stdin.fileno(), 65536)
                if not data:
                    return
                *lines, pending = (pending + data).split(b"\n")
                for line in lines:
                    command = json.loads(line)
                    concerned = targets if command["target"] is None else [targets[command["target"]]]
                    print(json.dumps({"done": sum(target.obey(command) for target in concerned)}), flush=True)
            elif isinstance(found, _Target):
                found.accept()
            else:
                target, link, flow = found
                _attempt(
                    target,
                    link,
                    lambda t=target, f=flow: f.read(time.monotonic() + t.delay_s, lost=t.lost == f.direction),
                )
        # What is due now goes out at once; a sink that does not take it is watched by the next select().
        now_s = time.monotonic()
        for target, link, flow in flows:
            if link in target.links and not target.stalled and (flow.held or flow.at_end):
                _attempt(target, link, lambda f=flow, n=now_s: f.write(n))


def _attempt(target: _Target, link: tuple[_Flow, _Flow], act: Any) -> None:
    """Do it; a broken connection is broken on both sides, one that is closed both ways is forgotten."""
    if link not in target.links:
        return
    try:
        act()
    except BlockingIOError:
        return
    except OSError:
        target.drop(link)
        return
    if all(flow.closed for flow in link):
        target.drop(link)


def _reset(side: socket.socket) -> None:
    """Close with RST."""
    with contextlib.suppress(OSError):
        side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    side.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.tcp_proxy")
    parser.add_argument("targets", nargs="+", metavar="HOST:PORT")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="of each direction")
    arguments = parser.parse_args()
    targets = [_Target(address, arguments.delay_ms / 1000) for address in arguments.targets]
    print(json.dumps({"endpoints": [target.endpoint for target in targets]}), flush=True)
    _serve(targets)


if __name__ == "__main__":
    main()
