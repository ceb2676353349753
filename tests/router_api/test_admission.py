"""Keys at the door: every route closed by default, limits in headers, whose request it is in what routers get."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.routing import Route

from router.api.admission import PUBLIC_PATHS, PUBLIC_PREFIX
from router.api.router_client import StaticEndpoints
from router.api.settings import ApiSettings
from router.tenancy.key_file import Limits, TeamEntry, make_key, new_key_file, save_key_file, set_team
from tests.router_api.api_server import ApiServer
from tests.router_api.conftest import MODEL
from tests.router_api.scripted_router import ScriptedRouter, answer

NOW = datetime.now(UTC)
BODY = {"model": MODEL, "prompt": "hello", "max_tokens": 4}


class Keyed:
    """The app with keys: of one that may do everything, and of restricted ones."""

    def __init__(self, settings: ApiSettings, router: ScriptedRouter, path: Path) -> None:
        file = set_team(new_key_file(), "red", TeamEntry(weight=2.5))
        file, free = make_key(file, "red", NOW)
        file, limited = make_key(file, "blue", NOW, limits=Limits(requests_per_minute=2, tokens_per_minute=1000))
        file, small = make_key(file, "grey", NOW, limits=Limits(tokens_per_minute=10))
        file, other_model = make_key(file, "blue", NOW, models=("another",))
        file, batch = make_key(file, "green", NOW, priorities=("batch",))
        file, expired = make_key(file, "green", NOW, expires_at=NOW - timedelta(seconds=1))
        save_key_file(path, file)
        self.free, self.limited, self.small = free.text, limited.text, small.text
        self.other_model, self.batch, self.expired = other_model.text, batch.text, expired.text
        self.server = ApiServer(replace(settings, keys_file=path), StaticEndpoints([router.endpoint]))
        self.http = httpx.Client(base_url=self.server.url, timeout=10.0)

    def post(
        self, key: str | None, body: dict[str, Any] | None = None, headers: dict[str, str] | None = None
    ) -> httpx.Response:
        given = {"authorization": f"Bearer {key}"} if key is not None else {}
        return self.http.post("/v1/completions", json=body or BODY, headers={**given, **(headers or {})})


@pytest.fixture(scope="module")
def keyed(
    settings: ApiSettings, shared_router: ScriptedRouter, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Keyed]:
    keyed = Keyed(settings, shared_router, tmp_path_factory.mktemp("keys") / "keys.json")
    yield keyed
    keyed.http.close()
    keyed.server.stop()


def test_every_route_of_the_app_wants_a_key_but_health_and_version(keyed: Keyed) -> None:
    included = [getattr(route, "original_router", None) for route in keyed.server.app.routes]
    flat = [route for router in included if router is not None for route in router.routes]
    routes = {
        (method, route.path.replace("{name:path}", MODEL))
        for route in (*keyed.server.app.routes, *flat)
        if isinstance(route, Route)
        for method in route.methods or {"GET"}
    }
    assert ("POST", "/v1/completions") in routes
    for method, path in routes | {("GET", "/nothing"), ("DELETE", "/v1/models"), ("GET", "/metrics"), ("GET", "/")}:
        status = keyed.http.request(method, path).status_code
        is_public = path in PUBLIC_PATHS or path.startswith(PUBLIC_PREFIX)
        assert (status != 401) == is_public, (method, path, status)


@pytest.mark.parametrize(
    "path", ["//health", "/health/", "/Health", "/health/../v1/models", "/health%2f..%2fv1/models", "/version/x"]
)
def test_what_only_looks_like_a_public_path_wants_a_key(keyed: Keyed, path: str) -> None:
    request = httpx.Request("GET", keyed.server.url + "/")
    request.url = httpx.URL(keyed.server.url).copy_with(raw_path=path.encode())
    assert keyed.http.send(request).status_code == 401


@pytest.mark.parametrize("key", [None, "sk-shoal-wrong", "x" * 8000, "é"])
def test_what_is_no_key_gets_one_and_the_same_answer(keyed: Keyed, router: ScriptedRouter, key: str | None) -> None:
    headers = {} if key is None else {b"authorization": f"Bearer {key}".encode()}
    response = keyed.http.post("/v1/completions", json=BODY, headers=headers)
    expected = keyed.post(keyed.expired)
    assert response.status_code == 401 and response.json() == expected.json()
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert router.requests == []


def test_a_key_opens_also_as_anthropics_clients_send_it(keyed: Keyed, router: ScriptedRouter) -> None:
    router.script = answer([5, 6])
    assert keyed.post(keyed.free).status_code == 200
    assert keyed.post(None, headers={"x-api-key": keyed.free}).status_code == 200
    with openai.OpenAI(base_url=f"{keyed.server.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_routers_are_told_whose_request_it_is(keyed: Keyed, router: ScriptedRouter) -> None:
    keyed.post(keyed.free)
    keyed.post(keyed.batch)
    keyed.post(keyed.free, headers={"x-shoal-priority": "interactive"})
    red, green, urgent = router.requests
    assert (red.fairness_key, red.fairness_weight, red.priority) == ("red", 2.5, 0)
    assert (green.fairness_key, green.fairness_weight, green.priority) == ("green", 1.0, 1)
    assert urgent.priority == -1
    assert red.cache_salt == urgent.cache_salt != green.cache_salt and red.cache_salt


def test_a_request_s_own_salt_comes_on_top_of_its_team_s(keyed: Keyed, router: ScriptedRouter) -> None:
    for key, salt in ((keyed.free, None), (keyed.free, "a"), (keyed.free, "b"), (keyed.batch, "a")):
        keyed.post(key, {**BODY, "cache_salt": salt})
    plain, first, second, other = (request.cache_salt for request in router.requests)
    assert (first, second) == (plain + "a", plain + "b")
    assert other.endswith("a") and other != first


def test_a_key_may_do_only_what_it_is_allowed(keyed: Keyed, router: ScriptedRouter) -> None:
    wrong_model = keyed.post(keyed.other_model)
    assert (wrong_model.status_code, wrong_model.json()["error"]["code"]) == (403, "model_not_allowed")
    unnamed = keyed.post(keyed.other_model, {"prompt": "hello"})
    assert unnamed.status_code == 403
    assert keyed.http.get("/v1/models", headers={"x-api-key": keyed.other_model}).json()["data"] == []
    urgent = keyed.post(keyed.batch, headers={"x-shoal-priority": "interactive"})
    assert (urgent.status_code, urgent.json()["error"]["type"]) == (403, "permission_error")
    unknown = keyed.post(keyed.free, headers={"x-shoal-priority": "now"})
    assert unknown.status_code == 400
    assert router.requests == []


def test_the_body_may_say_its_priority_as_vllms_clients_do(keyed: Keyed, router: ScriptedRouter) -> None:
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "priority": 7}
    headers = {"authorization": f"Bearer {keyed.free}", "x-shoal-priority": "interactive"}
    assert keyed.http.post("/v1/chat/completions", json=chat, headers=headers).status_code == 200
    for number in (-5, 0):
        assert keyed.post(keyed.free, {**BODY, "priority": number}).status_code == 200
    assert keyed.post(keyed.batch, {**BODY, "priority": 1}).status_code == 200
    assert [request.priority for request in router.requests] == [1, -1, 0, 1]
    refused = keyed.post(keyed.batch, {**BODY, "priority": 0})
    assert (refused.status_code, refused.json()["error"]["param"]) == (403, "priority")
    for wrong in ("1", 1.0, True, 2**40):
        assert keyed.post(keyed.free, {**BODY, "priority": wrong}).json()["error"]["param"] == "priority"
    assert len(router.requests) == 4


def test_limits_are_told_in_headers_and_what_exceeds_them_is_told_when_to_come_back(
    keyed: Keyed, router: ScriptedRouter
) -> None:
    router.script = answer([5, 6, 7, 8])
    first = keyed.post(keyed.limited)
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-limit-tokens"] == "1000"
    assert keyed.post(keyed.limited).headers["x-ratelimit-remaining-requests"] == "0"
    refused = keyed.post(keyed.limited)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 25 <= int(refused.headers["retry-after"]) <= 30
    assert refused.headers["x-ratelimit-remaining-requests"] == "0" and refused.headers["x-request-id"]
    assert len(router.requests) == 2
    assert "x-ratelimit-limit-requests" not in keyed.post(keyed.free).headers


def test_prompt_and_answer_count_against_tokens_per_minute(keyed: Keyed, router: ScriptedRouter) -> None:
    router.script = answer([5, 6, 7, 8])
    body = {"model": MODEL, "prompt": [3, 4, 5], "max_tokens": 4, "n": 2, "stream": True}
    assert keyed.post(keyed.small, body).status_code == 200  # 3 tokens in, once, and 8 out
    refused = keyed.post(keyed.small, body)
    assert refused.status_code == 429 and "10 tokens per minute" in refused.json()["error"]["message"]


def test_without_keys_everybody_is_served(http: httpx.Client, router: ScriptedRouter) -> None:
    response = http.post("/v1/completions", json=BODY, headers={"authorization": "Bearer anything"})
    assert response.status_code == 200 and "x-ratelimit-limit-requests" not in response.headers
    assert router.requests[0].fairness_key == "anonymous" and router.requests[0].cache_salt == ""
