"""What the doctor found: one line each, and how to mend it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "failure"]


@dataclass(frozen=True, slots=True)
class Finding:
    """remedy: what to do about it, "" when nothing need be done."""

    check: str
    level: Level
    message: str
    remedy: str = ""


def render(findings: Sequence[Finding], ready: str = "ready to serve") -> str:
    """A table for a terminal. ready: the last line, if nothing failed."""
    width = max(len(finding.check) for finding in findings)
    lines: list[str] = []
    for finding in findings:
        lines.append(f"{finding.level:<8} {finding.check:<{width}}  {finding.message}")
        if finding.remedy:
            lines.append(f"{'':<8} {'':<{width}}  -> {finding.remedy}")
    count = sum(finding.level == "failure" for finding in findings)
    lines.append(ready if count == 0 else f"{count} thing{'s' if count > 1 else ''} to mend before serving")
    return "\n".join(lines)
