"""What happened to the frames of one router since its start."""

from __future__ import annotations

from dataclasses import dataclass, field

from router.errors import ReplicaError


@dataclass
class DispatchCounters:
    """num_frames: attempts of any kind. num_retries: sent again because a replica failed them; errors: by kind.
    num_hedges: sent to another replica as well because the first was late; num_hedges_won: answered there first.
    num_probes: copies that only measured a replica which gets no frames. num_rerouted: moved because their replica left
    the table. num_replans: layers planned again. num_missed_heartbeats, num_dead_replicas: as the heartbeats found.
    num_crossings: times that a group went on with replicas of another numerics_id. num_left_out: experts of a row that
    were done without because nobody served them (router/degradation.py)."""

    num_frames: int = 0
    num_retries: int = 0
    num_replans: int = 0
    num_hedges: int = 0
    num_hedges_won: int = 0
    num_probes: int = 0
    num_rerouted: int = 0
    num_missed_heartbeats: int = 0
    num_dead_replicas: int = 0
    num_crossings: int = 0
    num_left_out: int = 0
    errors: dict[str, int] = field(default_factory=dict[str, int])

    def count_error(self, error: ReplicaError) -> None:
        name = type(error).__name__
        self.errors[name] = self.errors.get(name, 0) + 1
