from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import pytest

from cluster.admin_app import MAX_BODY_BYTES, create_admin_app, hash_token
from cluster.errors import ChangeRefused, StoreUnavailable
from router.api.viewer import derive_viewer_token

TOKEN = "correct horse"
VIEWER_TOKEN = derive_viewer_token(TOKEN)


class FakeController:
    def __init__(self) -> None:
        self.drained_s: list[float] = []
        self.changes: list[Any] = []
        self.broken = False

    def get_status(self) -> dict[str, Any]:
        if self.broken:
            raise RuntimeError("secret detail")
        return {"ready": True}

    def get_plan_view(self) -> dict[str, Any]:
        return {"steps": []}

    def get_events(self, after: int) -> list[dict[str, Any]]:
        return [{"sequence": after + 1}]

    def get_event_counts(self) -> Mapping[tuple[str, str], int]:
        return {("replica", "start"): 3}

    async def fetch_expert_load(self) -> dict[str, Any]:
        return {"layers": []}

    async def plan_rebalancing(self, extra_share: float) -> dict[str, Any]:
        return {"extra_share": extra_share}

    async def rebalance(self, extra_share: float) -> dict[str, Any]:
        return {"current": {"number": 1, "extra_share": extra_share}}

    def get_balancer_view(self) -> dict[str, Any]:
        return {"current": None, "alarm": None}

    async def scale(self, counts: Mapping[str, int], force: bool) -> int:
        if counts.get("g0") == 0 and not force:
            raise ChangeRefused("needs --force")
        self.changes.append(counts)
        return 7

    async def replace_replica(self, replica_id: str) -> int:
        if self.broken:
            raise StoreUnavailable("down")
        self.changes.append(replica_id)
        return 8

    async def restart_groups(self, names: Sequence[str]) -> int:
        self.changes.append(names)
        return 9

    async def upgrade(self, checkpoint: str, timeout_s: float, drain_timeout_s: float) -> dict[str, Any]:
        if checkpoint == "/too/large":
            raise ChangeRefused("no room: 5 bytes are missing")
        return {"phase": "loading", "asked": [checkpoint, timeout_s, drain_timeout_s]}

    async def abort_upgrade(self) -> dict[str, Any] | None:
        raise ChangeRefused("no upgrade is under way")

    def get_upgrade_view(self) -> dict[str, Any] | None:
        return None

    async def drain(self, timeout_s: float) -> int:
        self.drained_s.append(timeout_s)
        return 3


@pytest.fixture
def controller() -> FakeController:
    return FakeController()


@pytest.fixture
def client(controller: FakeController) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(
        create_admin_app(controller, hash_token(TOKEN), hash_token(VIEWER_TOKEN)), raise_app_exceptions=False
    )
    return httpx.AsyncClient(transport=transport, base_url="http://admin", headers={"Authorization": f"Bearer {TOKEN}"})


def check_error(response: httpx.Response, status: int) -> None:
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def test_status_and_drain(client: httpx.AsyncClient, controller: FakeController):
    assert (await client.get("/status")).json() == {"ready": True}
    assert (await client.post("/drain", json={"timeout_s": 2.5})).json() == {"num_running": 3}
    assert (await client.post("/drain")).json() == {"num_running": 3}
    assert controller.drained_s == [2.5, 0.0]


@pytest.mark.parametrize(
    "headers", [{"Authorization": ""}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}]
)
@pytest.mark.parametrize("path", ["/status", "/drain", "/nowhere"])
async def test_nothing_is_told_without_the_token(client: httpx.AsyncClient, headers: dict[str, str], path: str):
    check_error(await client.get(path, headers=headers), 401)


async def test_no_header_at_all_is_refused(client: httpx.AsyncClient):
    del client.headers["Authorization"]
    check_error(await client.get("/status"), 401)


@pytest.mark.parametrize(
    "body",
    [b"[]", b"{", b'{"timeout_s": "3"}', b'{"timeout_s": NaN}', b'{"timeout_s": -1}', b'{"timeout_s": 1e400}',
     b'{"timeout_s": true}', b"[" * 100_000, b"\xff"],
)  # fmt: skip
async def test_bad_bodies_are_refused(client: httpx.AsyncClient, controller: FakeController, body: bytes):
    check_error(await client.post("/drain", content=body), 400)
    assert controller.drained_s == []


async def test_an_oversized_body_is_refused(client: httpx.AsyncClient):
    check_error(await client.post("/drain", content=b" " * (MAX_BODY_BYTES + 1)), 413)


async def test_unknown_routes_and_bugs_answer_in_the_error_shape(client: httpx.AsyncClient, controller: FakeController):
    check_error(await client.get("/nowhere"), 404)
    check_error(await client.post("/status"), 405)
    controller.broken = True
    response = await client.get("/status")
    check_error(response, 500)
    assert "secret detail" not in response.text


async def test_changes_answer_with_the_version_that_has_them(client: httpx.AsyncClient, controller: FakeController):
    assert (await client.post("/scale", json={"groups": {"g0": 2}})).json() == {"desired_version": 7}
    assert (await client.post("/replicas/drain", json={"replica": "g0-1"})).json() == {"desired_version": 8}
    assert (await client.post("/restart", json={"groups": ["g1"]})).json() == {"desired_version": 9}
    assert (await client.post("/restart")).json() == {"desired_version": 9}
    assert controller.changes == [{"g0": 2}, "g0-1", ["g1"], []]


async def test_plan_and_events_can_be_read(client: httpx.AsyncClient):
    assert (await client.get("/plan")).json() == {"steps": []}
    assert (await client.get("/events?after=41")).json() == {"events": [{"sequence": 42}]}
    for after in ("-1", "x", "9" * 30, "%C2%B2"):
        check_error(await client.get(f"/events?after={after}"), 400)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/scale", {}), ("/scale", {"groups": []}), ("/scale", {"groups": {"g0": "2"}}),
        ("/scale", {"groups": {"g0": True}}), ("/scale", {"groups": {"g0": 1.5}}), ("/scale", {"groups": {"g0": 0}}),
        ("/scale", {"groups": {"g0": 1}, "force": "yes"}), ("/replicas/drain", {}), ("/replicas/drain", {"replica": 3}),
        ("/replicas/drain", {"replica": "x" * 1000}), ("/restart", {"groups": "g0"}), ("/restart", {"groups": [1]}),
    ],
)  # fmt: skip
async def test_bad_changes_are_refused(
    client: httpx.AsyncClient, controller: FakeController, path: str, body: dict[str, Any]
):
    check_error(await client.post(path, json=body), 400)
    assert controller.changes == []


async def test_a_store_that_is_away_is_503(client: httpx.AsyncClient, controller: FakeController):
    controller.broken = True
    check_error(await client.post("/replicas/drain", json={"replica": "g0-1"}), 503)


async def test_a_rebalancing_is_planned_for_the_memory_given(client: httpx.AsyncClient):
    assert (await client.post("/rebalance/plan")).json() == {"extra_share": 0.12}
    assert (await client.post("/rebalance/plan", json={"extra_share": 0.5})).json() == {"extra_share": 0.5}
    for value in (-0.1, 11, "1", None):
        check_error(await client.post("/rebalance/plan", json={"extra_share": value}), 400)


async def test_the_viewer_may_look_and_change_nothing(client: httpx.AsyncClient, controller: FakeController):
    headers = {"Authorization": f"Bearer {VIEWER_TOKEN}"}
    for path in ("/status", "/plan", "/events", "/load"):
        assert (await client.get(path, headers=headers)).is_success
    for path in ("/drain", "/scale", "/restart", "/replicas/drain", "/rebalance/plan"):
        check_error(await client.post(path, headers=headers, json={"groups": {"g0": 2}}), 401)
    assert controller.changes == controller.drained_s == []


async def test_an_upgrade_is_begun_looked_at_and_refused_with_the_reason(client: httpx.AsyncClient):
    body = {"checkpoint": "/models/b", "timeout_s": 5, "drain_timeout_s": 6}
    answer = await client.post("/upgrade", json=body)
    assert answer.json() == {"upgrade": {"phase": "loading", "asked": ["/models/b", 5.0, 6.0]}}
    assert (await client.get("/upgrade")).json() == {"upgrade": None}
    for path, body, reason in (
        ("/upgrade", {"checkpoint": "/too/large"}, "5 bytes are missing"),
        ("/upgrade", {"checkpoint": 3}, "checkpoint must be a text"),
        ("/upgrade", {"checkpoint": "/x", "timeout_s": -1}, "timeout_s must be"),
        ("/upgrade/abort", {}, "no upgrade is under way"),
    ):
        refused = await client.post(path, json=body)
        assert refused.status_code == 400
        assert reason in refused.json()["error"]["message"]
