"""Which Ray node a new expert replica goes to. Pure.

Replicas of one group belong on different nodes, so that a lost node takes one replica of a group and not all of them;
beyond that, nodes get equal numbers. An actor stays with its node: if that is gone, so is the actor, and it is created
anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from cluster.spec import parse_replica_id


def choose_node(replica_id: str, node_ids: Collection[str], occupied: Mapping[str, str]) -> str | None:
    """The node with the fewest replicas of this group, then with the fewest in all, then the smallest id.

    occupied: node id of each other replica that has one. None if no node is known.
    """
    group_name = parse_replica_id(replica_id)[0]
    others = {other: node_id for other, node_id in occupied.items() if other != replica_id}
    in_group = Counter(node_id for other, node_id in others.items() if parse_replica_id(other)[0] == group_name)
    in_all = Counter(others.values())
    return min(node_ids, key=lambda node_id: (in_group[node_id], in_all[node_id], node_id), default=None)
