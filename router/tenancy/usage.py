"""What one request used: the unit of the ledger. Never what was said."""

from __future__ import annotations

import enum
import json
from dataclasses import asdict, dataclass
from typing import Any

SECONDS_PER_DAY = 86_400


class Outcome(enum.StrEnum):
    """CUT_OFF: the client left, or the process that served it died. FAILED: it got an error."""

    FINISHED = "finished"
    CUT_OFF = "cut_off"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """id: of this record alone. request_id: as clients know it, which they may use twice. Times: seconds since the
    epoch. tokens_in: each prompt once, those found in a cache (tokens_cached) included. router_us, expert_us:
    microseconds of a router, and of expert groups, all of them together."""

    id: str
    request_id: str
    team: str
    key_id: str
    model: str
    outcome: Outcome
    started_at: float
    ended_at: float
    tokens_in: int
    tokens_cached: int
    tokens_out: int
    router_us: int
    expert_us: int

    @property
    def day(self) -> int:
        """Of its end, counted from the epoch, UTC."""
        return int(self.ended_at // SECONDS_PER_DAY)

    def to_line(self) -> bytes:
        return json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> UsageRecord:
        """Raises ValueError, KeyError or TypeError if it is none."""
        values: dict[str, Any] = json.loads(line)
        return cls(**{**values, "outcome": Outcome(values["outcome"])})
