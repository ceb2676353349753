"""What happened to the cluster and why: a ring of events, kept in the record store so that it outlives the controller.

It is for people and for tests, nothing is decided from it. Written at most once per turn of the controller; the ring is
bounded by number and the text by length, so that a crash loop cannot fill the store.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cluster.errors import BadRecord

# At some 150 bytes each, a write stays below 100 KB.
MAX_EVENTS = 512
MAX_REASON_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Event:
    """sequence rises by one from event to event. time: seconds since the epoch. object: as in `replica g0-1`."""

    sequence: int
    time: float
    object: str
    action: str
    reason: str


class EventLog:
    """The last MAX_EVENTS events, oldest first."""

    def __init__(self, wall_clock: Callable[[], float]) -> None:
        """wall_clock: seconds since the epoch."""
        self._wall_clock = wall_clock
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._next_sequence = 1
        self._taken_sequence = 0
        self._counts: Counter[tuple[str, str]] = Counter()
        self.is_stored = True

    def add(self, object_name: str, action: str, reason: str) -> None:
        reason = " ".join(reason.split())[:MAX_REASON_CHARACTERS]
        self._counts[object_name.split(" ")[0], action] += 1
        self._events.append(Event(self._next_sequence, self._wall_clock(), object_name, action, reason))
        self._next_sequence += 1
        self.is_stored = False

    def get_after(self, sequence: int) -> list[dict[str, Any]]:
        """Events with a greater sequence, as JSON values."""
        return [asdict(event) for event in self._events if event.sequence > sequence]

    def take_new(self) -> list[Event]:
        """Those added since this was called last."""
        taken = [event for event in self._events if event.sequence > self._taken_sequence]
        self._taken_sequence = self._next_sequence - 1
        return taken

    @property
    def counts(self) -> Mapping[tuple[str, str], int]:
        """Events of this process by the kind of their object, as in `replica`, and action."""
        return self._counts

    def to_json(self) -> bytes:
        return json.dumps({"next": self._next_sequence, "events": [asdict(event) for event in self._events]}).encode()

    def restore(self, data: bytes) -> None:
        """Take over what a predecessor wrote; what was added here comes after it. Raises BadRecord."""
        try:
            document: dict[str, Any] = json.loads(data)
            earlier = [Event(**values) for values in document["events"]]
            next_sequence = int(document["next"])
        except (ValueError, KeyError, TypeError) as error:
            raise BadRecord(f"the stored events cannot be read: {error}") from error
        own = list(self._events)
        self._events = deque(earlier, maxlen=MAX_EVENTS)
        self._next_sequence = next_sequence
        self._taken_sequence = next_sequence - 1
        for event in own:
            self._events.append(Event(self._next_sequence, event.time, event.object, event.action, event.reason))
            self._next_sequence += 1
