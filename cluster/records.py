"""What the actors say about themselves: small JSON records in Ray's key-value store.

Layout, all in the namespace RECORD_NAMESPACE:
    spec                the ClusterSpec, written by `shoal serve`
    desired             the DesiredState, written by the controller before it acts on it
    table               the expert table in force, written by the controller before it is pushed
    upgrade             the last Upgrade to another checkpoint, written by the controller before each step
    events              the event log, written by the controller
    controller          ControllerRecord
    replica/<id>        ReplicaRecord, written by each expert replica at every start and change of state
    router/<id>         RouterRecord, likewise

Since a cluster was upgraded there are desired/N and table/N, of weights version N, instead of those of version 1.

A record outlives its process: `ready` there means "was ready when it wrote this", and the incarnation tells two
starts apart. Whether the process still lives is found by health checks and by broken streams, not here.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Self

from cluster.errors import BadRecord
from experts.expert_range import ExpertRange

RECORD_NAMESPACE = b"shoal"
SPEC_KEY = b"spec"
DESIRED_KEY = b"desired"
TABLE_KEY = b"table"
EVENTS_KEY = b"events"
UPGRADE_KEY = b"upgrade"
REBALANCING_KEY = b"rebalancing"
CONTROLLER_KEY = b"controller"
REPLICA_PREFIX = b"replica/"
ROUTER_PREFIX = b"router/"

# A process that was ready for less than this before it ended counts as a failed start.
STABLE_AFTER_S = 10.0
MAX_START_DELAY_S = 30.0


class StartState(StrEnum):
    """How far a start got, as the process itself published it."""

    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorRecord:
    """Common to replicas and routers. endpoint is None until ready; times are seconds since the epoch."""

    actor_id: str
    state: StartState
    # Greater for every start of the same actor.
    incarnation: int
    pid: int
    # Name for people, and Ray's id of the node ("" outside of Ray), which tells two nodes on one machine apart.
    node: str
    node_id: str
    endpoint: str | None
    # Why it failed, or what it is doing; one line.
    message: str
    # Starts in a row before this one that ended before they were ready and stable.
    num_failed_starts: int
    # Fraction of the weights read while starting.
    load_progress: float
    started_at: float
    ready_at: float | None
    # As in ClusterSpec.
    weights_version: int = 1

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Raises BadRecord."""
        try:
            return cls(**cls._read_fields(json.loads(data)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BadRecord(f"a record cannot be read: {error}") from error

    @classmethod
    def _read_fields(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "state": StartState(values["state"])}


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterRecord(ActorRecord):
    """A router; its actor_id is the router id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRecord(ActorRecord):
    """An expert group replica; its actor_id is the replica id. Digest and numerics id are "" until ready."""

    group_name: str
    hosted: tuple[ExpertRange, ...]
    weight_digest: str
    numerics_id: str

    @classmethod
    def _read_fields(cls, values: dict[str, Any]) -> dict[str, Any]:
        hosted = tuple(ExpertRange(**block) for block in values["hosted"])
        return {**values, "state": StartState(values["state"]), "hosted": hosted}


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerRecord:
    pid: int
    node: str
    admin_url: str

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()


def controller_from_json(data: bytes) -> ControllerRecord:
    """Raises BadRecord."""
    try:
        return ControllerRecord(**json.loads(data))
    except (ValueError, TypeError) as error:
        raise BadRecord(f"the controller's record cannot be read: {error}") from error


def desired_key(weights_version: int) -> bytes:
    return DESIRED_KEY if weights_version == 1 else DESIRED_KEY + b"/%d" % weights_version


def table_key(weights_version: int) -> bytes:
    return TABLE_KEY if weights_version == 1 else TABLE_KEY + b"/%d" % weights_version


def rebalancing_key(weights_version: int) -> bytes:
    return REBALANCING_KEY + b"/%d" % weights_version


def replica_key(replica_id: str) -> bytes:
    return REPLICA_PREFIX + replica_id.encode()


def router_key(router_id: str) -> bytes:
    return ROUTER_PREFIX + router_id.encode()


def count_failed_starts(previous: ActorRecord | None, now: float) -> int:
    """Failed starts in a row, judged by the record of the start before; now in seconds since the epoch."""
    if previous is None:
        return 0
    if (
        previous.state is StartState.READY
        and previous.ready_at is not None
        and now - previous.ready_at >= STABLE_AFTER_S
    ):
        return 0
    return previous.num_failed_starts + 1


def compute_start_delay_s(num_failed_starts: int) -> float:
    """How long a start waits, so that a crash loop does not eat the machine. The first repetition is immediate."""
    if num_failed_starts < 2:
        return 0.0
    return min(MAX_START_DELAY_S, 0.5 * 2.0 ** min(num_failed_starts - 2, 16))
