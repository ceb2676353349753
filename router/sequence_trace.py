"""What a router notes of a sampled sequence, and the spans that it makes of it at the end.

The first steps are told in full, with an answer of an expert group per layer; of all others only the sums: a long
answer has some thousand steps, each of them like the one before.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from typing import NamedTuple

from router.tracing import Span, Tracer, is_sampled, to_wall_ns

# At DeepSeek-V3's 58 layers and 8 groups, some 1,900 answers.
MAX_TOLD_STEPS = 4


class Hop(NamedTuple):
    """A frame that an expert group answered. sent_s, answered_s: of time.monotonic."""

    layer_id: int
    group_name: str
    replica_id: str
    num_pairs: int
    sent_s: float
    answered_s: float


class HopRecorder:
    """Collects the hops of a step while one of its sequences is sampled. Owned by the router's event loop."""

    def __init__(self) -> None:
        self._hops: list[Hop] = []
        self.is_on = False

    def start(self) -> None:
        self._hops, self.is_on = [], True

    def note(self, hop: Hop) -> None:
        if self.is_on:
            self._hops.append(hop)

    def stop(self) -> Items[Hop]:
        """Those since start()."""
        hops, self._hops, self.is_on = self._hops, [], False
        return hops


class _Step(NamedTuple):
    start_s: float
    end_s: float
    num_rows: int
    hops: Items[Hop]


class SequenceTrace:
    """Of one sequence, from its arrival."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._arrived_s = time.monotonic()
        self._steps: list[_Step] = []
        self._num_steps = 0

    @property
    def wants_hops(self) -> bool:
        return self._num_steps < MAX_TOLD_STEPS

    def add_step(self, start_s: float, end_s: float, num_rows: int, hops: Items[Hop]) -> None:
        """num_rows: of this sequence in the step. Times: of time.monotonic."""
        self._num_steps += 1
        if len(self._steps) < MAX_TOLD_STEPS:
            self._steps.append(_Step(start_s, end_s, num_rows, hops))

    def end(self, started_s: float | None, first_token_s: float | None, num_tokens: int, error: str | None) -> None:
        """Make the spans. started_s, first_token_s: None: it never came so far. error: None: it ended well."""
        span, ended_s = self._span, time.monotonic()
        for name, begin_s, end_s in (
            ("queue", self._arrived_s, started_s if started_s is not None else ended_s),
            ("prefill", started_s, first_token_s if first_token_s is not None else ended_s),
            ("decode", first_token_s, ended_s),
        ):
            if begin_s is not None:
                span.add_child(name, to_wall_ns(begin_s)).end(to_wall_ns(end_s))
        for number, step in enumerate(self._steps):
            child = span.add_child(
                "step", to_wall_ns(step.start_s), {"shoal.step": number, "shoal.num_rows": step.num_rows}
            )
            for hop in step.hops:
                attributes = {
                    "shoal.layer_id": hop.layer_id,
                    "shoal.expert_group": hop.group_name,
                    "shoal.replica_id": hop.replica_id,
                    "shoal.num_pairs": hop.num_pairs,
                }
                child.add_child("experts", to_wall_ns(hop.sent_s), attributes).end(to_wall_ns(hop.answered_s))
            child.end(to_wall_ns(step.end_s))
        span.set("shoal.num_steps", self._num_steps)
        span.set("shoal.num_tokens", num_tokens)
        span.end(error=error)


def begin_trace(tracer: Tracer | None, traceparent: str, router_id: str, request_id: str) -> SequenceTrace | None:
    """None: the sequence is not sampled, or this router has no traces."""
    if tracer is None or not is_sampled(traceparent):
        return None
    attributes = {"shoal.router_id": router_id, "shoal.request_id": request_id}
    span = tracer.start("router", traceparent, attributes=attributes)
    return None if span is None else SequenceTrace(span)
