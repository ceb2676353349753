import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn
from starlette.types import ASGIApp

from cluster.admin_app import create_admin_app, hash_token
from cluster.controller_app import ControllerApp
from tests.cluster.test_admin_app import TOKEN, FakeController
from tests.free_ports import find_free_ports
from tests.ray.serve_process import wait_for

HEADERS = {"Authorization": f"Bearer {TOKEN}"}


@contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """host:port of a real server in a thread."""
    port = find_free_ports(1)[0]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started, 20)
        yield f"127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)


def make_app(leader: str | None = None, is_live: bool = True, is_ready: bool = True) -> ControllerApp:
    return ControllerApp(lambda: is_live, lambda: is_ready, lambda: leader)


def make_leader(controller: FakeController) -> ControllerApp:
    app = make_app()
    app.admin = create_admin_app(controller, hash_token(TOKEN))
    return app


async def ask(app: ControllerApp, path: str) -> httpx.Response:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://standby", headers=HEADERS) as client:
        return await client.get(path)


async def test_probes_need_no_token_and_tell_failure():
    good, bad = make_app(), make_app(is_live=False, is_ready=False)
    for path in ("/health/live", "/health/ready"):
        assert (await ask(good, path)).status_code == 200
        assert (await ask(bad, path)).status_code == 503


async def test_without_a_leader_the_answer_is_try_again():
    answer = await ask(make_app(), "/status")
    assert answer.status_code == 503
    assert "no controller leads" in answer.json()["error"]["message"]


def test_a_standby_forwards_with_token_and_body_and_the_leader_judges_the_token():
    controller = FakeController()
    with serving(make_leader(controller)) as leader, serving(make_app(leader)) as standby:
        with httpx.Client(base_url=f"http://{standby}", trust_env=False, timeout=20) as client:
            assert client.get("/status", headers=HEADERS).json() == {"ready": True}
            assert client.get("/events", params={"after": 4}, headers=HEADERS).json()["events"] == [{"sequence": 5}]
            answer = client.post("/scale", json={"groups": {"g0": 2}}, headers=HEADERS)
            assert (answer.status_code, answer.json()) == (200, {"desired_version": 7})
            assert controller.changes == [{"g0": 2}]
            assert client.get("/status").status_code == 401
            assert client.post("/scale", content=b"x" * (2 << 20), headers=HEADERS).status_code == 413


def test_two_standbys_that_take_each_other_for_the_leader_do_not_forward_for_ever():
    first = make_app()
    with serving(first) as first_address, serving(make_app(first_address)) as second_address:
        first._find_leader = lambda: second_address
        answer = httpx.get(f"http://{first_address}/status", headers=HEADERS, trust_env=False, timeout=20)
        assert answer.status_code == 503


async def test_a_leader_that_does_not_answer_is_said():
    port = find_free_ports(1)[0]
    answer = await ask(make_app(f"127.0.0.1:{port}"), "/status")
    assert answer.status_code == 503
    assert "does not answer" in answer.json()["error"]["message"]
