"""`shoal top` against a real front with a scripted router and cluster."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.top_view import render_top
from router.api.router_client import StaticEndpoints
from router.api.settings import ApiSettings
from router.v1 import router_pb2
from tests.router_api.api_server import ApiServer
from tests.router_api.conftest import write_checkpoint
from tests.router_api.scripted_router import ScriptedRouter
from tests.router_api.test_ui import ScriptedCluster


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    router = ScriptedRouter()
    router.status = router_pb2.StatusResponse(
        router_id="r0", ready=True, num_running=5, num_waiting=3, num_blocks=10, num_blocks_held=4, num_drafted=[10],
        num_accepted=[8], teams=[router_pb2.TeamQueue(fairness_key="search", num_running=4, num_waiting=1)],
    )  # fmt: skip
    folder = write_checkpoint(tmp_path_factory.mktemp("top") / "tiny")
    server = ApiServer(ApiSettings(folder), StaticEndpoints([router.endpoint]), ScriptedCluster())
    yield server.url
    server.stop()
    router.stop()


def top(url: str, state_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", "top", "--url", url, *arguments],
        env={"SHOAL_STATE_DIR": str(state_dir), "COLUMNS": "140", "PATH": "", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_one_look_shows_replicas_queues_experts_and_events(url: str, tmp_path: Path):
    result = top(url, tmp_path, "--once")
    assert result.returncode == 0, result.stderr
    for expected in ("tiny", "ready", "5 running", "g0-0", "92%", "■ dead", "its process ended", "search", "40%", "80%",
                     "expert load by layer", "replica g3-0 dead"):  # fmt: skip
        assert expected in result.stdout


def test_json_is_the_state_of_the_page(url: str, tmp_path: Path):
    result = top(url, tmp_path, "--json")
    assert [group["name"] for group in json.loads(result.stdout)["groups"]] == ["g0", "g1", "g2", "g3"]


def test_a_front_that_does_not_answer_is_one_line(tmp_path: Path):
    result = top("http://127.0.0.1:9", tmp_path, "--once")
    assert result.returncode == 1
    assert result.stderr.startswith("error: http://127.0.0.1:9")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("width", [60, 200])
def test_many_layers_and_experts_fit_a_terminal(width: int):
    page: dict[str, Any] = {
        "model": "m", "state": "ready", "control_plane": True, "routers": [], "groups": [], "teams": [],
        "activity": {"tokens_per_s": [0] * 299 + [9], "ttft_ms": {"p50": None}, "tpot_ms": {"p50": None}},
    }  # fmt: skip
    layers = [{"layer": layer, "pairs": list(range(256))} for layer in range(3, 61)]
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(render_top(page, [], {"layers": layers}, width=width))
    lines = console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
    assert max(map(len, lines)) <= width
    assert len(lines) < 30
