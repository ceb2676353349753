"""Which experts the replicas of each group should hold, and which of them the expert table may name. Pure.

A rebalancing changes what groups should hold. The order is make before break, for all groups at once, since an expert
that leaves one group arrives in another:
1. every replica holds what the table names and what it should name: the new experts are loaded beside the old ones;
2. once all have them, the table names what it should;
3. once every router has that table, replicas release what it does not name.
What comes next follows from what is observed, so a controller that is restarted, or a replica, goes on in the middle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from cluster.desired_state import DesiredState
from cluster.errors import BadRecord
from cluster.records import ReplicaRecord
from experts.expert_range import ExpertRange, covers, merge_ranges
from router.expert_table import ExpertTable

Ranges = tuple[ExpertRange, ...]


@dataclass(frozen=True, slots=True)
class Hosting:
    """By group name. published: what the table names now; desired: what it should name."""

    published: Mapping[str, Ranges]
    desired: Mapping[str, Ranges]

    @property
    def is_published(self) -> bool:
        """Whether the table names what it should."""
        return self.published == self.desired

    def get_wanted(self, group_name: str) -> Ranges:
        """What a replica of the group should hold."""
        return merge_ranges(self.published[group_name], self.desired[group_name])


def read_hosting(desired: DesiredState, table: ExpertTable) -> Hosting:
    """By the table in force; a group that is in none yet begins with what it should hold."""
    wanted = {group.name: group.hosted for group in desired.groups}
    in_force = {group.name: merge_ranges(group.hosted) for group in table.groups}
    return Hosting({name: in_force.get(name, hosted) for name, hosted in wanted.items()}, wanted)


def publish_if_held(
    hosting: Hosting, ready: Mapping[str, Sequence[ReplicaRecord]], num_members: Mapping[str, int]
) -> Hosting:
    """The table may name what it should if in every group that has members some are ready, and all of these hold it.

    ready: members by group name.
    """
    for name, wanted in hosting.desired.items():
        held = [covers(record.hosted, wanted) for record in ready[name]]
        if num_members[name] and not (held and all(held)):
            return hosting
    return Hosting(hosting.desired, hosting.desired)


def find_start_hosting(group_name: str, desired: DesiredState, table: ExpertTable) -> Ranges:
    """What a replica loads that starts now: what the table names, whose digest is known. It gets the rest later, as
    the others do. Raises KeyError for an unknown group."""
    return read_hosting(desired, table).published[group_name]


def ranges_to_json(hosted: Ranges) -> bytes:
    return json.dumps([asdict(block) for block in hosted]).encode()


def ranges_from_json(data: bytes) -> Ranges:
    """Raises BadRecord."""
    try:
        return tuple(ExpertRange(**block) for block in json.loads(data))
    except (ValueError, TypeError) as error:
        raise BadRecord(f"expert ranges cannot be read: {error}") from error
