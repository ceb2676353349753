"""What a router did while `shoal bench` ran: the difference of two readings of its figures. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PREFIX, _SUFFIX = "step_times.", "_ns"
_WHOLE = "step"


def summarize_router(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, Any]:
    """before, after: flat figures of one router. parts_ms and parts_share: of a mean step, in the router's order.

    accepted: part of the drafts at each position that held. What did not happen is None, or 0 if it is a count.
    """

    def count(name: str) -> float:
        value = after.get(name, 0) - before.get(name, 0)
        # A router that was restarted meanwhile counts from 0.
        return after.get(name, 0) if value < 0 else value

    times_ns = {
        name.removeprefix(_PREFIX).removesuffix(_SUFFIX): count(name)
        for name in after
        if name.startswith(_PREFIX) and name.endswith(_SUFFIX)
    }
    step_ns = times_ns.pop(_WHOLE, 0)
    num_steps = int(count("num_steps"))
    num_drafted = [count(name) for name in _list(after, "num_drafted")]
    num_accepted = [count(name) for name in _list(after, "num_accepted")]
    return {
        "num_steps": num_steps,
        "step_ms": _divide(step_ns / 1e6, num_steps),
        "tokens_per_step": _divide(count("num_generated_tokens"), num_steps),
        "parts_ms": {part: _divide(value / 1e6, num_steps) for part, value in times_ns.items()},
        "parts_share": {part: _divide(value, step_ns) for part, value in times_ns.items()},
        "accepted": [_divide(held, drafted) for held, drafted in zip(num_accepted, num_drafted, strict=False)],
        "cached_share": _divide(count("num_cached_tokens"), count("num_prompt_tokens")),
        "num_preemptions": int(count("num_preemptions")),
        "num_retries": int(count("dispatch.num_retries")),
        "num_hedges": int(count("dispatch.num_hedges")),
    }


def render_router(router_id: str, summary: Mapping[str, Any]) -> list[str]:
    """Lines for a terminal."""
    if not summary["num_steps"]:
        return [f"router {router_id}: no step"]
    lines = [
        f"router {router_id}: {summary['num_steps']} steps of {summary['step_ms']:.2f} ms, "
        f"{summary['tokens_per_step']:.2f} tokens each",
        f"  {'of a step':<12}{'ms':>10}{'share':>10}",
    ]
    for part, value_ms in summary["parts_ms"].items():
        lines.append(f"  {part:<12}{value_ms:>10.3f}{summary['parts_share'][part] or 0:>10.1%}")
    held = [f"{share:.0%} at {position}" for position, share in enumerate(summary["accepted"], 1) if share is not None]
    if held:
        lines.append(f"  drafts that held: {', '.join(held)}")
    if summary["cached_share"] is not None:
        lines.append(f"  prompt tokens from the cache: {summary['cached_share']:.0%}")
    lines.append(
        f"  preemptions: {summary['num_preemptions']}, repeated expert calls: {summary['num_retries']}, "
        f"hedged: {summary['num_hedges']}"
    )
    return lines


def _list(figures: Mapping[str, float], name: str) -> list[str]:
    """Names of the items of a list, in order."""
    names = []
    while (item := f"{name}.{len(names)}") in figures:
        names.append(item)
    return names


def _divide(value: float, by: float) -> float | None:
    return round(value / by, 4) if by else None
