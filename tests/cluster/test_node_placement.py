from cluster.node_placement import choose_node


def test_replicas_of_a_group_are_kept_apart_first():
    occupied = {"g0-0": "a", "g1-0": "b", "g1-1": "b", "g2-0": "b"}
    assert choose_node("g0-1", {"a", "b"}, occupied) == "b"


def test_then_nodes_get_equal_numbers_and_ties_go_to_the_smallest_id():
    assert choose_node("g5-0", {"a", "b"}, {"g0-0": "a"}) == "b"
    assert choose_node("g5-0", {"b", "a"}, {}) == "a"


def test_its_own_old_place_counts_for_nothing():
    assert choose_node("g0-0", {"a", "b"}, {"g0-0": "a"}) == "a"


def test_no_node_no_choice():
    assert choose_node("g0-0", set(), {}) is None
