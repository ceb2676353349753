"""Signs of life: who is found dead, and who is not. On the loop that routers run on."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import uvloop

from router.heartbeat import Heartbeat, HeartbeatOptions
from tests.router.in_process import DEADLINE_S

QUICK = HeartbeatOptions(interval_s=0.05, num_missed=3)


class Watched:
    """A heartbeat and what it said."""

    def __init__(self) -> None:
        self.num_missed = 0
        self.reason: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.heartbeat = Heartbeat(QUICK, self._miss, self.reason.set_result)

    def _miss(self) -> None:
        self.num_missed += 1


async def connect(port: int) -> Watched:
    watched = Watched()
    await asyncio.get_running_loop().create_connection(lambda: watched.heartbeat, "127.0.0.1", port)
    return watched


@contextlib.contextmanager
def peer(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server of one connection, in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(DEADLINE_S)
            serve(connection)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.close()
    thread.join(DEADLINE_S)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_peer_that_says_nothing_is_dead_after_three_beats(run: Callable[..., None]) -> None:
    async def check(port: int) -> None:
        watched = await connect(port)
        assert await asyncio.wait_for(watched.reason, DEADLINE_S) == "no heartbeat for 0.2 s"
        assert watched.num_missed == QUICK.num_missed

    with peer(lambda connection: [None for _ in iter(lambda: connection.recv(1000), b"")].clear()) as port:
        run(check(port))


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_grpc_server_answers_and_its_orderly_end_is_no_death(run: Callable[..., None]) -> None:
    server = grpc.server(ThreadPoolExecutor(1), options=[("grpc.http2.max_ping_strikes", 0)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()

    async def check() -> None:
        watched = await connect(port)
        await asyncio.sleep(12 * QUICK.interval_s)  # many beats: nothing happens, which is what is tested
        assert not watched.reason.done() and watched.num_missed == 0
        await asyncio.to_thread(server.stop(0).wait)
        await asyncio.sleep(6 * QUICK.interval_s)
        assert not watched.reason.done()  # the stream's own end says when

    run(check())


def test_a_broken_connection_is_dead_at_once() -> None:
    async def check(port: int) -> None:
        watched = await connect(port)
        assert "broke" in await asyncio.wait_for(watched.reason, DEADLINE_S)

    with peer(lambda connection: None) as port:
        uvloop.run(check(port))


def test_a_server_that_allows_no_pings_is_not_dead() -> None:
    """grpcio's default limits: it goes away after three pings."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()

    async def check() -> None:
        watched = await connect(port)
        await asyncio.sleep(12 * QUICK.interval_s)
        assert not watched.reason.done()

    uvloop.run(check())
    server.stop(0)


def test_a_frame_longer_than_allowed_ends_it() -> None:
    async def check(port: int) -> None:
        watched = await connect(port)
        assert "bytes" in await asyncio.wait_for(watched.reason, DEADLINE_S)

    def send_too_much(connection: socket.socket) -> None:
        connection.sendall(b"\xff\xff\xff" + bytes(6))
        # Closed with unread bytes it would be reset, and what was sent lost.
        with contextlib.suppress(ConnectionError):
            while connection.recv(1000):
                pass

    with peer(send_too_much) as port:
        uvloop.run(check(port))
