"""One group goes up and down while others write to the same RayCluster: only that group ever changes."""

import random
import threading
import time
from typing import Any

from kubernetes.client.exceptions import ApiException

from tests.kubernetes.conftest import Place
from tests.kubernetes.controlled import controlled
from tests.kubernetes.ray_cluster import PlayedOperator, list_event_messages

NUM_CHANGES = 20


class SecondWriter:
    """A thread that edits the other groups, reorders the list and bumps the version; a context manager.

    It writes down what it set, and what it found in the other groups instead.
    """

    def __init__(self, place: Place) -> None:
        self._cluster = place.cluster
        self._random = random.Random(3)
        self._stopped = threading.Event()
        self.num_edits = 0
        self.surprises: list[str] = []
        self._maxima = self._wanted_maxima = {"g1": 5, "g2": 5}
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "SecondWriter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(30)

    def _run(self) -> None:
        while not self._stopped.wait(0.02):
            try:
                self._cluster.edit(self._edit)
                self.num_edits += 1
                self._maxima = self._wanted_maxima
            except ApiException as error:
                self.surprises.append(str(error))

    def _edit(self, document: dict[str, Any]) -> None:
        groups = {group["groupName"]: group for group in document["spec"]["workerGroupSpecs"]}
        self.surprises.extend(find_foreign_changes(groups, self._maxima))
        # In force once it is written: a write that comes too late is made again from what is there then.
        self._wanted_maxima = dict(self._maxima)
        match self._random.randrange(3):
            case 0:
                name = self._random.choice(["g1", "g2"])
                self._wanted_maxima[name] = groups[name]["maxReplicas"] = self._random.randrange(3, 9)
            case 1:
                self._random.shuffle(document["spec"]["workerGroupSpecs"])
            case _:
                document["metadata"].setdefault("annotations", {})["bumped"] = str(self._random.random())


def find_foreign_changes(groups: dict[str, dict[str, Any]], maxima: dict[str, int]) -> list[str]:
    """What is not as the second writer, or the beginning, left it in groups other than g0."""
    expected = {"routers": 5, **maxima}
    return [
        f"{name}: {group['replicas']} of {group['maxReplicas']}, {group.get('scaleStrategy')}"
        for name, group in groups.items()
        if name != "g0"
        and (group["replicas"] != 1 or group["maxReplicas"] != expected[name] or group.get("scaleStrategy"))
    ]


async def test_a_group_goes_up_and_down_twenty_times_beside_another_writer(place: Place):
    with PlayedOperator(place.server.admin, place.namespace) as operator:
        async with controlled(place, operator) as setting:
            with SecondWriter(place) as writer:
                for index in range(NUM_CHANGES):
                    count = 3 if index % 2 == 0 else 1
                    await setting.loop.scale({"g0": count}, force=False)
                    await setting.turn_until(
                        lambda wanted=count: (
                            setting.has_settled()
                            and place.cluster.read_groups()["g0"]["replicas"] == wanted
                            and len(operator.list_names("g0")) == wanted
                        )
                    )
            assert writer.num_edits > NUM_CHANGES
            assert writer.surprises == []
            await setting.turn_until(lambda: not _list_names(place, "g0"))
        # Two pods went with each step down, every one of them named by us.
        assert len(operator.deleted) == NUM_CHANGES
        assert operator.chosen == []


async def test_a_reset_by_the_operator_is_corrected_and_an_event_says_so(place: Place):
    with PlayedOperator(place.server.admin, place.namespace) as operator:
        async with controlled(place, operator) as setting:
            await setting.loop.scale({"g0": 3}, force=False)
            await setting.turn_until(lambda: setting.has_settled() and len(setting.factory.address_of) == 5)

            def reset(document: dict[str, Any]) -> None:
                """All groups at once, as an operator does that applies the RayCluster it was once given."""
                for group in document["spec"]["workerGroupSpecs"]:
                    group["replicas"] = 1

            place.cluster.edit(reset)
            started_s = time.monotonic()
            await setting.turn_until(
                lambda: (
                    setting.has_settled()
                    and place.cluster.read_groups()["g0"]["replicas"] == 3
                    and len(operator.list_names("g0")) == 3
                    and len(setting.factory.address_of) == 5
                )
            )
            # Seen by the watch, not by the look that comes every half minute.
            assert time.monotonic() - started_s < 15
            await setting.turn_until(
                lambda: any(
                    "somebody else had written 1 over 3" in text
                    for text in list_event_messages(place.server.admin, place.namespace)
                )
            )


def _list_names(place: Place, group_name: str) -> list[str]:
    return (place.cluster.read_groups()[group_name].get("scaleStrategy") or {}).get("workersToDelete") or []
