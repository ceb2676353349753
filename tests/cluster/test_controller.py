import asyncio
import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import call_thread
from cluster.autoscaler import AutoscaleRule, ReplicaLoad
from cluster.controller import ControllerLoop
from cluster.desired_state import desired_from_json
from cluster.errors import ChangeRefused, StoreUnavailable
from cluster.planner import Health
from cluster.records import StartState
from cluster.stored_table import memory_from_json
from experts.v1 import experts_pb2
from tests.cluster.fakes import (
    HOSTED,
    FakeClock,
    FakeFactory,
    FakeProber,
    MemoryStore,
    make_replica,
    make_report,
    make_router,
    make_spec,
)
from tests.random_checkpoint import build_config


class Setting:
    """A controller loop on fakes: two ready replicas and a router."""

    def __init__(self, checkpoint: str = "/nowhere") -> None:
        self.checkpoint = checkpoint
        self.store = MemoryStore()
        self.store.publish(make_replica("g0-0", 1), make_replica("g1-0", 2), make_router("r0", 1))
        self.factory = FakeFactory({"g0-0", "g1-0", "r0"}, self.store)
        self.prober = FakeProber()
        self.clock = FakeClock()
        self.loop = self.make_loop()

    def make_loop(self) -> ControllerLoop:
        spec = replace(make_spec(), checkpoint=self.checkpoint)
        return ControllerLoop(spec, self.store, self.factory, self.prober, self.clock, lambda: 1000.0)


async def test_table_is_stored_before_it_is_pushed_and_pushed_once():
    setting = Setting()
    await setting.loop.step()
    assert memory_from_json(setting.store.values[b"table"]).table.version == 1
    assert setting.prober.pushed == [(("r0", 1), 1)]
    await setting.loop.step()
    assert len(setting.prober.pushed) == 1
    assert setting.loop.get_status()["ready"] is True


async def test_probes_follow_the_addresses():
    setting = Setting()
    await setting.loop.step()
    assert setting.prober.targets == (
        {("g0-0", 1): "127.0.0.1:4001", ("g1-0", 2): "127.0.0.1:4002"},
        {("r0", 1): "127.0.0.1:5001"},
    )
    setting.store.publish(make_replica("g0-0", 9))
    await setting.loop.step()
    assert ("g0-0", 9) in setting.prober.targets[0]
    assert ("g0-0", 1) not in setting.prober.targets[0]


async def test_new_address_of_a_restarted_replica_reaches_the_router_in_one_turn():
    setting = Setting()
    await setting.loop.step()
    setting.prober.replica_health[("g0-0", 1)] = Health.GONE
    await setting.loop.step()
    assert setting.loop.get_status()["groups"][0]["replicas"][0]["state"] == "dead"
    setting.store.publish(make_replica("g0-0", 9))
    plan = await setting.loop.step()
    assert plan.table.groups[0].replicas[0].incarnation == 9
    assert setting.prober.pushed[-1] == (("r0", 1), plan.table.version)


async def test_restarted_controller_goes_on_with_the_stored_version():
    setting = Setting()
    await setting.loop.step()
    setting.store.publish(make_replica("g0-0", 9))
    await setting.loop.step()
    successor = setting.make_loop()
    plan = await successor.step()
    assert plan.table.version == 2
    setting.store.publish(make_replica("g0-0", 10, weight_digest="other weights"))
    assert (await successor.step()).table.groups[0].replicas == ()


async def test_table_stays_while_the_store_is_down_and_status_says_so():
    setting = Setting()
    await setting.loop.step()
    setting.store.down = True
    plan = await setting.loop.step()
    assert plan.table.version == 1
    status = setting.loop.get_status()
    assert status["control_plane"] is False
    assert status["ready"] is True
    setting.store.down = False
    setting.clock.now_s = 5.0
    await setting.loop.step()
    assert setting.loop.get_status()["control_plane"] is True


async def test_a_replica_that_dies_while_the_store_is_down_leaves_the_table_and_that_is_stored_later():
    setting = Setting()
    await setting.loop.step()
    setting.store.down = True
    setting.prober.replica_health[("g0-0", 1)] = Health.GONE
    await setting.loop.step()
    assert setting.prober.pushed[-1] == (("r0", 1), 2)
    assert memory_from_json(setting.store.values[b"table"]).table.version == 1
    setting.store.down = False
    await setting.loop.step()
    assert memory_from_json(setting.store.values[b"table"]).table.version == 2


async def test_a_router_restarted_while_the_store_is_down_is_found_afterwards():
    setting = Setting()
    await setting.loop.step()
    setting.store.down = True
    setting.store.publish(make_router("r0", 2))
    await setting.loop.step()
    assert setting.prober.pushed == [(("r0", 1), 1)]
    setting.store.down = False
    await setting.loop.step()
    assert setting.prober.pushed[-1] == (("r0", 2), 1)


async def test_a_call_into_ray_that_hangs_does_not_stop_the_loop(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(call_thread, "CALL_TIMEOUT_S", 0.05)
    setting = Setting()
    released = threading.Event()
    monkeypatch.setattr(setting.factory, "list_existing", lambda: released.wait(10) and frozenset())
    try:
        async with asyncio.timeout(5):
            await setting.loop.step()
            assert setting.loop.get_status()["control_plane"] is False
            setting.clock.now_s = 9.0
            setting.store.publish(make_replica("g0-0", 9))
            plan = await setting.loop.step()
        assert plan.table.groups[0].replicas[0].incarnation == 9
    finally:
        released.set()


async def test_an_actor_that_ray_lost_is_created_again():
    setting = Setting()
    setting.factory.existing.discard("g1-0")
    for now_s in (0.0, 1.5, 3.0, 4.5):
        setting.clock.now_s = now_s
        await setting.loop.step()
    assert setting.factory.created == ["g1-0"]


async def test_unreadable_records_are_ignored():
    setting = Setting()
    setting.store.values[b"replica/g0-0"] = b"not json"
    plan = await setting.loop.step()
    assert plan.table.groups[0].replicas == ()
    assert plan.table.groups[1].replicas != ()


async def test_draining_drains_the_routers_and_creates_nothing():
    setting = Setting()
    await setting.loop.step()
    assert await setting.loop.drain(3.0) == 0
    assert setting.prober.drained_s == [3.0]
    setting.factory.existing.clear()
    for now_s in (10.0, 20.0):
        setting.clock.now_s = now_s
        await setting.loop.step()
    assert setting.factory.created == []
    assert setting.loop.get_status()["draining"] is True


async def test_status_has_the_promised_shape():
    setting = Setting()
    setting.store.publish(make_replica("g1-0", 2, state=StartState.STARTING, endpoint=None, message="loading"))
    await setting.loop.step()
    setting.prober.router_reports[("r0", 1)] = make_report(1, ready=False, message="waits for g1")
    await setting.loop.step()
    status = setting.loop.get_status()
    assert status["model"] == "tiny"
    assert status["table_version"] == 1
    assert [(router["id"], router["state"]) for router in status["routers"]] == [("r0", "starting")]
    assert [group["name"] for group in status["groups"]] == ["g0", "g1"]
    assert status["groups"][1]["experts"] == [[4, 8]]
    assert status["groups"][1]["layers"] == [[1, 4]]
    replica = status["groups"][1]["replicas"][0]
    assert {"id", "pid", "node", "endpoint", "state"} <= replica.keys()
    assert (replica["id"], replica["state"], replica["endpoint"]) == ("g1-0", "starting", None)


async def test_scaling_up_and_down_is_stored_and_carried_out():
    setting = Setting()
    await setting.loop.step()
    version = await setting.loop.scale({"g0": 2}, force=False)
    assert desired_from_json(setting.store.values[b"desired"]).get_group("g0").member_ids == ("g0-0", "g0-1")
    await run_until_settled(setting)
    assert setting.factory.created == ["g0-1"]
    assert setting.loop.get_status()["desired_version"] == version
    await setting.loop.scale({"g0": 1}, force=False)
    await run_until_settled(setting)
    assert (setting.factory.drained, setting.factory.killed) == (["g0-1"], ["g0-1"])
    assert b"replica/g0-1" not in setting.store.values
    assert [replica["id"] for replica in setting.loop.get_status()["groups"][0]["replicas"]] == ["g0-0"]


async def test_a_drained_replica_is_replaced_before_it_leaves():
    setting = Setting()
    await setting.loop.step()
    await setting.loop.replace_replica("g0-0")
    await run_until_settled(setting)
    actions = [(event["object"], event["action"]) for event in setting.loop.get_events(0)]
    create, leave = actions.index(("replica g0-1", "ready")), actions.index(("replica g0-0", "drain"))
    assert create < leave < actions.index(("replica g0-0", "remove"))


async def test_a_rolling_restart_replaces_one_replica_after_another():
    setting = Setting()
    await setting.loop.step()
    await setting.loop.restart_groups([])
    await run_until_settled(setting)
    assert setting.factory.created == ["g0-1", "g1-1"]
    assert setting.factory.killed == ["g0-0", "g1-0"]
    sequence = [event["object"] for event in setting.loop.get_events(0) if event["action"] in ("create", "remove")]
    assert sequence == ["replica g0-1", "replica g0-0", "replica g1-1", "replica g1-0"]


async def test_a_controller_that_is_restarted_in_the_middle_of_a_change_finishes_it():
    setting = Setting()
    await setting.loop.step()
    await setting.loop.scale({"g0": 3}, force=False)
    await setting.loop.restart_groups(["g1"])
    # Stopped after each number of turns in turn, so that it ends somewhere else every time.
    for num_turns in range(1, 6):
        setting.loop = setting.make_loop()
        for _ in range(num_turns):
            setting.clock.now_s += 2.0
            await setting.loop.step()
    await run_until_settled(setting)
    status = setting.loop.get_status()
    assert [len(group["replicas"]) for group in status["groups"]] == [3, 1]
    assert status["groups"][1]["replicas"][0]["id"] == "g1-1"
    events = setting.loop.get_events(0)
    assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
    assert ("controller", "start") in [(event["object"], event["action"]) for event in events]


async def test_nothing_is_changed_while_the_store_is_down():
    setting = Setting()
    await setting.loop.step()
    setting.store.down = True
    await setting.loop.step()
    with pytest.raises(StoreUnavailable):
        await setting.loop.scale({"g0": 2}, force=False)
    setting.store.down = False
    setting.clock.now_s = 5.0
    await setting.loop.step()
    assert setting.factory.created == []
    actions = [(event["object"], event["action"]) for event in setting.loop.get_events(0)]
    assert actions.index(("control plane", "pause")) < actions.index(("control plane", "resume"))


async def test_a_cluster_that_stops_is_not_changed():
    setting = Setting()
    await setting.loop.step()
    await setting.loop.drain(0.0)
    with pytest.raises(ChangeRefused):
        await setting.loop.scale({"g0": 2}, force=False)


async def test_every_restart_of_a_crash_loop_is_an_event_with_its_number():
    setting = Setting()
    await setting.loop.step()
    setting.store.publish(make_replica("g0-0", 9, num_failed_starts=3))
    await setting.loop.step()
    events = [event for event in setting.loop.get_events(0) if event["object"] == "replica g0-0"]
    assert events[-1]["action"] == "start"
    assert "after 3 starts in a row that ended early" in events[-1]["reason"]


async def run_until_settled(setting: Setting) -> None:
    """The clock runs fast enough for every turn to ask Ray again."""
    for _ in range(60):
        setting.clock.now_s += 2.0
        await setting.loop.step()
        # Lets a drain, which is in a thread, end.
        await asyncio.sleep(0.001)
        if setting.loop.get_status()["settled"]:
            return
    raise AssertionError(setting.loop.get_plan_view())


def make_autoscaled(dry_run: bool = False) -> Setting:
    setting = Setting()
    rule = AutoscaleRule(max_replicas=2, grow_after_s=2.0, shrink_after_s=4.0, cooldown_s=0.0)
    spec = replace(make_spec(), autoscale=(("g*", rule),), autoscale_dry_run=dry_run)
    setting.loop = ControllerLoop(spec, setting.store, setting.factory, setting.prober, setting.clock, lambda: 1000.0)
    return setting


async def test_only_the_hot_group_grows_and_shrinks_again_when_the_load_has_gone():
    setting = make_autoscaled()
    setting.prober.loads = {"g0": ReplicaLoad(0.95, 20.0, 100.0), "g1": ReplicaLoad(0.3, 0.1, 100.0)}
    for _ in range(3):
        setting.clock.now_s += 2.0
        await setting.loop.step()
    await run_until_settled(setting)
    assert setting.factory.created == ["g0-1"]
    assert setting.loop.get_status()["groups"][0]["replicas"][1]["load"]["busy_share"] == 0.95
    reasons = [event["reason"] for event in setting.loop.get_events(0) if event["action"] == "change"]
    assert "autoscaled: busy 95% of 60%" in reasons[0]
    setting.prober.loads["g0"] = ReplicaLoad(0.01, 0.0, None)
    for _ in range(5):
        setting.clock.now_s += 2.0
        await setting.loop.step()
    await run_until_settled(setting)
    assert setting.factory.killed == ["g0-1"]


async def test_a_dry_run_says_what_it_would_do_and_does_nothing():
    setting = make_autoscaled(dry_run=True)
    setting.prober.loads = {"g0": ReplicaLoad(0.95, 20.0, 100.0)}
    for _ in range(4):
        setting.clock.now_s += 2.0
        await setting.loop.step()
    assert setting.factory.created == []
    first, second = setting.loop.get_plan_view()["autoscale"]
    assert (first["group"], first["action"], first["replicas"]) == ("g0", "grow", 2)
    assert (second["action"], second["reason"]) == ("keep", "no replica has reported its load")


@pytest.mark.parametrize("is_restarted", [False, True])
async def test_experts_are_moved_by_what_replicas_counted(tmp_path: Path, is_restarted: bool):
    (tmp_path / "config.json").write_text(json.dumps(build_config(n_routed_experts=8, num_hidden_layers=4)))
    setting = Setting(checkpoint=str(tmp_path))
    setting.prober.pairs = [
        experts_pb2.LoadResponse(
            layers=[experts_pb2.LayerPairs(layer_id=layer_id, pairs=[900, 800, 700, 600, 5, 5, 5, 5])]
        )
        for layer_id in (1, 2, 3)
    ]
    await setting.loop.step()
    view = await setting.loop.rebalance(0.5)
    assert view["current"]["expected"]["before"]["imbalance"] > 1.9
    for turn in range(200):
        await setting.loop.step()
        if is_restarted and turn == 1:
            setting.loop = setting.make_loop()
            await setting.loop.step()
            assert setting.loop.get_balancer_view()["current"]["phase"] == "moving"
        await asyncio.sleep(0.001)
        if setting.loop.get_balancer_view()["current"]["phase"] == "measuring":
            break
    hosted = memory_from_json(setting.store.values[b"table"]).table.groups
    assert setting.loop.get_balancer_view()["current"]["phase"] == "measuring"
    assert [group.hosted for group in hosted] != list(HOSTED)
    copies = {group["name"]: group["copies_after"] for group in view["current"]["expected"]["groups"]}
    assert {
        group.name: sum((block.layer_end - block.layer_start) * len(block.expert_ids) for block in group.hosted)
        for group in hosted
    } == copies
    assert setting.loop.get_status()["settled"]
    objects = [event["object"] for event in setting.loop.get_events(0) if event["action"] == "host"]
    assert {"replica g0-0", "replica g1-0"} >= set(objects) != set()


async def test_a_replica_that_cannot_take_experts_fails_the_rebalancing(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(build_config(n_routed_experts=8, num_hidden_layers=4)))
    setting = Setting(checkpoint=str(tmp_path))
    setting.prober.pairs = [
        experts_pb2.LoadResponse(layers=[experts_pb2.LayerPairs(layer_id=1, pairs=[900, 800, 700, 600, 5, 5, 5, 5])])
    ]
    setting.factory.refusal = "NotEnoughMemory: 5 experts"
    await setting.loop.step()
    await setting.loop.rebalance(0.5)
    for _ in range(100):
        await setting.loop.step()
        await asyncio.sleep(0.001)
        if setting.loop.get_balancer_view()["current"]["phase"] == "failed":
            break
    assert "NotEnoughMemory" in setting.loop.get_balancer_view()["current"]["failure"]
    await setting.loop.step()
    assert setting.loop.get_status()["settled"]
