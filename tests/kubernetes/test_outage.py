"""The API server away for a while, stopped or killed: nothing ends, and what was asked for meanwhile is done."""

import asyncio
import os
from collections.abc import Callable

import pytest

from tests.kubernetes.api_server import ApiServer
from tests.kubernetes.conftest import Place
from tests.kubernetes.controlled import controlled
from tests.kubernetes.ray_cluster import PlayedOperator

# FAULTS asks for 20 s; `make chaos` waits that long.
OUTAGE_S = float(os.environ.get("KUBE_OUTAGE_S", "3"))


_NOT_CHAOS = pytest.mark.skipif("KUBE_CHAOS" not in os.environ, reason="its restart takes long: run by make chaos")


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        pytest.param(ApiServer.pause, ApiServer.resume, id="stopped"),
        pytest.param(ApiServer.kill, ApiServer.restart, id="killed", marks=_NOT_CHAOS),
    ],
)
async def test_what_was_asked_for_while_the_api_server_was_away_is_done_afterwards(
    place: Place, begin: Callable[[ApiServer], None], end: Callable[[ApiServer], None]
):
    with PlayedOperator(place.server.admin, place.namespace) as operator:
        async with controlled(place, operator) as setting:
            begin(place.server)
            try:
                await setting.loop.scale({"g2": 2}, force=False)
                loop = asyncio.get_running_loop()
                back_s = loop.time() + OUTAGE_S
                # The controller's turns go on, and routers have the table they had.
                while loop.time() < back_s:
                    plan = await setting.loop.step()
                    assert len(plan.table.groups[2].replicas) == 1
                    await asyncio.sleep(0.1)
            finally:
                await asyncio.to_thread(end, place.server)
            await setting.turn_until(lambda: setting.has_settled() and len(operator.list_names("g2")) == 2)
            assert place.cluster.read_groups()["g2"]["replicas"] == 2
