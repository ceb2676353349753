"""A rebalancing that was begun: where experts go, how far it is, what it gained; also as a controller that is restarted
finds it. Pure.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from cluster.errors import BadRecord
from cluster.rebalance_view import Proposal

Phase = Literal["moving", "measuring", "done", "failed"]


class Throughput(NamedTuple):
    """(row, expert) pairs per second over the load window, by group."""

    pairs_per_s: Mapping[str, float]

    @property
    def max_over_mean(self) -> float | None:
        """None without any load."""
        total = sum(self.pairs_per_s.values())
        return None if total <= 0 else max(self.pairs_per_s.values()) * len(self.pairs_per_s) / total

    def to_json(self) -> dict[str, Any]:
        most = self.max_over_mean
        return {
            "rows_max_over_mean": None if most is None else round(most, 4),
            "pairs_per_s": round(sum(self.pairs_per_s.values()), 1),
        }


@dataclass(slots=True)
class Rebalancing:
    """moved_s: when it last got on; of the balancer's clock."""

    number: int
    proposal: Proposal
    reason: str
    before: Throughput
    moved_s: float
    phase: Phase = "moving"
    num_rounds: int = 0
    after: Throughput | None = None
    failure: str | None = None

    def to_json(self) -> dict[str, Any]:
        """For people."""
        return {
            "number": self.number,
            "phase": self.phase,
            "reason": self.reason,
            "rounds": self.num_rounds,
            "expected": dict(self.proposal.view),
            "measured": None
            if self.after is None
            else {"before": self.before.to_json(), "after": self.after.to_json()},
            "failure": self.failure,
        }

    def to_record(self) -> bytes:
        """For a successor; moved_s is of this process's clock and left out."""
        proposal = self.proposal
        return json.dumps(
            {
                "number": self.number,
                "phase": self.phase,
                "reason": self.reason,
                "num_rounds": self.num_rounds,
                "before": dict(self.before.pairs_per_s),
                "after": None if self.after is None else dict(self.after.pairs_per_s),
                "failure": self.failure,
                "view": dict(proposal.view),
                "group_names": proposal.group_names,
                "layer_ids": proposal.layer_ids,
                "max_copies": proposal.max_copies,
                "num_experts": proposal.placement.shape[2],
                "placement": base64.b64encode(np.packbits(proposal.placement).tobytes()).decode(),
            }
        ).encode()


def rebalancing_from_record(data: bytes, now_s: float) -> Rebalancing:
    """now_s: of the balancer's clock, from which it counts again. Raises BadRecord."""
    try:
        values: dict[str, Any] = json.loads(data)
        shape = len(values["group_names"]), len(values["layer_ids"]), int(values["num_experts"])
        packed = np.frombuffer(base64.b64decode(values["placement"], validate=True), dtype=np.uint8)
        proposal = Proposal(
            view=values["view"],
            group_names=tuple(values["group_names"]),
            layer_ids=tuple(values["layer_ids"]),
            placement=np.unpackbits(packed)[: np.prod(shape)].reshape(shape).astype(bool),
            max_copies=tuple(values["max_copies"]),
        )
        return Rebalancing(
            number=int(values["number"]),
            proposal=proposal,
            reason=values["reason"],
            before=Throughput(values["before"]),
            moved_s=now_s,
            phase=values["phase"],
            num_rounds=int(values["num_rounds"]),
            after=None if values["after"] is None else Throughput(values["after"]),
            failure=values["failure"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadRecord(f"the stored rebalancing cannot be read: {error}") from error
