"""Replicas that leave: make before break, decided by the pure planner from what is observed."""

from typing import Any

from cluster.desired_state import begin, replace_member, scale
from cluster.planner import (
    ActorState,
    CreateReplica,
    DrainReplica,
    Health,
    Memory,
    Observation,
    Plan,
    RemoveReplica,
    compute_plan,
)
from cluster.records import StartState
from tests.cluster.fakes import make_replica, make_report, make_router, make_spec

SPEC = make_spec()
IDS = ("g0-0", "g1-0")
MOVED = replace_member(begin(SPEC), "g0-0", IDS)


def observe(*replica_ids: str, report: Any = None, **changes: Any) -> Observation:
    """These replicas are ready, and the router has the report."""
    values: dict[str, Any] = {
        "now_s": 0.0,
        "replicas": {replica_id: make_replica(replica_id, 1) for replica_id in replica_ids},
        "routers": {"r0": make_router()},
        "replica_health": {},
        "router_reports": {("r0", 1): report or make_report(1)},
        "existing_ids": frozenset({*replica_ids, "r0"}),
        "node_ids": frozenset(),
        "drained": frozenset(),
        "draining": False,
    }
    return Observation(**(values | changes))


def get_table_ids(plan: Plan) -> list[str]:
    return [replica.replica_id for replica in plan.table.groups[0].replicas]


def begin_with_table() -> Memory:
    return compute_plan(SPEC, begin(SPEC), observe(*IDS, router_reports={}), Memory()).memory


def test_the_successor_is_created_at_once_and_the_old_one_serves_on():
    plan = compute_plan(SPEC, MOVED, observe(*IDS), begin_with_table())
    assert CreateReplica("g0-1") in plan.actions
    assert get_table_ids(plan) == ["g0-0"]
    assert plan.replicas["g0-0"].state is ActorState.DRAINING
    assert plan.replicas["g0-0"].message == "leaves once replica g0-1 serves"
    assert not plan.is_settled(MOVED)


def test_both_serve_until_the_router_is_connected_to_the_successor():
    plan = compute_plan(SPEC, MOVED, observe(*IDS, "g0-1"), begin_with_table())
    assert get_table_ids(plan) == ["g0-1", "g0-0"]
    assert any("not connected" in item.reason for item in plan.waiting)


def test_once_it_is_connected_the_old_one_leaves_the_table_but_is_not_touched():
    report = make_report(2, (*IDS, "g0-1"))
    plan = compute_plan(SPEC, MOVED, observe(*IDS, "g0-1", report=report), begin_with_table())
    assert get_table_ids(plan) == ["g0-1"]
    assert not any(isinstance(action, DrainReplica | RemoveReplica) for action in plan.actions)


def test_it_is_drained_when_every_router_has_the_table_without_it_and_removed_when_drained():
    connected_ids = ("g0-1", "g1-0")
    behind = observe(*IDS, "g0-1", report=make_report(1, connected_ids))
    memory = compute_plan(SPEC, MOVED, behind, begin_with_table()).memory
    unpublished = observe(*IDS, "g0-1", report=make_report(memory.table.version, connected_ids))
    plan = compute_plan(SPEC, MOVED, unpublished, memory)
    assert plan.actions == (DrainReplica("g0-0", 1),)
    drained = observe(
        *IDS,
        "g0-1",
        report=make_report(memory.table.version, connected_ids),
        replica_health={("g0-0", 1): Health.NOT_SERVING},
        drained=frozenset({("g0-0", 1)}),
    )
    assert compute_plan(SPEC, MOVED, drained, memory).actions == (RemoveReplica("g0-0"),)
    gone = observe("g0-1", "g1-0", report=make_report(memory.table.version, connected_ids))
    assert compute_plan(SPEC, MOVED, gone, memory).is_settled(MOVED)


def test_a_router_that_does_not_answer_does_not_hold_it_up_but_one_not_asked_yet_does():
    connected_ids = ("g0-1", "g1-0")
    behind = observe(*IDS, "g0-1", report=make_report(1, connected_ids))
    memory = compute_plan(SPEC, MOVED, behind, begin_with_table()).memory
    for report, is_drained in ((make_report(1, reachable=False), True), (None, False)):
        reports = {("r0", 1): report} if report is not None else {}
        plan = compute_plan(SPEC, MOVED, observe(*IDS, "g0-1", router_reports=reports), memory)
        assert (DrainReplica("g0-0", 1) in plan.actions) is is_drained


def test_it_comes_back_into_the_table_if_the_successor_dies_before_it_was_drained():
    connected_ids = ("g0-1", "g1-0")
    memory = compute_plan(
        SPEC, MOVED, observe(*IDS, "g0-1", report=make_report(2, connected_ids)), begin_with_table()
    ).memory
    plan = compute_plan(
        SPEC,
        MOVED,
        observe(*IDS, "g0-1", report=make_report(2, connected_ids), replica_health={("g0-1", 1): Health.GONE}),
        memory,
    )
    assert get_table_ids(plan) == ["g0-0"]


def test_what_never_served_or_is_gone_is_removed_without_ceremony():
    starting = {"g0-1": make_replica("g0-1", 1, state=StartState.STARTING, endpoint=None)}
    replicas = {**observe(*IDS).replicas, **starting}
    plan = compute_plan(SPEC, begin(SPEC), observe(*IDS, "g0-1", replicas=replicas), begin_with_table())
    assert plan.actions == (RemoveReplica("g0-1"),)
    gone = observe(*IDS, "g0-1", replica_health={("g0-1", 1): Health.GONE})
    assert RemoveReplica("g0-1") in compute_plan(SPEC, begin(SPEC), gone, begin_with_table()).actions


def test_a_record_without_an_actor_and_an_actor_without_a_record_are_removed():
    without_actor = observe(*IDS, "g0-1", existing_ids=frozenset({*IDS, "r0"}))
    assert RemoveReplica("g0-1") in compute_plan(SPEC, begin(SPEC), without_actor, begin_with_table()).actions
    without_record = observe(*IDS, existing_ids=frozenset({*IDS, "r0", "g1-7", "controller"}))
    assert compute_plan(SPEC, begin(SPEC), without_record, begin_with_table()).actions == (RemoveReplica("g1-7"),)


def test_with_ray_away_nothing_ends():
    gone = observe(*IDS, "g0-1", replica_health={("g0-1", 1): Health.GONE}, existing_ids=None)
    plan = compute_plan(SPEC, begin(SPEC), gone, begin_with_table())
    assert not any(isinstance(action, DrainReplica | RemoveReplica) for action in plan.actions)


def test_scaled_to_zero_by_force_nothing_is_waited_for():
    none = scale(begin(SPEC), {"g0": 0}, force=True, taken_ids=IDS, serving_ids=IDS)
    assert get_table_ids(compute_plan(SPEC, none, observe(*IDS), begin_with_table())) == []
