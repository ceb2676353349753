from cluster.desired_state import DesiredGroup, DesiredState
from cluster.fleet import GroupDemand, find_residents, measure_demand
from tests.cluster.fakes import HOSTED, make_replica

DESIRED = DesiredState(3, (DesiredGroup("g0", ("g0-0", "g0-2"), HOSTED[0]), DesiredGroup("g1", ("g1-0",), HOSTED[1])))


def test_only_members_are_found_on_a_pod_that_leaves():
    records = {
        "g0-0": make_replica("g0-0", node="10.0.0.1"),
        "g0-1": make_replica("g0-1", node="10.0.0.1"),
        "g1-0": make_replica("g1-0", node="10.0.0.2"),
    }
    assert find_residents(DESIRED, records, {"10.0.0.1"}) == ("g0-0",)
    assert find_residents(DESIRED, records, {"10.0.0.1", "10.0.0.2"}) == ("g0-0", "g1-0")
    assert find_residents(DESIRED, records, set()) == ()


def test_a_replica_that_leaves_and_one_that_is_still_to_come_both_take_a_pod():
    records = {
        "g0-0": make_replica("g0-0", node="10.0.0.1"),
        "g0-1": make_replica("g0-1", node="10.0.0.3"),
        "g1-0": make_replica("g1-0", node="10.0.0.2"),
    }
    assert measure_demand(DESIRED, records, {"g0-0", "g0-1", "r0", "controller", "g1-0"}) == {
        "g0": GroupDemand(3, frozenset({"10.0.0.1", "10.0.0.3"})),
        "g1": GroupDemand(1, frozenset({"10.0.0.2"})),
    }


def test_the_record_of_a_replica_that_ended_occupies_nothing():
    demand = measure_demand(DESIRED, {"g1-0": make_replica("g1-0", node="10.0.0.2")}, {"g0-0"})
    assert demand["g1"] == GroupDemand(1, frozenset())
