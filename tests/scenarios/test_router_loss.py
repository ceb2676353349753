"""Two routers of a real cluster, killed in turn and stopped, under load: no request fails and no token changes."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tests.ray.serve_process import ServeProcess, stream_chat, wait_for
from tests.scenarios.stream_load import StreamLoad

pytestmark = pytest.mark.timeout(240)
MAX_TOKENS = 100
NUM_STREAMS = 8


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    arguments = ("--groups", "2", "--routers", "2", "--router-threads", "1", "--expert-threads", "1")
    process = ServeProcess(tmp_path_factory.mktemp("router-loss"), *arguments)
    try:
        process.wait_ready()
        yield process
    finally:
        process.close()


@pytest.fixture(scope="module")
def undisturbed(serve: ServeProcess) -> str:
    return "".join(stream_chat(serve.url, MAX_TOKENS))


def test_each_router_is_killed_once_under_load(serve: ServeProcess, undisturbed: str) -> None:
    with StreamLoad(serve.url, NUM_STREAMS, MAX_TOKENS) as load:
        for victim in list_routers(serve):
            wait_for(lambda router_id=victim["id"]: is_busy(serve, router_id), 30)
            os.kill(victim["pid"], signal.SIGKILL)
            wait_for(lambda old=victim: is_back(serve, old), 60)
    assert not load.failures
    assert set(load.texts) == {undisturbed}


def test_a_router_is_stopped_under_load(serve: ServeProcess, undisturbed: str) -> None:
    victim = list_routers(serve)[0]
    process = psutil.Process(victim["pid"])
    try:
        with StreamLoad(serve.url, NUM_STREAMS, MAX_TOKENS) as load:
            wait_for(lambda: is_busy(serve, victim["id"]), 30)
            process.suspend()
            num_before = len(load.texts)
            wait_for(lambda: len(load.texts) >= num_before + 2 * NUM_STREAMS, 60)
    finally:
        if process.is_running():
            process.resume()
    assert not load.failures
    assert set(load.texts) == {undisturbed}


def list_routers(serve: ServeProcess) -> list[dict[str, Any]]:
    return serve.fetch_status()["routers"]


def find_router(serve: ServeProcess, router_id: str) -> dict[str, Any]:
    return next(router for router in list_routers(serve) if router["id"] == router_id)


def is_busy(serve: ServeProcess, router_id: str) -> bool:
    return (find_router(serve, router_id).get("num_running") or 0) > 0


def is_back(serve: ServeProcess, old: dict[str, Any]) -> bool:
    router = find_router(serve, old["id"])
    return router["state"] == "ready" and router["pid"] != old["pid"]
