from dataclasses import replace

import pytest

from cluster.fleet import GroupDemand
from cluster.pod_plan import GroupChange, plan_change, plan_renewal, share_out
from cluster.worker_groups import Pod, Template, WorkerGroup

TEMPLATE = Template("shoal:1", "")
GROUP = WorkerGroup("g0", 2, 0, 4, 1, (), frozenset(), TEMPLATE)
A, B, C = (Pod(name, "g0", f"10.0.0.{name}", False, False, TEMPLATE) for name in "123")


def plan(group: WorkerGroup, pods: list[Pod], num_pods: int, *occupied: Pod) -> GroupChange | None:
    return plan_change(group, pods, GroupDemand(num_pods, frozenset(pod.address for pod in occupied)))


def test_nothing_changes_when_the_number_is_right():
    assert plan(GROUP, [A, B], 2, A, B) is None
    assert plan(GROUP, [], 2) is None


def test_more_replicas_raise_the_number_and_name_nobody():
    change = plan(GROUP, [A, B], 3, A, B)
    assert change is not None
    assert (change.replicas, change.workers_to_delete, change.action) == (3, (), "ScaledUp")


@pytest.mark.parametrize("drained", [A, B])
def test_fewer_replicas_name_the_pod_that_was_left(drained: Pod):
    stays = B if drained is A else A
    change = plan(GROUP, [A, B], 1, stays)
    assert change is not None
    assert (change.replicas, change.workers_to_delete) == (1, (drained.name,))
    assert drained.name in change.reason


def test_a_pod_with_a_replica_is_never_named_even_if_the_number_is_too_high():
    change = plan(GROUP, [A, B], 1, A, B)
    assert change is not None
    assert change.workers_to_delete == ()


def test_names_are_kept_until_the_pods_are_gone_and_then_cleared():
    group = replace(GROUP, replicas=1, workers_to_delete=(B.name,))
    assert plan(group, [A, B], 1, A) is None
    change = plan(group, [A], 1, A)
    assert change is not None
    assert (change.replicas, change.workers_to_delete, change.action) == (1, (), "NamesCleared")


def test_a_new_shrink_keeps_the_names_of_the_one_before():
    group = replace(GROUP, replicas=2, workers_to_delete=(C.name,))
    change = plan(group, [A, B, C], 1, A)
    assert change is not None
    assert set(change.workers_to_delete) == {B.name, C.name}


def test_a_pod_that_was_left_goes_before_one_that_is_still_being_made():
    new = replace(B, address="")
    change = plan(GROUP, [new, A], 1)
    assert change is not None
    assert change.workers_to_delete == (A.name,)


def test_an_operator_that_makes_up_for_a_leaving_pod_is_left_no_choice():
    """A leaves by itself; whether the operator counts it or not, nobody but empty pods may go."""
    leaving = replace(A, is_leaving=True)
    change = plan(GROUP, [leaving, B], 1, B)
    assert change is not None
    assert (change.replicas, change.workers_to_delete) == (1, (A.name,))
    change = plan(GROUP, [leaving, B, C], 1, B)
    assert change is not None
    assert (change.replicas, set(change.workers_to_delete)) == (1, {A.name, C.name})


def test_the_group_s_own_bounds_hold_and_are_said():
    change = plan(GROUP, [A, B], 7, A, B)
    assert change is not None
    assert change.replicas == 4
    assert "bounds 0 to 4" in change.reason
    change = plan(replace(GROUP, min_replicas=1), [A, B], 0)
    assert change is not None
    assert (change.replicas, len(change.workers_to_delete)) == (1, 1)


@pytest.mark.parametrize("bounds", [(0, -1), (3, 2), (-1, 2)])
def test_a_group_with_bounds_that_are_no_range_is_left_alone(bounds: tuple[int, int]):
    assert plan(replace(GROUP, min_replicas=bounds[0], max_replicas=bounds[1]), [A], 1, A) is None


def test_a_pod_is_renewed_by_name_without_lowering_the_number_and_the_name_is_cleared():
    change = plan_renewal(GROUP, [A, B], {B.address})
    assert change is not None
    assert (change.replicas, change.workers_to_delete, change.action) == (2, (B.name,), "PodsRenewed")
    named = replace(GROUP, workers_to_delete=(B.name,))
    assert plan_renewal(named, [A, replace(B, is_leaving=True)], {B.address}) is None
    change = plan_renewal(named, [A, C], {B.address})
    assert change is not None
    assert (change.replicas, change.workers_to_delete) == (2, ())


def test_an_address_that_no_pod_has_renews_nothing():
    assert plan_renewal(GROUP, [A, B], {"10.9.9.9"}) is None
    assert plan_renewal(GROUP, [A, B], ()) is None


@pytest.mark.parametrize(
    ("num_pods", "occupied", "counts"),
    [(2, [A, C], [1, 1]), (4, [A, C], [3, 1]), (9, [], [3, 2]), (2, [A, B], [2, 1]), (0, [], [1, 1])],
)
def test_pods_that_any_of_several_groups_may_have_are_shared_out(num_pods: int, occupied: list[Pod], counts: list[int]):
    """No group is left with fewer pods than are occupied in it."""
    groups = [
        replace(GROUP, name="small", min_replicas=1, max_replicas=3),
        replace(GROUP, name="large", min_replicas=1, max_replicas=2),
    ]
    pods = [replace(A, group_name="small"), replace(B, group_name="small"), replace(C, group_name="large")]
    shares = share_out(groups, pods, GroupDemand(num_pods, frozenset(pod.address for pod in occupied)))
    assert [shares[group.name].num_pods for group in groups] == counts
