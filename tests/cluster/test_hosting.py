"""Experts that change groups: loaded beside the old ones, published, released, in this order and from any point on."""

from dataclasses import replace
from typing import Any

from cluster.desired_state import begin, rehost
from cluster.planner import ActorState, HostExperts, Memory, Observation, Plan, PushTable, compute_plan
from experts.expert_range import ExpertRange, merge_ranges
from tests.cluster.fakes import HOSTED, make_replica, make_report, make_router, make_spec

SPEC = make_spec()
# Expert 3 moves from g0 to g1, and expert 4 is hosted by both.
TARGET = {"g0": (ExpertRange(1, 4, 0, 3), ExpertRange(1, 4, 4, 5)), "g1": (ExpertRange(1, 4, 3, 8),)}
DESIRED = rehost(begin(SPEC), TARGET)
BOTH = {name: merge_ranges(old, TARGET[name]) for name, old in zip(TARGET, HOSTED, strict=True)}


def observe(g0: Any, g1: Any, table_version: int = 1) -> Observation:
    """What each replica holds."""
    return Observation(
        now_s=0.0,
        replicas={
            name: make_replica(name, number, hosted=hosted, weight_digest=f"{name} {hosted}")
            for name, number, hosted in (("g0-0", 1, g0), ("g1-0", 2, g1))
        },
        routers={"r0": make_router()},
        replica_health={},
        router_reports={("r0", 1): make_report(table_version)},
        existing_ids=frozenset({"g0-0", "g1-0", "r0"}),
        node_ids=frozenset({"node a"}),
        drained=frozenset(),
        draining=False,
    )


def get_hosted(plan: Plan) -> list[tuple[ExpertRange, ...]]:
    return [group.hosted for group in plan.table.groups]


FIRST = compute_plan(SPEC, begin(SPEC), observe(HOSTED[0], HOSTED[1], table_version=0), Memory())


def test_new_experts_are_loaded_beside_the_old_ones_while_the_table_stays():
    plan = compute_plan(SPEC, DESIRED, observe(HOSTED[0], HOSTED[1]), FIRST.memory)
    assert plan.table is FIRST.table
    assert plan.actions == (HostExperts("g0-0", 1, BOTH["g0"]), HostExperts("g1-0", 2, BOTH["g1"]))
    assert not plan.is_settled(DESIRED)
    half = compute_plan(SPEC, DESIRED, observe(BOTH["g0"], HOSTED[1]), plan.memory)
    assert get_hosted(half) == list(HOSTED)
    assert [action for action in half.actions if isinstance(action, HostExperts)] == [
        HostExperts("g1-0", 2, BOTH["g1"])
    ]


def test_the_table_follows_once_all_have_them_and_nothing_is_released_before_routers_know():
    plan = compute_plan(SPEC, DESIRED, observe(BOTH["g0"], BOTH["g1"]), FIRST.memory)
    assert get_hosted(plan) == list(TARGET.values())
    assert plan.table.version == 2
    assert plan.actions == (PushTable("r0", 1),)
    known = compute_plan(SPEC, DESIRED, observe(BOTH["g0"], BOTH["g1"], table_version=2), plan.memory)
    # Group 1 only got an expert.
    assert known.actions == (HostExperts("g0-0", 1, TARGET["g0"]),)
    assert known.table is plan.table
    # Released: the digest changes, and with it the table.
    released = compute_plan(SPEC, DESIRED, observe(TARGET["g0"], TARGET["g1"], table_version=2), known.memory)
    assert released.table.version == 3 and released.actions == (PushTable("r0", 1),)
    done = compute_plan(SPEC, DESIRED, observe(TARGET["g0"], TARGET["g1"], table_version=3), released.memory)
    assert done.table is released.table and done.is_settled(DESIRED)


def test_a_replica_that_starts_again_with_the_old_experts_is_given_the_others_before_it_serves():
    before = compute_plan(SPEC, DESIRED, observe(BOTH["g0"], BOTH["g1"]), FIRST.memory)
    plan = compute_plan(SPEC, DESIRED, observe(HOSTED[0], BOTH["g1"], table_version=2), before.memory)
    assert plan.replicas["g0-0"].state is ActorState.STARTING
    assert HostExperts("g0-0", 1, BOTH["g0"]) in plan.actions


def test_a_controller_that_starts_again_goes_on_and_weights_that_differ_are_still_refused():
    moved = compute_plan(SPEC, DESIRED, observe(TARGET["g0"], TARGET["g1"]), FIRST.memory)
    observation = observe(TARGET["g0"], TARGET["g1"], table_version=moved.table.version)
    other = replace(observation.replicas["g0-0"], weight_digest="something else", incarnation=9)
    observation = replace(observation, replicas={**observation.replicas, "g0-0": other})
    plan = compute_plan(SPEC, DESIRED, observation, Memory(table=moved.memory.table, digests=moved.memory.digests))
    assert plan.replicas["g0-0"].state is ActorState.DEAD
    assert not any(isinstance(action, HostExperts) for action in plan.actions)


def test_a_group_without_a_ready_replica_is_waited_for():
    observation = observe(BOTH["g0"], BOTH["g1"])
    gone = {name: record for name, record in observation.replicas.items() if name != "g1-0"}
    plan = compute_plan(SPEC, DESIRED, replace(observation, replicas=gone), FIRST.memory)
    assert get_hosted(plan) == list(HOSTED)
