from typing import Any

from cluster.desired_state import begin
from cluster.planner import (
    ActorState,
    CreateReplica,
    CreateRouter,
    Health,
    HostExperts,
    Memory,
    Observation,
    Plan,
    PushTable,
    compute_plan,
    is_ready,
)
from cluster.records import StartState
from experts.expert_range import ExpertRange
from tests.cluster.fakes import make_replica, make_report, make_router, make_spec

SPEC = make_spec()
DESIRED = begin(SPEC)
EVERYTHING = frozenset({"g0-0", "g1-0", "r0"})


def observe(**changes: Any) -> Observation:
    """Two ready replicas and a router that has not reported yet, unless said otherwise."""
    values: dict[str, Any] = {
        "now_s": 0.0,
        "replicas": {"g0-0": make_replica("g0-0", 1), "g1-0": make_replica("g1-0", 2)},
        "routers": {"r0": make_router()},
        "replica_health": {},
        "router_reports": {},
        "existing_ids": EVERYTHING,
        "node_ids": frozenset({"node a"}),
        "drained": frozenset(),
        "draining": False,
    }
    return Observation(**(values | changes))


def get_table_ids(plan: Plan) -> list[list[str]]:
    return [[replica.replica_id for replica in group.replicas] for group in plan.table.groups]


def test_ready_replicas_are_in_the_table_before_any_health_check():
    plan = compute_plan(SPEC, DESIRED, observe(), Memory())
    assert get_table_ids(plan) == [["g0-0"], ["g1-0"]]
    assert plan.table.version == 1
    assert plan.actions == (PushTable("r0", 1),)


def test_version_rises_only_when_the_content_changes():
    first = compute_plan(SPEC, DESIRED, observe(), Memory())
    same = compute_plan(SPEC, DESIRED, observe(now_s=9.0), first.memory)
    assert same.table is first.table
    restarted = {"g0-0": make_replica("g0-0", 5), "g1-0": make_replica("g1-0", 2)}
    changed = compute_plan(SPEC, DESIRED, observe(replicas=restarted), same.memory)
    assert changed.table.version == 2
    assert changed.table.groups[0].replicas[0].incarnation == 5


def test_nothing_is_pushed_to_a_router_that_has_the_table():
    first = compute_plan(SPEC, DESIRED, observe(), Memory())
    plan = compute_plan(SPEC, DESIRED, observe(router_reports={("r0", 1): make_report(1)}), first.memory)
    assert plan.actions == ()
    assert is_ready(plan, SPEC)


def test_a_restarted_router_gets_the_table_again():
    first = compute_plan(SPEC, DESIRED, observe(), Memory())
    plan = compute_plan(
        SPEC,
        DESIRED,
        observe(routers={"r0": make_router("r0", 2)}, router_reports={("r0", 1): make_report(1)}),
        first.memory,
    )
    assert plan.actions == (PushTable("r0", 2),)
    assert plan.routers["r0"].state is ActorState.STARTING


def test_a_router_that_is_still_loading_gets_the_table_but_one_without_address_does_not():
    loading = make_router("r0", state=StartState.STARTING, message="loading weights")
    assert PushTable("r0", 1) in compute_plan(SPEC, DESIRED, observe(routers={"r0": loading}), Memory()).actions
    unborn = make_router("r0", state=StartState.STARTING, endpoint=None)
    assert compute_plan(SPEC, DESIRED, observe(routers={"r0": unborn}), Memory()).actions == ()


def test_a_later_version_held_by_a_router_is_outbid():
    plan = compute_plan(SPEC, DESIRED, observe(router_reports={("r0", 1): make_report(41)}), Memory())
    assert plan.table.version == 42
    assert PushTable("r0", 1) in plan.actions


def test_a_replica_found_gone_leaves_the_table_and_comes_back_with_a_new_incarnation():
    first = compute_plan(SPEC, DESIRED, observe(), Memory())
    gone = compute_plan(SPEC, DESIRED, observe(replica_health={("g0-0", 1): Health.GONE}), first.memory)
    assert get_table_ids(gone) == [[], ["g1-0"]]
    assert gone.replicas["g0-0"].state is ActorState.DEAD
    replicas = {"g0-0": make_replica("g0-0", 8), "g1-0": make_replica("g1-0", 2)}
    back = compute_plan(
        SPEC, DESIRED, observe(replicas=replicas, replica_health={("g0-0", 1): Health.GONE}), gone.memory
    )
    assert get_table_ids(back) == [["g0-0"], ["g1-0"]]
    assert back.table.version == gone.table.version + 1


def test_a_draining_replica_gets_no_new_frames():
    plan = compute_plan(SPEC, DESIRED, observe(replica_health={("g0-0", 1): Health.NOT_SERVING}), Memory())
    assert plan.replicas["g0-0"].state is ActorState.DRAINING
    assert get_table_ids(plan) == [[], ["g1-0"]]


def test_other_weights_are_refused_even_after_the_first_replica_died():
    spec = make_spec(num_replicas=2)
    replicas = {"g0-0": make_replica("g0-0", 1), "g1-0": make_replica("g1-0", 2), "g1-1": make_replica("g1-1", 3)}
    first = compute_plan(spec, begin(spec), observe(replicas=replicas), Memory())
    replicas["g0-1"] = make_replica("g0-1", 4, weight_digest="something else")
    plan = compute_plan(
        spec, begin(spec), observe(replicas=replicas, replica_health={("g0-0", 1): Health.GONE}), first.memory
    )
    assert get_table_ids(plan) == [[], ["g1-0", "g1-1"]]
    assert plan.replicas["g0-1"].state is ActorState.DEAD
    assert "differ from those of group g0" in plan.replicas["g0-1"].message


def test_a_replica_that_lacks_experts_is_given_them_before_it_serves():
    wrong = make_replica("g0-0", 1, hosted=make_replica("g1-0").hosted)
    plan = compute_plan(SPEC, DESIRED, observe(replicas={"g0-0": wrong}), Memory())
    assert plan.replicas["g0-0"].state is ActorState.STARTING
    assert get_table_ids(plan) == [[], []]
    # Beside what it has: the router has no table yet, and may ask for anything.
    assert HostExperts("g0-0", 1, (ExpertRange(1, 4, 0, 8),)) in plan.actions


def test_states_before_anything_has_started():
    plan = compute_plan(SPEC, DESIRED, observe(replicas={}, routers={}), Memory())
    assert {status.state for status in (*plan.replicas.values(), *plan.routers.values())} == {ActorState.STARTING}
    assert not is_ready(plan, SPEC)


def test_a_failed_start_is_dead_with_its_reason():
    failed = make_replica("g0-0", state=StartState.FAILED, message="no such tensor", endpoint=None)
    plan = compute_plan(SPEC, DESIRED, observe(replicas={"g0-0": failed}), Memory())
    assert plan.replicas["g0-0"].state is ActorState.DEAD
    assert plan.replicas["g0-0"].message == "no such tensor"


def test_router_states_follow_its_own_report():
    for report, expected in (
        (make_report(1), ActorState.READY),
        (make_report(1, ready=False, message="waiting for g1"), ActorState.STARTING),
        (make_report(1, draining=True), ActorState.DRAINING),
        (make_report(1, reachable=False), ActorState.DEAD),
    ):
        plan = compute_plan(SPEC, DESIRED, observe(router_reports={("r0", 1): report}), Memory())
        assert plan.routers["r0"].state is expected


def test_an_actor_that_ray_lost_is_created_after_a_moment_and_only_once():
    existing = frozenset({"g1-0"})
    memory = compute_plan(SPEC, DESIRED, observe(existing_ids=existing), Memory()).memory
    assert not [action for action in _plan_at(1.0, existing, memory).actions if not isinstance(action, PushTable)]
    plan = _plan_at(2.5, existing, memory)
    assert CreateReplica("g0-0", "node a") in plan.actions
    assert CreateRouter("r0") in plan.actions
    again = _plan_at(2.6, existing, plan.memory)
    assert CreateReplica("g0-0", "node a") not in again.actions


def test_an_actor_that_keeps_failing_is_created_later_and_later():
    failed = make_replica("g0-0", state=StartState.FAILED, endpoint=None, num_failed_starts=6)
    replicas = {"g0-0": failed, "g1-0": make_replica("g1-0", 2)}
    existing = EVERYTHING - {"g0-0"}
    memory = compute_plan(SPEC, DESIRED, observe(existing_ids=existing, replicas=replicas), Memory()).memory
    early = compute_plan(SPEC, DESIRED, observe(now_s=10.0, existing_ids=existing, replicas=replicas), memory)
    late = compute_plan(SPEC, DESIRED, observe(now_s=31.0, existing_ids=existing, replicas=replicas), memory)
    assert CreateReplica("g0-0", "node a") not in early.actions
    assert CreateReplica("g0-0", "node a") in late.actions


def test_nothing_is_created_while_ray_does_not_answer_or_the_cluster_drains():
    memory = compute_plan(SPEC, DESIRED, observe(existing_ids=frozenset()), Memory()).memory
    for changes in ({"existing_ids": None}, {"existing_ids": frozenset(), "draining": True}):
        plan = compute_plan(SPEC, DESIRED, observe(now_s=60.0, **changes), memory)
        assert not [action for action in plan.actions if not isinstance(action, PushTable)]


def _plan_at(now_s: float, existing: frozenset[str], memory: Memory) -> Plan:
    return compute_plan(SPEC, DESIRED, observe(now_s=now_s, existing_ids=existing), memory)
