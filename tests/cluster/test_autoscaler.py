import pytest

from cluster.autoscaler import AutoscaleRule, Decision, GroupLoad, GroupMemory, decide, decide_all

RULE = AutoscaleRule(min_replicas=1, max_replicas=4, target_busy_share=0.6, target_queue_ms=5.0)


def run(loads: list[GroupLoad], count: int = 1, rule: AutoscaleRule = RULE, memory: GroupMemory | None = None):
    """One decision per second; the first change ends it."""
    memory = memory or GroupMemory()
    decision: Decision | None = None
    for now_s, load in enumerate(loads):
        decision = decide("g0", rule, count, True, load, memory, float(now_s))
        if decision.action != "keep":
            return decision, now_s
        memory = decision.memory
    assert decision is not None
    return decision, len(loads)


def test_a_step_of_load_grows_the_group_by_what_it_needs_after_a_few_seconds():
    decision, seconds = run([GroupLoad(1, 0.95, 20.0)] * 10)
    assert (decision.action, decision.num_replicas) == ("grow", 2)
    assert seconds == RULE.grow_after_s
    decision, _ = run([GroupLoad(2, 0.95, 20.0)] * 10, count=2)
    assert decision.num_replicas == 4


def test_queue_delay_alone_grows_it_by_one():
    decision, _ = run([GroupLoad(1, 0.3, 8.0)] * 10)
    assert (decision.action, decision.num_replicas) == ("grow", 2)


def test_a_short_burst_changes_nothing():
    burst, calm = GroupLoad(1, 0.95, 20.0), GroupLoad(1, 0.4, 1.0)
    decision, seconds = run([burst, burst, calm] * 10)
    assert decision.action == "keep"
    assert seconds == 30


def test_it_shrinks_one_by_one_and_late():
    decision, seconds = run([GroupLoad(3, 0.05, 0.1)] * 60, count=3)
    assert (decision.action, decision.num_replicas) == ("shrink", 2)
    assert seconds == RULE.shrink_after_s


def test_a_load_that_one_fewer_could_only_just_carry_is_no_reason_to_shrink():
    # Two replicas at 25 % would be one at 50 %: below the target, but above what hysteresis asks for.
    decision, _ = run([GroupLoad(2, 0.25, 0.1)] * 100, count=2)
    assert decision.action == "keep"


def test_it_never_swings_under_a_steady_load():
    """Grown for a load, a group must not shrink under the same load."""
    for percent in range(1, 400):
        count, memory, changes = 1, GroupMemory(), []
        for second in range(400):
            share = min(1.0, percent / 100 / count)
            decision = decide("g0", RULE, count, True, GroupLoad(count, share, 0.0), memory, float(second))
            if decision.action != "keep":
                changes.append(decision.action)
            count, memory = decision.num_replicas, decision.memory
        assert set(changes) <= {"grow"}, percent


def test_bounds_hold_whatever_the_load():
    assert run([GroupLoad(4, 1.0, 100.0)] * 60, count=4)[0].action == "keep"
    assert run([GroupLoad(1, 0.0, 0.0)] * 60)[0].action == "keep"
    assert run([GroupLoad(1, 0.3, 0.0)], count=1, rule=AutoscaleRule(min_replicas=2))[0].num_replicas == 2
    assert run([GroupLoad(9, 1.0, 99.0)], count=9)[0].num_replicas == 4


def test_nothing_changes_during_the_cool_down_or_while_a_change_is_under_way():
    memory = GroupMemory(busy_since_s=0.0, changed_s=8.0)
    assert decide("g0", RULE, 1, True, GroupLoad(1, 1.0, 9.0), memory, 12.0).action == "keep"
    assert decide("g0", RULE, 1, True, GroupLoad(1, 1.0, 9.0), memory, 18.0).action == "grow"
    decision = decide("g0", RULE, 2, False, GroupLoad(1, 1.0, 9.0), memory, 30.0)
    assert decision.action == "keep"
    assert decision.memory.busy_since_s is None


@pytest.mark.parametrize("load", [None, GroupLoad(0, 0.0, 0.0)])
def test_without_figures_nothing_changes(load: GroupLoad | None):
    assert decide("g0", RULE, 2, True, load, GroupMemory(idle_since_s=0.0), 900.0).action == "keep"


def test_only_the_hot_group_grows():
    loads = {"g0": GroupLoad(1, 0.9, 9.0), "g1": GroupLoad(1, 0.3, 0.5), "g2": GroupLoad(1, 1.0, 99.0)}
    counts = dict.fromkeys(loads, 1)
    settled = dict.fromkeys(loads, True)
    memories: dict[str, GroupMemory] = {}
    rules = {"g0": RULE, "g1": RULE, "gone": RULE}
    decisions: list[Decision] = []
    for second in range(4):
        decisions = decide_all(rules, counts, settled, loads, memories, float(second))
        memories = {decision.group_name: decision.memory for decision in decisions}
    assert [(d.group_name, d.action) for d in decisions] == [("g0", "grow"), ("g1", "keep")]
    assert "busy 90% of 60%" in decisions[0].reason
