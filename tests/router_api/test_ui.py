"""The status page: its files and data over real HTTP, and what a real browser makes of them.

Screenshots are left in SHOAL_TEST_SCREENSHOTS, a folder, if that variable is set.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from router.api.router_client import StaticEndpoints
from router.api.settings import ApiSettings
from router.api.tokenizer import TextTokenizer
from router.api.viewer import derive_viewer_token, is_admin
from router.tenancy.key_file import make_key, new_key_file, save_key_file
from router.v1 import router_pb2
from tests.browser import Page, open_page
from tests.metrics_text import Scrape
from tests.router_api.api_server import ApiServer
from tests.router_api.conftest import MODEL
from tests.router_api.scripted_router import ScriptedRouter, answer

NUM_EXPERTS = 64
LAYERS = range(1, 13)
REPLICA_STATES = {
    "g0-0": "ready", "g0-1": "ready", "g1-0": "ready", "g1-1": "draining", "g2-0": "starting", "g3-0": "dead",
}  # fmt: skip


def count_pairs(layer: int, expert: int) -> int:
    """Some experts are asked for far more often than others."""
    return ((expert * 7919 + layer * 104729) % 97) ** 2 // (1 + expert % 5)


class ScriptedCluster:
    """What a controller might say. is_away: it does not answer."""

    def __init__(self) -> None:
        self.is_away = False
        now_s = time.time()
        self.events: list[dict[str, Any]] = [
            {"sequence": 1, "time": now_s - 9, "object": "router r0", "action": "start", "reason": "process 41 on n0"},
            {"sequence": 2, "time": now_s - 5, "object": "replica g3-0", "action": "dead",
             "reason": "does not answer: <b>unavailable</b>"},
        ]  # fmt: skip

    async def fetch_status(self) -> dict[str, Any] | None:
        if self.is_away:
            return None
        groups = []
        for number in range(4):
            replicas = [
                {
                    "id": replica_id, "state": state, "message": "its process ended" if state == "dead" else "",
                    "node": f"node-{number}", "pid": 100 + number,
                    "load": None if state in ("dead", "starting") else
                    {"busy_share": 0.92 if replica_id == "g0-0" else 0.4, "queue_ms": 1.5, "pairs_per_busy_s": 9000.0},
                }
                for replica_id, state in REPLICA_STATES.items()
                if replica_id.startswith(f"g{number}-")
            ]  # fmt: skip
            share = NUM_EXPERTS // 4
            groups.append(
                {
                    "name": f"g{number}", "desired_replicas": max(1, len(replicas)), "replicas": replicas,
                    "experts": [[number * share, (number + 1) * share]], "layers": [[1, 13]],
                }
            )  # fmt: skip
        router = {"id": "r0", "state": "ready", "message": "", "node": "node-0", "endpoint": "n0:1", "pid": 41}
        lost = {"id": "r1", "state": "dead", "message": "its process ended", "node": "node-1", "endpoint": "n1:1",
                "pid": 42}  # fmt: skip
        return {"draining": False, "control_plane": True, "routers": [router, lost], "groups": groups}

    async def fetch_events(self, after: int) -> Sequence[dict[str, Any]] | None:
        return None if self.is_away else [event for event in self.events if event["sequence"] > after]

    async def fetch_expert_load(self) -> dict[str, Any] | None:
        if self.is_away:
            return None
        layers = [
            {"layer": layer, "pairs": [count_pairs(layer, expert) for expert in range(NUM_EXPERTS)]} for layer in LAYERS
        ]
        return {"window_s": 600.0, "num_experts": NUM_EXPERTS, "layers": layers}

    async def close(self) -> None: ...


@pytest.fixture(scope="module")
def scripted(tokenizer: TextTokenizer) -> Iterator[ScriptedRouter]:
    router = ScriptedRouter()
    router.status = router_pb2.StatusResponse(
        router_id="r0",
        ready=True,
        table_version=7,
        num_running=5,
        num_waiting=3,
        num_blocks=100,
        num_blocks_held=40,
        num_steps=1000,
        step_times=router_pb2.StepTimes(
            attention_ns=4 * 10**9, gate_ns=10**8, scatter_ns=5 * 10**8, wait_ns=3 * 10**9, shared_ns=10**9,
            head_ns=6 * 10**8, sample_ns=3 * 10**8, overhead_ns=2 * 10**8,
        ),
        num_drafted=[100],
        num_accepted=[80],
        groups=[
            router_pb2.GroupTraffic(
                name=f"g{number}", num_frames=5000, sent_bytes=10**8, received_bytes=10**8,
                latency_counts=[0, 0, 5000, *[0] * 16], latency_us=900_000, num_retries=number,
            )
            for number in range(4)
        ],
        teams=[
            router_pb2.TeamQueue(fairness_key="search", num_running=4, num_waiting=1),
            router_pb2.TeamQueue(fairness_key="support", num_running=1, num_waiting=2),
        ],
    )  # fmt: skip
    router.script = answer(tokenizer.encode_raw("hello world, the quick brown fox", add_special_tokens=False))
    yield router
    router.stop()


@pytest.fixture(scope="module")
def cluster() -> ScriptedCluster:
    return ScriptedCluster()


@pytest.fixture(scope="module")
def server(settings: ApiSettings, scripted: ScriptedRouter, cluster: ScriptedCluster) -> Iterator[ApiServer]:
    server = ApiServer(settings, StaticEndpoints([scripted.endpoint]), cluster)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def http(server: ApiServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=10.0) as client:
        yield client


def test_the_page_may_load_nothing_from_elsewhere(http: httpx.Client):
    response = http.get("/ui")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", ["index.html", "style.css", "main.js", "icon.svg"])
def test_static_files_carry_the_policy_and_their_type(http: httpx.Client, name: str):
    response = http.get(f"/ui/static/{name}")
    assert response.status_code == 200
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "//" not in response.text.replace("http://www.w3.org/2000/svg", "").replace("// ", "")


@pytest.mark.parametrize("name", ["nothing.js", "..%2fui.py", "%2e%2e%2fui.py", "../ui.py", "ui.py", ""])
def test_no_other_file_is_served(http: httpx.Client, name: str):
    response = http.get(f"/ui/static/{name}")
    assert response.status_code == 404
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_state_joins_what_controller_and_routers_say(http: httpx.Client):
    page = http.get("/ui/state").json()
    assert page["model"] == MODEL
    assert page["state"] == "ready"
    found = {replica["id"]: replica["state"] for group in page["groups"] for replica in group["replicas"]}
    assert found == REPLICA_STATES
    routers = {router["id"]: router["state"] for router in page["routers"]}
    assert routers == {"r0": "ready", "r1": "dead"}
    assert page["groups"][1]["traffic"]["num_retries"] == 1
    assert page["teams"][0] == {"team": "search", "num_running": 4, "num_waiting": 1}


@dataclass(frozen=True)
class Keyed:
    """A front with keys of two teams, which each have had one answer, beside a controller."""

    server: ApiServer
    keys: Mapping[str, str]

    def get(self, path: str, token: str) -> httpx.Response:
        return httpx.get(f"{self.server.url}{path}", headers={"Authorization": f"Bearer {token}"}, timeout=10)


@pytest.fixture(scope="module")
def keyed(
    settings: ApiSettings, scripted: ScriptedRouter, cluster: ScriptedCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Keyed]:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    file, search = make_key(new_key_file(), "search", datetime.now(UTC))
    file, support = make_key(file, "support", datetime.now(UTC))
    save_key_file(path, file)
    with_keys = replace(settings, keys_file=path, viewer_token=derive_viewer_token("admin"), metrics_compat="vllm")
    keyed = Keyed(
        ApiServer(with_keys, StaticEndpoints([scripted.endpoint]), cluster),
        {"search": search.text, "support": support.text},
    )
    for key in keyed.keys.values():
        answered = httpx.post(
            f"{keyed.server.url}/v1/completions",
            json={"model": MODEL, "prompt": [5, 6], "max_tokens": 2},
            headers={"Authorization": f"Bearer {key}"},
            timeout=10,
        )
        assert answered.status_code == 200
    yield keyed
    keyed.server.stop()


def test_a_team_sees_its_own_queue_and_the_administrator_all(keyed: Keyed):
    def list_teams(token: str) -> list[str]:
        return [team["team"] for team in keyed.get("/ui/state", token).json()["teams"]]

    assert list_teams(keyed.keys["support"]) == ["support"]
    assert list_teams("admin") == ["search", "support"]


def test_metrics_tell_a_team_its_own_figures_and_the_administrator_all(keyed: Keyed):
    def scrape(token: str) -> Scrape:
        return Scrape.parse(keyed.get("/metrics", token).text)

    all_, own = scrape("admin"), scrape(keyed.keys["support"])
    assert {sample.labels["team"] for sample in all_.samples if "team" in sample.labels} == {"search", "support"}
    assert {sample.labels["team"] for sample in own.samples if "team" in sample.labels} == {"support"}
    assert "search" not in keyed.get("/metrics", keyed.keys["support"]).text
    assert own.get("shoal_team_requests_waiting", router="r0") == 2
    # Nor as a part of a sum.
    assert all_.get("vllm:request_success_total", finished_reason="length") == 2
    assert own.get("vllm:request_success_total", finished_reason="length") == 1
    # What is not told by team is told to everybody who has a key.
    assert own.get("shoal_num_requests_running", router="r0") == 5
    assert {*own.types} == {*all_.types}
    assert keyed.get("/metrics", "nobody's").status_code == 401


def test_events_come_after_the_last_one_seen(http: httpx.Client):
    assert [event["sequence"] for event in http.get("/ui/events?after=1").json()["events"]] == [2]
    assert http.get("/ui/events?after=-1").status_code == 400
    assert http.get("/ui/experts").json()["num_experts"] == NUM_EXPERTS


def test_without_a_controller_the_routers_word_counts(settings: ApiSettings):
    router = ScriptedRouter()
    router.status.replicas.add(replica_id="g0-0", connected=True)
    router.status.replicas.add(replica_id="g1-0", connected=False)
    server = ApiServer(settings, StaticEndpoints([router.endpoint]))
    try:
        page = httpx.get(f"{server.url}/ui/state").json()
        states = {group["name"]: group["replicas"][0]["state"] for group in page["groups"]}
        assert states == {"g0": "ready", "g1": "dead"}
        assert httpx.get(f"{server.url}/ui/events").status_code == 503
        assert httpx.get(f"{server.url}/ui/experts").status_code == 503
    finally:
        server.stop()
        router.stop()


def test_the_administrator_is_known_by_the_viewer_token_that_follows():
    viewer_token = derive_viewer_token("secret")
    assert is_admin("secret", viewer_token)
    assert not is_admin(viewer_token, viewer_token)
    assert not is_admin("", viewer_token)
    assert not is_admin("secret", None)


def test_a_browser_shows_it_on_desktop_and_phone_light_and_dark(server: ApiServer, tmp_path: Path):
    folder = Path(os.environ.get("SHOAL_TEST_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    for _ in range(3):
        httpx.post(f"{server.url}/v1/completions", json={"prompt": "hello", "max_tokens": 8})
    with open_page() as page:
        sizes: list[int] = []
        for name, width, height, is_phone, is_dark in (
            ("desktop-light", 1360, 900, False, False),
            ("desktop-dark", 1360, 900, False, True),
            ("phone-light", 390, 844, True, False),
            ("phone-dark", 390, 844, True, True),
        ):
            page.set_screen(width, height, is_phone=is_phone, is_dark=is_dark)
            page.open(f"{server.url}/ui")
            check_page(page, is_dark)
            sizes.append(len(page.take_screenshot(folder / f"ui-{name}.png")))
        assert min(sizes) > 20_000
        chat(page)
        assert page.errors == []
        assert {httpx.URL(url).netloc for url in page.requested_urls} == {httpx.URL(server.url).netloc}


def check_page(page: Page, is_dark: bool) -> None:
    page.wait_for("document.querySelectorAll('[data-replica]').length === 6 && document.querySelector('canvas')")
    page.wait_for("document.querySelectorAll('#event-list li').length === 2")
    states = json.loads(
        page.evaluate(
            "JSON.stringify(Object.fromEntries([...document.querySelectorAll('[data-replica]')]"
            ".map(one => [one.dataset.replica, one.dataset.state])))"
        )
    )
    assert states == REPLICA_STATES
    text = page.evaluate("document.body.innerText")
    for expected in (MODEL, "r0", "r1", "search", "support", "replica g3-0 dead", "<b>unavailable</b>", "experts 0–15",
                     "3 of 6 replicas ready", "draft 1: 80 % hold", "40 %"):  # fmt: skip
        assert expected in text
    assert page.evaluate("document.getElementById('ttft').textContent") not in ("–", "")
    # Painted, from cold to hot, with a cell per layer and expert.
    canvas = "document.querySelector('canvas')"
    assert page.evaluate(f"[{canvas}.width, {canvas}.height].join()") == f"{NUM_EXPERTS},{len(LAYERS)}"
    colours = page.evaluate(
        f"new Set(new Uint32Array({canvas}.getContext('2d').getImageData(0, 0, {NUM_EXPERTS}, 12).data.buffer)).size"
    )
    assert colours > 20
    # Nothing to scroll sideways, and the theme is the system's.
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    luminance = page.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((a, b) => +a + +b, 0)"
    )
    assert (luminance < 200) == is_dark


def chat(page: Page) -> None:
    page.evaluate("document.getElementById('prompt').value = 'hi <i>there</i>'")
    page.evaluate("document.getElementById('send').click()")
    page.wait_for("document.querySelector('#messages .assistant')?.textContent.includes('quick brown fox')")
    page.wait_for("document.getElementById('chat-note').textContent.includes('tokens, first after')")
    assert page.evaluate("document.querySelector('#messages .user').textContent") == "hi <i>there</i>"
