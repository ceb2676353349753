"""The balancer on fakes: rounds, what it says, failure, and the alarm when it stops."""

import asyncio
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from cluster.balancer import LATE_AFTER_S, MEASURE_AFTER_S, STALLED_AFTER_S, Balancer
from cluster.errors import BadRecord, ChangeRefused, StoreUnavailable
from cluster.event_log import EventLog
from cluster.expert_placement import build_matrix
from cluster.hosting import Hosting, Ranges
from cluster.rebalance_view import Proposal
from cluster.rebalancing import Throughput, rebalancing_from_record
from experts.expert_range import ExpertRange
from tests.cluster.fakes import FakeClock

HELD = {"g0": (ExpertRange(1, 2, 0, 4),), "g1": (ExpertRange(1, 2, 4, 8),)}
WANTED = {"g0": (ExpertRange(1, 2, 0, 2), ExpertRange(1, 2, 6, 8)), "g1": (ExpertRange(1, 2, 2, 6),)}


def make_proposal(loaded: int = 4, max_copies: int = 8) -> Proposal:
    balance = {"imbalance": 1.5, "copies": 8}
    view = {"before": balance, "after": balance | {"imbalance": 1.0}, "loaded_copies": loaded, "released_copies": 0}
    return Proposal(view, ("g0", "g1"), (1,), build_matrix(list(WANTED.values()), (1,), 8), (max_copies, max_copies))


class Setting:
    """A balancer, and groups that hold what they are told at once."""

    def __init__(self, interval_s: float | None = None, max_copies: int = 8) -> None:
        self.clock = FakeClock()
        self.events = EventLog(lambda: 0.0)
        self.held: Mapping[str, Ranges] = dict(HELD)
        self.desired: Mapping[str, Ranges] = dict(HELD)
        self.pairs = {"g0": 300.0, "g1": 100.0}
        self.proposal = make_proposal(max_copies=max_copies)
        self.propose: Callable[[], Proposal] = lambda: self.proposal
        self.num_rounds = 0
        self.is_store_down = False
        self.record: bytes | None = None
        self.interval_s = interval_s
        self.balancer = self.make_balancer()

    def make_balancer(self) -> Balancer:
        return Balancer(
            self.events,
            self.clock,
            self._propose,
            self._rehost,
            lambda: Throughput(self.pairs),
            self._keep,
            interval_s=self.interval_s,
            extra_share=0.12,
        )

    async def turn(self, *, is_settled: bool = True, refusal: str | None = None) -> None:
        await self.balancer.turn(Hosting(self.held, self.desired), is_settled=is_settled, refusal=refusal)
        await asyncio.sleep(0)

    @property
    def actions(self) -> list[str]:
        return [event["action"] for event in self.events.get_after(0)]

    async def _propose(self, extra_share: float) -> Proposal:
        return self.propose()

    async def _keep(self, record: bytes) -> None:
        if self.is_store_down:
            raise StoreUnavailable("down")
        self.record = record

    async def _rehost(self, placements: Mapping[str, Ranges], reason: str) -> None:
        if self.is_store_down:
            raise StoreUnavailable("down")
        self.num_rounds += 1
        self.held = self.desired = placements


async def test_the_gain_is_told_as_expected_and_then_as_measured():
    setting = Setting()
    view = await setting.balancer.begin(0.12, "asked")
    assert view["current"]["expected"]["after"]["imbalance"] == 1.0 and view["current"]["measured"] is None
    await setting.turn()
    assert (setting.num_rounds, dict(setting.held)) == (1, WANTED)
    await setting.turn(is_settled=False)
    with pytest.raises(ChangeRefused, match="under way"):
        await setting.balancer.begin(0.12, "asked again")
    await setting.turn()
    setting.pairs = {"g0": 210.0, "g1": 200.0}
    setting.clock.now_s = MEASURE_AFTER_S - 0.1
    await setting.turn()
    assert setting.balancer.get_view()["current"]["phase"] == "measuring"
    setting.clock.now_s = MEASURE_AFTER_S
    await setting.turn()
    current = setting.balancer.get_view()["current"]
    assert current["phase"] == "done"
    assert current["measured"] == {
        "before": {"rows_max_over_mean": 1.5, "pairs_per_s": 400.0},
        "after": {"rows_max_over_mean": pytest.approx(1.0244), "pairs_per_s": 410.0},
    }
    assert setting.actions == ["begin", "moved", "done"]


async def test_little_memory_takes_several_rounds():
    setting = Setting(max_copies=5)
    await setting.balancer.begin(0.12, "asked")
    for _ in range(10):
        await setting.turn()
    assert setting.num_rounds == 2 and np.all([setting.held[name] == WANTED[name] for name in WANTED])


async def test_a_replica_that_cannot_leaves_everything_where_it_was():
    setting = Setting()
    await setting.balancer.begin(0.12, "asked")
    await setting.turn()
    setting.held = HELD
    await setting.turn(is_settled=False, refusal="replica g0-0: no memory")
    assert dict(setting.desired) == HELD
    current = setting.balancer.get_view()["current"]
    assert (current["phase"], current["failure"]) == ("failed", "replica g0-0: no memory")


async def test_a_failure_that_cannot_be_undone_now_is_undone_later():
    setting = Setting()
    await setting.balancer.begin(0.12, "asked")
    await setting.turn()
    setting.held = HELD
    setting.is_store_down = True
    await setting.turn(is_settled=False, refusal="replica g0-0: no memory")
    assert dict(setting.desired) == WANTED
    setting.is_store_down = False
    await setting.turn(is_settled=False)
    assert dict(setting.desired) == HELD
    assert setting.balancer.get_view()["current"]["phase"] == "failed"


@pytest.mark.parametrize("num_turns", range(1, 6))
async def test_a_successor_goes_on_wherever_the_balancer_was(num_turns: int):
    """With memory for one expert more than each group has, so in several rounds."""
    setting = Setting(max_copies=5)
    await setting.balancer.begin(0.12, "asked")
    for _ in range(num_turns):
        await setting.turn()
    former = setting.balancer.get_view()["current"]
    setting.balancer = setting.make_balancer()
    assert setting.record is not None
    setting.balancer.restore(rebalancing_from_record(setting.record, setting.clock.now_s))
    assert setting.balancer.get_view()["current"] == former
    for _ in range(9):
        await setting.turn()
    assert dict(setting.held) == WANTED
    setting.pairs = {"g0": 210.0, "g1": 200.0}
    setting.clock.now_s += MEASURE_AFTER_S
    await setting.turn()
    current = setting.balancer.get_view()["current"]
    assert (current["phase"], current["number"]) == ("done", 1)
    assert current["measured"]["before"]["rows_max_over_mean"] == 1.5
    assert ("continue" in setting.actions) == (former["phase"] == "moving")
    await setting.balancer.begin(0.12, "asked again")
    assert setting.balancer.get_view()["current"]["number"] == 2


async def test_nothing_is_begun_that_a_successor_would_not_know_of():
    setting = Setting()
    setting.is_store_down = True
    with pytest.raises(StoreUnavailable):
        await setting.balancer.begin(0.12, "asked")
    assert setting.balancer.get_view()["current"] is None
    setting.is_store_down = False
    assert (await setting.balancer.begin(0.12, "asked"))["current"]["number"] == 1


@pytest.mark.parametrize("record", [b"{}", b"no json", b'{"group_names": 3}'])
def test_a_broken_record_is_told_from_a_rebalancing(record: bytes):
    with pytest.raises(BadRecord):
        rebalancing_from_record(record, 0.0)


async def test_nothing_to_gain_is_said():
    setting = Setting()
    setting.proposal = make_proposal(loaded=0)
    with pytest.raises(ChangeRefused, match="nothing to move"):
        await setting.balancer.begin(0.12, "asked")


async def test_it_begins_by_itself_once_per_interval():
    setting = Setting(interval_s=60.0)
    await setting.turn()
    assert setting.balancer.get_view()["current"] is None
    setting.clock.now_s = 60.0
    await setting.turn()
    assert setting.balancer.get_view()["current"]["reason"] == "by itself"


async def test_an_alarm_tells_of_a_balancer_that_cannot_look_and_ends_with_it():
    setting = Setting(interval_s=60.0)

    def fail() -> Proposal:
        raise StoreUnavailable("no answer")

    setting.propose = fail
    setting.clock.now_s = 60.0 + LATE_AFTER_S
    await setting.turn()
    assert setting.balancer.get_view()["alarm"] is None
    setting.clock.now_s += 1.0
    await setting.turn()
    assert "has not looked for 121 s" in setting.balancer.get_view()["alarm"]
    setting.propose = lambda: make_proposal(loaded=0)
    await setting.turn()
    await setting.turn()
    assert setting.balancer.get_view()["alarm"] is None
    assert setting.actions == ["alarm", "resume"]


async def test_an_alarm_tells_of_a_rebalancing_that_does_not_get_on():
    setting = Setting()
    await setting.balancer.begin(0.12, "asked")
    setting.clock.now_s = STALLED_AFTER_S + 1.0
    await setting.turn(is_settled=False)
    assert "has not got on" in setting.balancer.get_view()["alarm"]
