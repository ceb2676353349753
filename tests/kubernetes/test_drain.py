"""Pods that go away or are outdated: another replica serves first, and only the right pod ends."""

from typing import Any

from tests.kubernetes.conftest import Place
from tests.kubernetes.controlled import Controlled, controlled
from tests.kubernetes.ray_cluster import PlayedOperator, list_event_messages


def holds_no_replica(settings: list[Controlled], place: Place, operator: PlayedOperator, pod_name: str) -> bool:
    """What the preStop hook waits for: `shoal leave`."""
    addresses = {pod["metadata"]["name"]: pod["status"].get("podIP") for pod in operator.list_pods()}
    return all(addresses.get(pod_name) not in setting.factory.address_of.values() for setting in settings)


def find_pod(operator: PlayedOperator, group_name: str, address: str) -> str:
    return next(
        pod["metadata"]["name"] for pod in operator.list_pods(group_name) if pod["status"].get("podIP") == address
    )


async def test_a_drained_replica_s_pod_is_named_and_no_other_and_the_name_is_cleared(place: Place):
    with PlayedOperator(place.server.admin, place.namespace) as operator:
        async with controlled(place, operator) as setting:
            await setting.loop.scale({"g0": 3}, force=False)
            await setting.turn_until(lambda: setting.has_settled() and len(setting.factory.address_of) == 5)
            # Neither the first nor the last that was made: the operator's own choice would be another.
            victim = find_pod(operator, "g0", setting.factory.address_of["g0-1"])
            await setting.loop.replace_replica("g0-1")
            await setting.turn_until(
                lambda: setting.has_settled() and place.cluster.read_groups()["g0"]["replicas"] == 3
            )
            await setting.turn_until(lambda: operator.deleted == [victim] and len(operator.list_names("g0")) == 3)
            await setting.turn_until(lambda: not place.cluster.read_groups()["g0"]["scaleStrategy"]["workersToDelete"])
            assert operator.chosen == []
            events = setting.list_events()
            assert events.index(("replica g0-3", "ready")) < events.index(("replica g0-1", "drain"))


async def test_a_deleted_pod_stays_until_another_replica_serves(place: Place):
    settings: list[Controlled] = []
    with PlayedOperator(
        place.server.admin,
        place.namespace,
        may_end=lambda name: holds_no_replica(settings, place, operator, name),
    ) as operator:
        async with controlled(place, operator) as setting:
            settings.append(setting)
            victim = find_pod(operator, "g1", setting.factory.address_of["g1-0"])
            operator.delete_pod(victim)
            await setting.turn_until(
                lambda: (
                    setting.has_settled() and victim not in {pod["metadata"]["name"] for pod in operator.list_pods()}
                )
            )
            await setting.turn_until(
                lambda: place.cluster.read_groups()["g1"]["replicas"] == 1 and len(operator.list_names("g1")) == 1
            )
            assert [group.member_ids for group in setting.loop._track.desired.groups] == [
                ("g0-0",),
                ("g1-1",),
                ("g2-0",),
            ]
            events = setting.list_events()
            assert events.index(("replica g1-1", "ready")) < events.index(("replica g1-0", "drain"))
            assert events.index(("replica g1-0", "drain")) < events.index(("replica g1-0", "remove"))
            expected = {f"pod {victim} of g1 is being deleted", "replica g1-0: no longer wanted, and drained"}
            await setting.turn_until(lambda: expected <= set(list_event_messages(place.server.admin, place.namespace)))


async def test_a_new_image_is_rolled_out_group_by_group(place: Place):
    with PlayedOperator(place.server.admin, place.namespace) as operator:
        async with controlled(place, operator) as setting:

            def change_image(document: dict[str, Any]) -> None:
                for group in document["spec"]["workerGroupSpecs"]:
                    group["template"]["spec"]["containers"][0]["image"] = "shoal:2"

            place.cluster.edit(change_image)
            await setting.turn_until(lambda: setting.has_settled() and len(operator.deleted) == 3)
            images = {
                pod["spec"]["containers"][0]["image"]
                for name in ("g0", "g1", "g2")
                for pod in operator.list_pods(name)
                if not pod["metadata"].get("deletionTimestamp")
            }
            assert images == {"shoal:2"}
            assert operator.chosen == []
            events = setting.list_events()
            order = [object_name for object_name, action in events if action == "remove"]
            assert order == ["replica g0-0", "replica g1-0", "replica g2-0"]
            for index in range(3):
                assert events.index((f"replica g{index}-1", "ready")) < events.index((f"replica g{index}-0", "drain"))


async def test_a_new_image_with_other_weights_takes_no_place(place: Place):
    with PlayedOperator(place.server.admin, place.namespace) as operator:
        async with controlled(place, operator) as setting:
            setting.factory.weights["g0"] = "other weights"
            await setting.loop.replace_replica("g0-0")
            await setting.turn_until(lambda: ("replica g0-1", "dead") in setting.list_events())
            for _ in range(5):
                plan = await setting.loop.step()
                assert [replica.replica_id for replica in plan.table.groups[0].replicas] == ["g0-0"]
            assert "refused: its weights" in str(setting.loop.get_status()["groups"][0])


async def test_an_outdated_router_s_pod_is_made_anew_under_the_same_number(place: Place):
    with PlayedOperator(place.server.admin, place.namespace) as operator:
        async with controlled(place, operator) as setting:
            await setting.turn_until(lambda: len(operator.list_names("routers")) == 1)
            pod = operator.list_pods("routers")[0]
            setting.backend.renew(pod["status"]["podIP"])
            await setting.turn_until(
                lambda: operator.deleted == [pod["metadata"]["name"]] and len(operator.list_names("routers")) == 1
            )
            await setting.turn_until(
                lambda: not place.cluster.read_groups()["routers"]["scaleStrategy"]["workersToDelete"]
            )
            assert place.cluster.read_groups()["routers"]["replicas"] == 1
