"""Dashboard and alert rules: as committed, for metrics that there are, and firing when things break."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import httpx
import pytest

from cluster.autoscaler import ReplicaLoad
from cluster.planner import Health
from cluster.records import StartState
from deploy.dashboards.alert_rules import ALERTS, Alert
from deploy.dashboards.board import ROWS
from deploy.dashboards.generate import FOLDER, build_files
from experts.v1 import experts_pb2
from router.api.router_client import StaticEndpoints
from router.api.settings import ApiSettings
from router.v1 import router_pb2
from tests.cluster.fakes import make_replica
from tests.cluster.test_cluster_metrics import Stage
from tests.local_stack import LocalStack, StackOptions, local_stack
from tests.metrics_text import Scrape
from tests.promql import History, is_firing, list_names
from tests.random_checkpoint import build_config, write_random_checkpoint, write_tokenizer
from tests.router_api.api_server import ApiServer
from tests.router_api.conftest import write_checkpoint
from tests.router_api.scripted_router import ScriptedRouter, answer, fail

MINUTE_S = 60.0
# Of Grafana, as it stands for a range.
RATE_INTERVAL = "$__rate_interval"


def list_firing(history: History, alerts: tuple[Alert, ...] = ALERTS) -> set[str]:
    return {alert.name for alert in alerts if is_firing(alert.expr, alert.for_minutes * MINUTE_S, history)}


def watch(scrape: Callable[[], Scrape], act: Callable[[], object] = lambda: None, minutes: int = 31) -> History:
    """Pages a minute apart by their stamps, of what is there now; act: what users do in each minute. As Prometheus
    would have them if it stayed so."""
    history = History()
    for minute in range(minutes):
        act()
        history.add(minute * MINUTE_S, scrape())
    return history


def test_committed_files_are_what_the_generator_writes():
    for path, text in build_files().items():
        assert path.read_text() == text, f"{path.name} is not up to date: make dashboards"


def test_promtool_accepts_the_rules():
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool on this machine (Debian: apt-get install prometheus)")
    result = subprocess.run(
        [promtool, "check", "rules", str(FOLDER / "alerts.yaml")], capture_output=True, text=True, timeout=30
    )
    assert result.returncode == 0, result.stderr
    assert f"{len(ALERTS)} rules found" in result.stdout


def test_panels_have_places_of_their_own():
    board = json.loads((FOLDER / "dashboard.json").read_text())
    cells: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        cells |= own


@pytest.fixture(scope="module")
def front_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("front") / "tiny")


@pytest.fixture
def scripted() -> Iterator[ScriptedRouter]:
    router = ScriptedRouter()
    router.status = router_pb2.StatusResponse(
        router_id="r0", ready=True, num_blocks=100, num_blocks_held=10, num_drafted=[4], num_accepted=[2],
        groups=[router_pb2.GroupTraffic(name="g0", num_frames=9, latency_counts=[9, *[0] * 18])],
        replicas=[router_pb2.ReplicaTimes(replica_id="g0-0", connected=True)],
        teams=[router_pb2.TeamQueue(fairness_key="red")],
        dispatch=router_pb2.DispatchCounters(errors={"CallTimeout": 1}),
    )  # fmt: skip
    router.script = answer([5, 6, 7])
    yield router
    router.stop()


@contextmanager
def front(folder: Path, router: ScriptedRouter, **settings: float) -> Iterator[httpx.Client]:
    server = ApiServer(
        replace(ApiSettings(folder, router_wait_s=0.2, status_timeout_s=0.3), **settings),
        StaticEndpoints([router.endpoint]),
    )
    server.app.state.context.statuses.max_age_s = 0.0  # pages a minute apart are scraped at once here
    try:
        with httpx.Client(base_url=server.url, timeout=10) as client:
            yield client
    finally:
        server.stop()


def scrape(http: httpx.Client) -> Scrape:
    return Scrape.parse(http.get("/metrics").text)


def complete(http: httpx.Client, max_tokens: int = 3) -> httpx.Response:
    return http.post("/v1/completions", json={"prompt": [5, 6], "max_tokens": max_tokens})


@pytest.fixture
async def stage(tmp_path: Path) -> Stage:
    (tmp_path / "config.json").write_text(json.dumps(build_config()))
    stage = Stage(tmp_path)
    stage.prober.loads = {"g0": ReplicaLoad(0.5, 1.0, 100.0), "g1": ReplicaLoad(0.5, 1.0, 100.0)}
    stage.prober.pairs = [
        experts_pb2.LoadResponse(
            count_window_s=60, layers=[experts_pb2.LayerPairs(layer_id=1, pairs=[5, 4, 3, 5, 5, 4, 4, 5] * 2)]
        )
    ]
    return stage


async def watch_cluster(stage: Stage, minutes: int = 31) -> History:
    history = History()
    for minute in range(minutes):
        await stage.loop.step()
        history.add(minute * MINUTE_S, await stage.scrape())
    return history


async def test_every_metric_of_dashboard_and_alerts_is_really_exported(
    stage: Stage, front_checkpoint: Path, scripted: ScriptedRouter
):
    with front(front_checkpoint, scripted) as http:
        complete(http)
        scripted.script = fail(grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert complete(http).status_code == 429
        exported = set(scrape(http).names)
    stage.store.publish(make_replica("g0-0"))
    await stage.loop.step()
    exported |= (await stage.scrape()).names
    # The routers' processes are known from their Status only, which the fakes do not give.
    exported |= {"shoal_process_cpu_seconds_total", "shoal_process_resident_memory_bytes"}
    expressions = [alert.expr for alert in ALERTS]
    expressions += [
        query.expr.replace(RATE_INTERVAL, "5m") for row in ROWS for panel in row.panels for query in panel.queries
    ]
    wanted = {name for expression in expressions for name in list_names(expression)}
    assert wanted <= exported, wanted - exported


async def test_nothing_fires_while_all_is_well(stage: Stage, front_checkpoint: Path, scripted: ScriptedRouter):
    assert list_firing(await watch_cluster(stage)) == set()
    with front(front_checkpoint, scripted) as http:
        assert list_firing(watch(lambda: scrape(http), lambda: complete(http))) == {"ShoalControllerDown"}


async def test_a_replica_that_dies_and_does_not_come_back(stage: Stage):
    await stage.loop.step()
    stage.prober.replica_health["g1-0", 1] = Health.GONE
    await stage.loop.step()
    firing = list_firing(await watch_cluster(stage))
    assert firing == {"ShoalNotReady", "ShoalGroupWithoutReplica", "ShoalReplicasMissing"}


async def test_a_replica_that_cannot_start(stage: Stage):
    stage.store.publish(
        make_replica("g0-0", state=StartState.FAILED, endpoint=None, num_failed_starts=3, message="no memory")
    )
    assert "ShoalReplicaCrashLoops" in list_firing(await watch_cluster(stage))


async def test_a_dead_ray_head(stage: Stage):
    await stage.loop.step()
    stage.store.down = True
    history = History()
    for minute in range(5):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("cluster.controller.LOOP_INTERVAL_S", 0)
            await stage.loop.step()
        history.add(minute * MINUTE_S, await stage.scrape())
    assert "ShoalControlPlaneDown" in list_firing(history)


async def test_a_group_that_computes_all_the_time_and_one_hot_expert(stage: Stage):
    stage.prober.loads["g0"] = ReplicaLoad(0.97, 30.0, 100.0)
    stage.prober.pairs = [
        experts_pb2.LoadResponse(
            count_window_s=60, layers=[experts_pb2.LayerPairs(layer_id=1, pairs=[99, *[0] * 14, 1])]
        )
    ]
    assert list_firing(await watch_cluster(stage)) == {"ShoalGroupOverloaded", "ShoalExpertLoadSkewed"}


def test_a_router_that_says_nothing(front_checkpoint: Path, scripted: ScriptedRouter):
    with front(front_checkpoint, scripted, status_timeout_s=0.05) as http:
        scripted.answers.clear()
        try:
            firing = list_firing(watch(lambda: scrape(http), minutes=3))
        finally:
            scripted.answers.set()
    assert "ShoalRouterDown" in firing


@pytest.mark.parametrize(
    ("alert", "change"),
    [
        ("ShoalRouterStuck", {"current_step_ms": 61_000}),
        ("ShoalExpertsUnserved", {"unserved_ms": 6_000}),
        ("ShoalQueueLong", {"num_waiting": 101}),
        ("ShoalKvCacheFull", {"num_blocks_held": 99}),
    ],
)
def test_a_router_in_trouble(front_checkpoint: Path, scripted: ScriptedRouter, alert: str, change: dict[str, int]):
    for name, value in change.items():
        setattr(scripted.status, name, value)
    with front(front_checkpoint, scripted) as http:
        assert list_firing(watch(lambda: scrape(http), minutes=12)) == {alert, "ShoalControllerDown"}


def test_frames_that_are_sent_again(front_checkpoint: Path, scripted: ScriptedRouter):
    def work() -> None:
        scripted.status.groups[0].num_frames += 100
        scripted.status.groups[0].num_retries += 3

    with front(front_checkpoint, scripted) as http:
        assert "ShoalFramesRetried" in list_firing(watch(lambda: scrape(http), work, minutes=8))


def test_requests_that_are_turned_away_or_fail(front_checkpoint: Path, scripted: ScriptedRouter):
    scripted.script = fail(grpc.StatusCode.UNAVAILABLE)

    def ask() -> None:
        for _ in range(20):
            assert complete(http).status_code == 503

    with front(front_checkpoint, scripted, router_wait_s=0.01) as http:
        firing = list_firing(watch(lambda: scrape(http), ask, minutes=8))
    assert {"ShoalRequestsFailing", "ShoalRequestsTurnedAway"} <= firing


def test_first_tokens_that_come_late():
    history = History()
    for minute in range(25):
        text = "".join(
            f'shoal_time_to_first_token_seconds_bucket{{le="{bound}"}} {minute * (10 if bound == "+Inf" else 8)}\n'
            for bound in ("10.0", "40.0", "+Inf")
        )
        history.add(minute * MINUTE_S, Scrape.parse("# TYPE shoal_time_to_first_token_seconds histogram\n" + text))
    assert "ShoalFirstTokenSlow" in list_firing(history)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    folder = tmp_path_factory.mktemp("stack")
    write_random_checkpoint(folder / "checkpoint")
    write_tokenizer(folder / "checkpoint")
    with local_stack(folder / "checkpoint", folder / "logs", StackOptions(expert_wait_s=1.0)) as stack:
        yield stack


def test_an_expert_process_that_is_killed_makes_the_real_front_raise_alarm(stack: LocalStack):
    """Real processes: the alarm is there while the group is away, and gone when it is back."""
    history = History()
    with stack.client() as http:

        def look() -> None:
            history.add(len(history.pages) * MINUTE_S, scrape(http))

        look()
        assert complete(http).is_success
        look()
        assert "ShoalExpertsUnserved" not in list_firing(history)
        stack.experts[1].kill()
        for _ in range(4):
            assert complete(http).status_code == 503
            look()
        assert "ShoalRequestsFailing" in list_firing(history)
        deadline_s = time.monotonic() + 30
        while "ShoalExpertsUnserved" not in list_firing(history):
            assert time.monotonic() < deadline_s
            look()
            time.sleep(0.2)
        stack.restart_expert(1)
        while "ShoalExpertsUnserved" in list_firing(history):
            assert time.monotonic() < deadline_s + 60
            look()
            time.sleep(0.2)
        assert complete(http).is_success
        counted = scrape(http)
        assert counted.get("shoal_group_frames_total", group="g1") > 0
        assert counted.get("shoal_group_rpc_seconds_count", group="g0") > 0


def test_a_router_process_that_is_stopped_makes_the_real_front_raise_alarm(stack: LocalStack):
    with stack.client() as http:
        stack.router.send_signal(signal.SIGSTOP)
        try:
            deadline_s = time.monotonic() + 10
            while scrape(http).get("shoal_router_up") == 1:  # the answer of a moment ago
                assert time.monotonic() < deadline_s
            history = watch(lambda: scrape(http), minutes=2)
        finally:
            stack.router.send_signal(signal.SIGCONT)
    assert "ShoalRouterDown" in list_firing(history)
