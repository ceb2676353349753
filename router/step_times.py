"""Where the steps' time goes, in nanoseconds since the router started."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class PartTimes:
    """Sums over all steps; what is computed while frames are on their way counts as what it is, not as waiting.

    attention_ns: norms, projections and attention. gate_ns: choosing experts. shared_ns: shared experts and dense MLPs.
    scatter_ns: planning and sending frames. wait_ns: from then until the sums are there, shared experts taken off.
    head_ns: final norm and logits. sample_ns: from logits to tokens. step_ns: whole steps; the rest of it is overhead.
    Two micro-batches overlap: each counts its own waiting, so the parts may then exceed the whole.
    """

    attention_ns: int = 0
    gate_ns: int = 0
    scatter_ns: int = 0
    wait_ns: int = 0
    shared_ns: int = 0
    head_ns: int = 0
    sample_ns: int = 0
    step_ns: int = 0

    @property
    def overhead_ns(self) -> int:
        """Of whole steps, what no part explains."""
        parts = sum(getattr(self, field.name) for field in fields(self) if field.name != "step_ns")
        return max(0, self.step_ns - parts)
