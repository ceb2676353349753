"""An upgrade to another checkpoint on fakes: the order of its steps, a controller that ends at any of them, and what
leads back."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.controller import ControllerLoop
from cluster.desired_state import begin
from cluster.errors import ChangeRefused, StoreUnavailable
from cluster.fleet import FleetView
from cluster.records import RouterRecord, StartState, router_key
from cluster.router_endpoints import RecordedEndpoints
from cluster.spec import ClusterSpec
from cluster.upgrade_preflight import Room, check_candidate, check_room
from cluster.upgrader import QUIET_S
from experts.check import CheckReport, PartSize
from router.v1 import router_pb2
from tests.cluster.fakes import (
    FakeClock,
    FakeFactory,
    FakeProber,
    MemoryStore,
    make_replica,
    make_router,
    make_spec,
)
from tests.cluster.test_following_pods import FakeFleet
from tests.random_checkpoint import write_random_checkpoint

GB = 10**9


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Two checkpoints of one architecture."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for seed, name in enumerate(("old", "new")):
        write_random_checkpoint(folder / name, seed=seed, n_routed_experts=8, num_hidden_layers=4)
    yield folder / "old", folder / "new"


class Setting:
    """Two groups and a router that serve the old checkpoint."""

    def __init__(self, old: Path) -> None:
        self.spec = replace(make_spec(), checkpoint=str(old))
        self.store = MemoryStore()
        self.store.publish(make_replica("g0-0", 1), make_replica("g1-0", 2), make_router("r0", 1))
        self.store.values[b"spec"] = self.spec.to_json()
        self.factory = FakeFactory({"g0-0", "g1-0", "r0"}, self.store)
        self.factory.changes[2] = {"weight_digest": "of the new checkpoint"}
        self.prober = FakeProber()
        self.clock = FakeClock()
        self.num_running = {"r0": 0}
        self.loop = self.make_loop()

    def make_loop(self, fleet: FakeFleet | None = None, wanted: Path | None = None) -> ControllerLoop:
        return ControllerLoop(
            self.spec,
            self.store,
            self.factory,
            self.prober,
            self.clock,
            lambda: 1000.0 + self.clock.now_s,
            fleet,
            wanted_checkpoint=None if wanted is None else str(wanted),
        )

    async def turn(self, seconds: float = 1.0) -> None:
        self.clock.now_s += seconds
        self.prober.details = {
            target: router_pb2.StatusResponse(num_running=self.num_running.get(target[0], 0))
            for target in self.prober.targets[1]
        }
        await self.loop.step()
        # Whoever asks may ask between any two turns.
        assert self.loop.get_status()["routers"]
        assert self.loop.get_plan_view()["groups"]
        # Lets a drain end, which is a task of its own.
        await asyncio.sleep(0.001)

    async def turn_until(self, phase: str) -> None:
        for _ in range(60):
            await self.turn()
            if (view := self.loop.get_upgrade_view()) is not None and view["phase"] == phase:
                return
        raise AssertionError(f"never {phase}: {self.loop.get_upgrade_view()}, {self.list_steps()}")

    async def settle(self) -> None:
        for _ in range(4):
            await self.turn()

    def get_reason(self) -> str:
        view = self.loop.get_upgrade_view()
        assert view is not None
        return view["reason"]

    def list_steps(self) -> list[str]:
        return [event["action"] for event in self.loop.get_events(0) if event["object"] == "upgrade"]


async def test_groups_come_one_after_the_other_then_routers_then_requests_then_the_old_ones_go(
    folders: tuple[Path, Path],
):
    old, new = folders
    setting = Setting(old)
    await setting.settle()
    view = await setting.loop.upgrade(str(new), 100, 100)
    assert (view["phase"], view["to"]) == ("loading", {"checkpoint": str(new), "weights_version": 2})
    setting.num_running["r0"] = 1
    seen: list[tuple[str, ...]] = []
    for _ in range(20):
        await setting.turn()
        seen.append(tuple(setting.factory.created))
    assert list(dict.fromkeys(seen)) == [(), ("g0-1",), ("g0-1", "g1-1"), ("g0-1", "g1-1", "r1")]
    # The old router has a sequence: it and its replicas stay, and are not sent new requests.
    assert setting.factory.killed == []
    assert setting.list_steps() == ["begin", "load", "load", "route", "switch"]
    status = setting.loop.get_status()
    assert (status["checkpoint"], status["settled"]) == (str(new), False)
    assert [router["id"] for router in status["beside"]["routers"]] == ["r0"]
    endpoints = await RecordedEndpoints(setting.store).get()
    assert [(endpoint.weights_version, endpoint.takes_new) for endpoint in endpoints] == [(1, False), (2, True)]

    setting.num_running["r0"] = 0
    await setting.turn_until("done")
    assert setting.prober.drained_routers == [("r0", 1)]
    assert setting.factory.killed[0] == "r0"
    assert setting.factory.drained == ["g0-0", "g1-0"]
    assert sorted(setting.factory.killed) == ["g0-0", "g1-0", "r0"]
    assert setting.loop.get_status()["settled"] is True
    assert setting.factory.existing == {"g0-1", "g1-1", "r1"}


async def test_no_router_ever_hears_of_a_replica_of_other_weights(folders: tuple[Path, Path]):
    setting = Setting(folders[0])
    await setting.settle()
    tables: list[tuple[str, set[str]]] = []
    push = setting.prober.push_table

    def note(target: tuple[str, int], table: Any) -> None:
        tables.append((target[0], {replica.weight_digest for group in table.groups for replica in group.replicas}))
        push(target, table)

    setting.prober.push_table = note
    await setting.loop.upgrade(str(folders[1]), 100, 100)
    await setting.turn_until("done")
    assert {router_id for router_id, _ in tables} == {"r1"}
    assert all(digests <= {"of the new checkpoint"} for _, digests in tables)
    # A replica of the old weights that comes back late is nobody's.
    setting.store.publish(make_replica("g0-7", 50))
    setting.factory.existing.add("g0-7")
    await setting.turn(5)
    await setting.turn(5)
    assert "g0-7" not in setting.factory.existing


async def test_a_controller_that_is_restarted_at_every_turn_ends_the_upgrade(folders: tuple[Path, Path]):
    setting = Setting(folders[0])
    await setting.settle()
    await setting.loop.upgrade(str(folders[1]), 100, 100)
    # Only what has not been told yet can be lost: quiet time is counted anew by each controller.
    for _ in range(8):
        setting.loop = setting.make_loop()
        await setting.turn()
        await setting.turn()
    assert setting.list_steps()[-1] == "switch"
    await setting.turn_until("done")
    setting.loop = setting.make_loop()
    await setting.settle()
    assert setting.factory.existing == {"g0-1", "g1-1", "r1"}
    status = setting.loop.get_status()
    assert (status["checkpoint"], status["ready"], status["settled"]) == (str(folders[1]), True, True)
    assert set(setting.store.values) >= {b"desired/2", b"table/2"}
    assert not {b"desired", b"table", b"router/r0"} & set(setting.store.values)


async def test_a_controller_whose_store_goes_away_while_it_takes_over_takes_over_all_of_it(
    folders: tuple[Path, Path],
):
    setting = Setting(folders[0])
    setting.factory.changes[2] = {"state": StartState.STARTING}  # for ever
    await setting.settle()
    await setting.loop.upgrade(str(folders[1]), 100, 100)
    await setting.turn()
    status, num_gets = setting.loop.get_status(), 0
    while True:
        setting.loop = setting.make_loop()
        setting.store.gets_left = num_gets
        try:
            await setting.loop.step()
        except StoreUnavailable:
            num_gets += 1
            await setting.loop.step()
        else:
            break
        before, status = status, setting.loop.get_status()
        for now, then in ((status, before), (status["beside"], before["beside"])):
            assert now["checkpoint"] == then["checkpoint"]
            assert now["table_version"] >= then["table_version"] > 0
        assert [event["action"] for event in setting.loop.get_events(0) if event["object"] == "controller"] == [
            "start"
        ] * num_gets
    assert num_gets == 8  # events, upgrade, spec, rebalancing, and two of each weights


async def test_weights_that_do_not_load_leave_everything_as_it_was(folders: tuple[Path, Path]):
    setting = Setting(folders[0])
    setting.factory.changes[2] = {"state": StartState.FAILED, "message": "OSError: gone", "num_failed_starts": 2}
    await setting.settle()
    table_version = setting.loop.get_status()["table_version"]
    await setting.loop.upgrade(str(folders[1]), 100, 100)
    await setting.turn_until("failed")
    assert setting.get_reason() == "replica g0-1 failed to start 3 times: OSError: gone"
    assert setting.list_steps() == ["begin", "load", "undo", "fail"]
    assert setting.factory.existing == {"g0-0", "g1-0", "r0"}
    status = setting.loop.get_status()
    assert (status["checkpoint"], status["table_version"], status["settled"]) == (
        str(folders[0]), table_version, True,
    )  # fmt: skip
    # Another try gets a version of its own.
    setting.factory.changes[3] = {"weight_digest": "of the new checkpoint"}
    view = await setting.loop.upgrade(str(folders[1]), 100, 100)
    assert view["to"]["weights_version"] == 3
    await setting.turn_until("done")


async def test_replicas_of_one_group_that_read_different_weights_end_the_upgrade(folders: tuple[Path, Path]):
    setting = Setting(folders[0])
    await setting.settle()
    await setting.loop.scale({"g0": 2}, force=False)
    await setting.settle()
    digests = iter(["a" * 12, "b" * 12])
    create = FakeFactory.create_replica

    class Mixed(FakeFactory):
        def create_replica(self, replica_id: str, node_id: str | None) -> None:
            self.changes[2] = {"weight_digest": next(digests)}
            create(self, replica_id, node_id)

    setting.factory.__class__ = Mixed
    await setting.loop.upgrade(str(folders[1]), 100, 100)
    await setting.turn_until("failed")
    assert "its weights (bbbbbbbbbbbb) differ from those of group g0 (aaaaaaaaaaaa)" in (setting.get_reason())


@pytest.mark.parametrize("num_turns", [1, 3, 5])
async def test_an_upgrade_can_be_ended_until_requests_go_to_the_new_weights(folders: tuple[Path, Path], num_turns: int):
    setting = Setting(folders[0])
    await setting.settle()
    await setting.loop.upgrade(str(folders[1]), 100, 100)
    for _ in range(num_turns):
        await setting.turn()
    await setting.loop.abort_upgrade()
    await setting.turn_until("failed")
    assert setting.factory.existing == {"g0-0", "g1-0", "r0"}
    assert [endpoint.takes_new for endpoint in await RecordedEndpoints(setting.store).get()] == [True]


async def test_it_cannot_be_ended_afterwards_and_nothing_else_is_changed_meanwhile(folders: tuple[Path, Path]):
    setting = Setting(folders[0])
    await setting.settle()
    setting.num_running["r0"] = 1
    await setting.loop.upgrade(str(folders[1]), 100, 1000)
    with pytest.raises(ChangeRefused, match="is loading: wait"):
        await setting.loop.scale({"g0": 2}, force=False)
    with pytest.raises(ChangeRefused, match="is loading: wait"):
        await setting.loop.upgrade(str(folders[1]), 100, 100)
    await setting.turn_until("finishing")
    with pytest.raises(ChangeRefused, match="cannot be undone any more"):
        await setting.loop.abort_upgrade()


async def test_answers_that_take_longer_than_they_may_are_cut_off(folders: tuple[Path, Path]):
    setting = Setting(folders[0])
    await setting.settle()
    setting.num_running["r0"] = 3
    await setting.loop.upgrade(str(folders[1]), 100, 30)
    await setting.turn_until("finishing")
    for _ in range(5):
        await setting.turn(5)
    assert setting.factory.killed == []
    await setting.turn_until("done")
    (release,) = [event for event in setting.loop.get_events(0) if event["action"] == "release"]
    assert release["reason"] == "r0 are still at work after 30 s: what they run is cut off"


async def test_a_request_on_its_way_to_an_old_router_is_waited_for(folders: tuple[Path, Path]):
    setting = Setting(folders[0])
    await setting.settle()
    await setting.loop.upgrade(str(folders[1]), 100, 100)
    await setting.turn_until("finishing")
    await setting.turn(QUIET_S - 1)
    setting.num_running["r0"] = 1
    await setting.turn(1.0)
    setting.num_running["r0"] = 0
    await setting.turn(1.0)
    await setting.turn(QUIET_S - 1)
    assert "release" not in setting.list_steps()
    await setting.turn(1.5)
    assert "release" in setting.list_steps()


async def test_an_old_replica_that_dies_while_its_answers_are_finished_comes_back_with_the_old_weights(
    folders: tuple[Path, Path],
):
    setting = Setting(folders[0])
    await setting.settle()
    setting.num_running["r0"] = 1
    await setting.loop.upgrade(str(folders[1]), 100, 1000)
    await setting.turn_until("finishing")
    setting.factory.existing.discard("g1-0")
    del setting.store.values[b"replica/g1-0"]
    await setting.turn(3)
    await setting.turn(3)
    assert setting.factory.created[-1] == "g1-0"
    record = json.loads(setting.store.values[b"replica/g1-0"])
    assert (record["weights_version"], record["weight_digest"]) == (1, "digest of g1")


async def test_on_pods_there_are_as_many_again_while_it_lasts(folders: tuple[Path, Path]):
    setting, fleet = Setting(folders[0]), FakeFleet()
    setting.loop = setting.make_loop(fleet)
    await setting.settle()
    setting.num_running["r0"] = 1
    await setting.loop.upgrade(str(folders[1]), 100, 100)
    await setting.turn_until("finishing")
    assert {name: demand.num_pods for name, demand in fleet.demand.items()} == {"g0": 2, "g1": 2}
    assert fleet.routers.num_pods == 2
    # A pod with a replica of the old weights is deleted: it moves, with its weights.
    setting.store.publish(make_replica("g0-0", 1, node="pod a"))
    fleet.view = FleetView(leaving=frozenset({"pod a"}))
    await setting.turn()
    await setting.turn()
    assert json.loads(setting.store.values[b"replica/g0-2"])["weights_version"] == 1
    setting.num_running["r0"] = 0
    await setting.turn_until("done")
    await setting.turn()
    assert {name: demand.num_pods for name, demand in fleet.demand.items()} == {"g0": 1, "g1": 1}
    assert fleet.routers.num_pods == 1


async def test_what_the_settings_name_is_upgraded_to_by_itself_and_outdated_pods_wait(folders: tuple[Path, Path]):
    old, new = folders
    setting, fleet = Setting(old), FakeFleet()
    setting.store.publish(make_replica("g0-0", 1, node="pod a"))
    fleet.view = FleetView(outdated=frozenset({"pod a"}))
    setting.loop = setting.make_loop(fleet, wanted=new)
    with pytest.raises(ChangeRefused, match=f"name {new}: change them"):
        await setting.settle()
        await setting.turn_until("done")
        await setting.loop.upgrade(str(old), 100, 100)
    assert setting.loop.get_status()["checkpoint"] == str(new)
    assert setting.factory.created == ["g0-1", "g1-1", "r1"]


async def test_an_upgrade_that_the_settings_ask_for_and_that_fails_is_not_begun_again(folders: tuple[Path, Path]):
    setting = Setting(folders[0])
    setting.factory.changes[2] = {"state": StartState.FAILED, "message": "OSError: gone", "num_failed_starts": 2}
    setting.loop = setting.make_loop(wanted=folders[1])
    await setting.turn_until("failed")
    setting.loop = setting.make_loop(wanted=folders[1])
    for _ in range(4):
        await setting.turn(40)
    assert setting.list_steps()[-1] == "fail"
    assert (await setting.loop.upgrade(str(folders[1]), 100, 100))["to"]["weights_version"] == 3


async def test_a_refused_wish_of_the_settings_is_told_once_and_tried_again(folders: tuple[Path, Path]):
    setting = Setting(folders[0])
    setting.factory.available_bytes = 10**6
    setting.loop = setting.make_loop(wanted=folders[1])
    for _ in range(4):
        await setting.turn(40)
    assert setting.list_steps() == ["refuse"]
    setting.factory.available_bytes = 10**12
    await setting.turn(40)
    assert setting.list_steps() == ["refuse", "begin"]


def _spoil(folder: Path, file: str, **changes: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: shutil.rmtree(folder), "is not a folder"),
        (lambda folder: _spoil(folder, "tokenizer_config.json", chat_template="x"), "tokenizer_config.json"),
        (lambda folder: _spoil(folder, "generation_config.json", temperature=0.1), "generation_config.json"),
        (lambda folder: _spoil(folder, "config.json", max_position_embeddings=256), "256 positions"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "checkpoint"),
    ],
    ids=["absent", "template", "sampling", "shorter", "index"],
)
def test_what_cannot_take_the_place_of_the_checkpoint_is_refused(
    folders: tuple[Path, Path], tmp_path: Path, spoil: Any, reason: str
):
    candidate = tmp_path / "candidate"
    shutil.copytree(folders[1], candidate)
    spec = replace(make_spec(), checkpoint=str(folders[0]))
    check_candidate(spec, candidate)
    spoil(candidate)
    with pytest.raises(ChangeRefused, match=reason):
        check_candidate(spec, candidate)


def test_the_same_folder_is_no_upgrade(folders: tuple[Path, Path]):
    with pytest.raises(ChangeRefused, match="is what is served already"):
        check_candidate(replace(make_spec(), checkpoint=str(folders[0])), folders[0])


def _check(room: Room, **changes: Any) -> None:
    source: ClusterSpec = replace(make_spec(), dtype="bfloat16", **changes)
    target = replace(source, router_ids=("r1",))
    report = CheckReport(
        "x", trunk=PartSize("trunk", 19 * GB, 19 * GB), groups=[PartSize("g", 20 * GB, 20 * GB) for _ in range(2)]
    )
    check_room(source, target, begin(source), {"g0-0": "a", "g1-0": "b"}, report, room)


def test_memory_that_is_missing_is_named_by_node_and_bytes():
    # The first router goes beside the HTTP front, on the first node.
    _check(Room({"a": 41 * GB, "b": 21 * GB}))
    with pytest.raises(ChangeRefused, match=r"on node b, and 19,000,000,000 are available: 1,\d{3},\d{3},\d{3} bytes"):
        _check(Room({"a": 41 * GB, "b": 19 * GB}))


def test_cards_that_are_missing_are_named_in_bytes():
    _check(Room({}, num_gpus=3.0), gpus_per_actor=1.0)
    with pytest.raises(
        ChangeRefused, match=r"3 GPUs for 59,000,000,000 bytes.*2 GPUs are free: about 19,666,666,666 bytes"
    ):
        _check(Room({}, num_gpus=2.0), gpus_per_actor=1.0)


@pytest.mark.parametrize(
    ("num_pods", "num_router_pods", "reason"),
    [
        ({"g0": 1, "g1": 0}, 1, "group g1 takes 1 more pods.*may have 0 more: 20,000,000,000 bytes"),
        ({"g0": 1, "g1": 1}, 0, "1 more router pods.*may be 0 more: 19,000,000,000 bytes"),
    ],
)
def test_pods_that_are_missing_are_named(num_pods: dict[str, int], num_router_pods: int, reason: str):
    _check(Room({}, num_pods={"g0": 1, "g1": 1}, num_router_pods=1), on_pods=True)
    with pytest.raises(ChangeRefused, match=reason):
        _check(Room({}, num_pods=num_pods, num_router_pods=num_router_pods), on_pods=True)


async def test_nothing_is_started_without_room(folders: tuple[Path, Path]):
    setting = Setting(folders[0])
    setting.factory.available_bytes = 10**6
    await setting.settle()
    with pytest.raises(ChangeRefused, match="bytes are missing"):
        await setting.loop.upgrade(str(folders[1]), 100, 100)
    await setting.settle()
    assert setting.factory.created == []
    assert setting.loop.get_upgrade_view() is None


async def test_fronts_go_to_whom_the_stored_spec_names():
    store = MemoryStore()
    store.publish(make_router("r0", 1), make_router("r1", 2, weights_version=2))
    endpoints = RecordedEndpoints(store)
    assert [endpoint.takes_new for endpoint in await endpoints.get()] == [True, False]
    store.values[b"spec"] = replace(make_spec(), weights_version=2).to_json()
    assert [endpoint.takes_new for endpoint in await endpoints.get()] == [False, True]
    assert RouterRecord.from_json(store.values[router_key("r1")]).weights_version == 2
