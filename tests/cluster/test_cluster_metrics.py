"""/metrics of the admin port: a real controller loop on fakes, scraped over ASGI."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from cluster.admin_app import create_admin_app, hash_token
from cluster.autoscaler import ReplicaLoad
from cluster.controller import ControllerLoop
from cluster.planner import Health
from experts.v1 import experts_pb2
from tests.cluster.fakes import (
    FakeClock,
    FakeFactory,
    FakeProber,
    MemoryStore,
    make_replica,
    make_router,
    make_spec,
)
from tests.metrics_text import Scrape
from tests.random_checkpoint import build_config


class Stage:
    """A controller with two groups, and its admin API."""

    def __init__(self, folder: Path) -> None:
        self.store, self.prober, self.clock = MemoryStore(), FakeProber(), FakeClock()
        self.factory = FakeFactory({"r0", "g0-0", "g1-0"})
        spec = replace(make_spec(), checkpoint=str(folder))
        self.loop = ControllerLoop(spec, self.store, self.factory, self.prober, self.clock, lambda: 1000.0)
        self.store.publish(make_router(), make_replica("g0-0"), make_replica("g1-0"))
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(create_admin_app(self.loop, hash_token("t"))),
            base_url="http://admin",
            headers={"Authorization": "Bearer t"},
        )

    async def scrape(self) -> Scrape:
        return Scrape.parse((await self.client.get("/metrics")).text)


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    (tmp_path / "config.json").write_text(json.dumps(build_config()))
    stage = Stage(tmp_path)
    yield stage
    await stage.client.aclose()


async def test_states_loads_and_events_of_a_cluster_that_serves(stage: Stage):
    stage.prober.loads = {"g0": ReplicaLoad(0.75, 4.0, 120.0), "g1": ReplicaLoad(0.25, 0.0, None)}
    for _ in range(3):
        await stage.loop.step()
    found = await stage.scrape()
    assert found.get("shoal_cluster_ready") == 1
    assert found.get("shoal_control_plane_up") == 1
    assert found.get("shoal_group_desired_replicas", group="g0") == 1
    assert found.get("shoal_group_replicas", group="g0", state="ready") == 1
    assert found.get("shoal_group_replicas", group="g0", state="dead") == 0
    assert found.get("shoal_routers", state="ready") == 1
    assert found.get("shoal_replica_busy_share", group="g0", replica="g0-0") == 0.75
    assert found.get("shoal_replica_queue_seconds", replica="g0-0") == pytest.approx(0.004)
    assert found.get("shoal_replica_pairs_per_busy_second", replica="g0-0") == 120
    assert found.get("shoal_events_total", kind="replica", action="ready") == 2
    assert found.get("process_resident_memory_bytes") > 10**6


async def test_a_replica_that_is_gone_is_counted_where_it_is_missing(stage: Stage):
    await stage.loop.step()
    stage.prober.replica_health["g1-0", 1] = Health.GONE
    for _ in range(2):
        await stage.loop.step()
    found = await stage.scrape()
    assert found.get("shoal_group_replicas", group="g1", state="ready") == 0
    assert found.get("shoal_group_desired_replicas", group="g1") == 1
    assert found.get("shoal_cluster_ready") == 0


async def test_the_load_of_experts_is_shown_by_layer_and_group(stage: Stage):
    stage.prober.pairs = [
        experts_pb2.LoadResponse(
            count_window_s=60, layers=[experts_pb2.LayerPairs(layer_id=1, pairs=[30, 10, 0, 0, 40, 0, 0, 0])]
        )
    ]
    await stage.loop.step()
    found = await stage.scrape()
    num_experts = build_config()["n_routed_experts"]
    assert found.get("shoal_expert_load_imbalance", layer="1") == pytest.approx(40 * num_experts / 80)
    assert found.get("shoal_group_load_share", group="g0") == 0.5
    assert found.get("shoal_group_load_share", group="g1") == 0.5
    load = (await stage.client.get("/load")).json()
    assert load["window_s"] == 60
    assert load["layers"][0]["pairs"][4] == 40


async def test_those_who_look_together_ask_the_replicas_once(stage: Stage):
    await stage.loop.step()
    first = await stage.loop.fetch_expert_load()
    assert await stage.loop.fetch_expert_load() is first
    stage.clock.now_s += 3
    assert await stage.loop.fetch_expert_load() is not first
