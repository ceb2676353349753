"""What the controller does about pods that go away or are outdated, on fakes."""

import asyncio
from collections.abc import Mapping, Sequence

from cluster.controller import ControllerLoop
from cluster.event_log import Event
from cluster.fleet import FleetLimits, FleetView, GroupDemand
from tests.cluster.fakes import (
    FakeClock,
    FakeFactory,
    FakeProber,
    MemoryStore,
    make_replica,
    make_report,
    make_router,
    make_spec,
)


class FakeFleet:
    """The view is set by the test; what it was told is remembered."""

    def __init__(self) -> None:
        self.view = FleetView()
        self.demand: Mapping[str, GroupDemand] = {}
        self.routers = GroupDemand(0, frozenset())
        self.renewed: list[str] = []
        self.told: list[Event] = []

    def get_view(self) -> FleetView:
        return self.view

    def get_limits(self) -> FleetLimits | None:
        return FleetLimits({"g0": 4, "g1": 4}, 8)

    def set_demand(self, demand: Mapping[str, GroupDemand], routers: GroupDemand) -> None:
        self.demand = demand
        self.routers = routers

    def renew(self, address: str) -> None:
        self.renewed.append(address)

    def tell(self, events: Sequence[Event]) -> None:
        self.told.extend(events)


class Setting:
    """Two groups with a replica each and two routers, all ready, each on a pod of its own."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.store.publish(
            make_replica("g0-0", 1, node="pod a"),
            make_replica("g1-0", 2, node="pod b"),
            make_router("r0", 3, node="pod c"),
            make_router("r1", 4, node="pod d"),
        )
        self.factory = FakeFactory({"g0-0", "g1-0", "r0", "r1"}, self.store)
        self.prober = FakeProber()
        self.fleet = FakeFleet()
        self.clock = FakeClock()
        self.may_act = True
        self.loop = ControllerLoop(
            make_spec(num_routers=2),
            self.store,
            self.factory,
            self.prober,
            self.clock,
            lambda: 1000.0,
            self.fleet,
            lambda: self.may_act,
        )

    async def turn(self, count: int = 1) -> None:
        for _ in range(count):
            self.clock.now_s += 2.0
            await self.loop.step()
            # Lets a drain end, which is a task of its own.
            await asyncio.sleep(0.001)


async def test_the_demand_counts_every_replica_and_follows_a_change():
    setting = Setting()
    await setting.turn()
    assert setting.fleet.demand == {
        "g0": GroupDemand(1, frozenset({"pod a"})),
        "g1": GroupDemand(1, frozenset({"pod b"})),
    }
    await setting.loop.scale({"g1": 3}, force=False)
    await setting.turn()
    assert setting.fleet.demand["g1"].num_pods == 3


async def test_the_replica_of_a_leaving_pod_is_replaced_once():
    setting = Setting()
    await setting.turn(2)
    setting.fleet.view = FleetView(leaving=frozenset({"pod a"}))
    await setting.turn(8)
    assert setting.factory.created == ["g0-1"]
    assert setting.factory.drained == ["g0-0"]
    assert setting.factory.killed == ["g0-0"]


async def test_a_router_is_drained_and_ended_when_its_pod_leaves_and_made_again():
    setting = Setting()
    await setting.turn(2)
    setting.fleet.view = FleetView(leaving=frozenset({"pod c"}))
    await setting.turn(6)
    assert setting.prober.drained_routers == [("r0", 3)]
    assert setting.factory.killed == ["r0"]
    assert setting.factory.created == ["r0"]


async def test_a_router_waits_until_another_one_serves():
    setting = Setting()
    await setting.turn(2)
    setting.prober.router_reports["r1", 4] = make_report(1, ready=False)
    setting.fleet.view = FleetView(leaving=frozenset({"pod c"}))
    await setting.turn(3)
    assert setting.prober.drained_routers == []
    setting.prober.router_reports["r1", 4] = make_report(1)
    await setting.turn()
    assert setting.prober.drained_routers == [("r0", 3)]


async def test_outdated_pods_are_renewed_replicas_first_one_at_a_time_and_then_routers():
    setting = Setting()
    await setting.turn(2)
    setting.fleet.view = FleetView(outdated=frozenset({"pod a", "pod b", "pod c", "pod d"}))
    await setting.turn(30)
    assert setting.factory.created == ["g0-1", "g1-1"]
    assert setting.factory.killed == ["g0-0", "g1-0"]
    assert set(setting.fleet.renewed) == {"pod c"}
    setting.fleet.view = FleetView(outdated=frozenset({"pod d"}))
    await setting.turn(2)
    assert setting.fleet.renewed[-1] == "pod d"


async def test_what_the_controller_does_is_told_once():
    setting = Setting()
    await setting.loop.step()
    await setting.loop.scale({"g0": 2}, force=False)
    await setting.turn(3)
    told = [(event.object, event.action) for event in setting.fleet.told]
    assert told.count(("group g0", "change")) == 1
    assert told.count(("replica g0-1", "create")) == 1


async def test_without_the_lease_no_turn_begins_but_the_loop_lives():
    setting = Setting()
    setting.may_act = False
    running = asyncio.create_task(setting.loop.run())
    while setting.loop.turned_s is None:
        await asyncio.sleep(0.001)
    assert setting.prober.pushed == []
    setting.may_act = True
    async with asyncio.timeout(10):
        while not setting.prober.pushed:
            await asyncio.sleep(0.01)
    running.cancel()
