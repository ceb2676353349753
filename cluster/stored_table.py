"""How the expert table and the groups' digests are kept in the record store, for a controller that is restarted."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from cluster.errors import BadRecord
from cluster.planner import Held, Memory
from experts.expert_range import ExpertRange
from router.expert_table import ExpertTable, GroupEntry, ReplicaEntry


def memory_to_json(memory: Memory) -> bytes:
    """Only what outlives a process: times on this process's clock do not."""
    groups = [
        {
            "name": group.name,
            "hosted": [asdict(block) for block in group.hosted],
            "replicas": [asdict(replica) for replica in group.replicas],
        }
        for group in memory.table.groups
    ]
    digests = [
        {"group": held.group_name, "hosted": [asdict(block) for block in held.hosted], "digest": digest}
        for held, digest in memory.digests.items()
    ]
    document = {"version": memory.table.version, "groups": groups, "digests": digests}
    return json.dumps(document).encode()


def memory_from_json(data: bytes) -> Memory:
    """Raises BadRecord."""
    try:
        document: dict[str, Any] = json.loads(data)
        groups = tuple(
            GroupEntry(
                name=group["name"],
                hosted=tuple(ExpertRange(**block) for block in group["hosted"]),
                replicas=tuple(ReplicaEntry(**replica) for replica in group["replicas"]),
            )
            for group in document["groups"]
        )
        digests = {
            Held(item["group"], tuple(ExpertRange(**block) for block in item["hosted"])): str(item["digest"])
            for item in document["digests"]
        }
        return Memory(table=ExpertTable(version=document["version"], groups=groups), digests=digests)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadRecord(f"the stored expert table cannot be read: {error}") from error
