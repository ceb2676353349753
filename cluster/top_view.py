"""What `shoal top` shows, from the JSON of the status page: the same picture as /ui for a terminal. Pure."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

_COLOURS = {"ready": "green", "starting": "yellow", "draining": "blue", "dead": "red", "not ready": "yellow"}
_MARKS = {"ready": "●", "starting": "◌", "draining": "○", "dead": "■"}
_SPARKS = " ▁▂▃▄▅▆▇█"
# From never asked for to the hottest of its layer.
_HEAT = ("grey15", "grey30", "dark_cyan", "cyan", "bright_cyan", "bright_white")
_BAR_CELLS = 12
_MOST_LAYERS = 16
_RATE_WINDOW_S = 10


def render_top(
    page: Mapping[str, Any],
    events: Sequence[Mapping[str, Any]],
    experts: Mapping[str, Any] | None,
    *,
    width: int,
    num_events: int = 8,
) -> RenderableType:
    """page, events, experts: of /ui/state, /ui/events and /ui/experts; experts: None where no controller runs.
    width: of the terminal, in cells."""
    parts: list[RenderableType] = [
        _render_head(page, width),
        Panel(_render_routers(page["routers"]), title="routers", title_align="left"),
        Panel(_render_groups(page["groups"]), title="expert groups", title_align="left"),
    ]
    if experts is not None and experts["layers"]:
        parts.append(Panel(_render_experts(experts, width - 16), title="expert load by layer", title_align="left"))
    if page["teams"]:
        parts.append(Panel(_render_teams(page["teams"]), title="queue by team", title_align="left"))
    if events:
        parts.append(Panel(_render_events(events[-num_events:]), title="events", title_align="left"))
    return Group(*parts)


def _render_head(page: Mapping[str, Any], width: int) -> RenderableType:
    activity = page["activity"]
    tokens = activity["tokens_per_s"]
    running = sum(router.get("num_running", 0) for router in page["routers"])
    waiting = sum(router.get("num_waiting", 0) for router in page["routers"])
    line = Text()
    line.append(page["model"], "bold")
    line.append("  ")
    line.append(page["state"], _COLOURS.get(page["state"], "white"))
    line.append(
        f"  {sum(tokens[-_RATE_WINDOW_S:]) / _RATE_WINDOW_S:.1f} tokens/s  {running} running  {waiting} waiting"
    )
    line.append(f"  TTFT {_format_latency(activity['ttft_ms'])}  TPOT {_format_latency(activity['tpot_ms'])}")
    if page["control_plane"] is False:
        line.append("  Ray's control service does not answer", "red")
    return Group(line, Text(_draw_spark(tokens, max(20, min(width - 2, 150))), "cyan"))


def _format_latency(latency: Mapping[str, Any]) -> str:
    if latency["p50"] is None:
        return "-"
    return f"{latency['p50']:.0f}/{latency['p90']:.0f}/{latency['p99']:.0f} ms"


def _draw_spark(values: Sequence[float], num_cells: int) -> str:
    """The newest on the right; each cell the mean of its share of the values."""
    span = max(1, len(values) // num_cells)
    means = [sum(values[at : at + span]) / span for at in range(len(values) % span, len(values), span)]
    highest = max(means, default=0.0)
    if highest <= 0:
        return ""
    return "".join(_SPARKS[round(value / highest * (len(_SPARKS) - 1))] for value in means)


def _render_state(state: str) -> Text:
    return Text(f"{_MARKS.get(state, '?')} {state}", _COLOURS.get(state, "white"))


def _render_routers(routers: Sequence[Mapping[str, Any]]) -> RenderableType:
    table = _make_table("ROUTER", "STATE", "RUNNING", "WAITING", "KV", "DRAFTS HOLD", "NODE", "")
    for router in routers:
        drafts = [f"{one['accepted'] / one['drafted']:.0%}" for one in router.get("drafts", ()) if one["drafted"]]
        kv = f"{router['kv_usage']:.0%}" if "kv_usage" in router else ""
        table.add_row(
            router["id"],
            _render_state(router["state"]),
            str(router.get("num_running", "")),
            str(router.get("num_waiting", "")),
            kv,
            " ".join(drafts),
            router["node"] or "",
            Text(router["message"] or "", "dim"),
        )
    return table


def _render_groups(groups: Sequence[Mapping[str, Any]]) -> RenderableType:
    table = _make_table("GROUP", "REPLICA", "STATE", "BUSY", "QUEUE", "FRAME", "NODE", "")
    for group in groups:
        name = f"{group['name']} ({len(group['replicas'])}/{group['desired_replicas']})"
        for replica in group["replicas"] or [None]:
            if replica is None:
                table.add_row(name, Text("none", "red"), "", "", "", "", "", "")
                continue
            load = replica["load"]
            table.add_row(
                name,
                replica["id"],
                _render_state(replica["state"]),
                "" if load is None else _draw_bar(load["busy_share"]),
                "" if load is None else f"{load['queue_ms']:.1f} ms",
                "" if not replica["frame_ms"] else f"{replica['frame_ms']:.1f} ms",
                replica["node"] or "",
                Text(replica["message"] or "", "dim"),
            )
            name = ""
    return table


def _draw_bar(share: float) -> Text:
    num_full = round(max(0.0, min(1.0, share)) * _BAR_CELLS)
    bar = Text("█" * num_full, "red" if share > 0.85 else "cyan")
    bar.append("░" * (_BAR_CELLS - num_full), "dim")
    bar.append(f" {share:4.0%}")
    return bar


def _render_experts(experts: Mapping[str, Any], num_cells: int) -> RenderableType:
    """A line per layer, of at most num_cells cells: neighbours share one, which shows the hotter."""
    table = Table.grid(padding=(0, 1))
    layers = experts["layers"]
    shown = layers[:: -(-len(layers) // _MOST_LAYERS)]
    for layer in shown:
        pairs = layer["pairs"]
        span = -(-len(pairs) // max(1, num_cells))
        hottest = max(max(pairs), 1)
        line = Text()
        for at in range(0, len(pairs), span):
            share = max(pairs[at : at + span]) / hottest
            line.append("█", _HEAT[round(share**0.5 * (len(_HEAT) - 1))])
        table.add_row(Text(f"{layer['layer']:>3}", "dim"), line)
    return table


def _render_teams(teams: Sequence[Mapping[str, Any]]) -> RenderableType:
    table = _make_table("TEAM", "RUNNING", "WAITING")
    for team in teams[:8]:
        table.add_row(team["team"], str(team["num_running"]), str(team["num_waiting"]))
    return table


def _render_events(events: Sequence[Mapping[str, Any]]) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    for event in reversed(events):
        moment = time.strftime("%H:%M:%S", time.localtime(event["time"]))
        table.add_row(Text(moment, "dim"), f"{event['object']} {event['action']}", Text(event["reason"], "dim"))
    return table


def _make_table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, expand=False, header_style="dim")
    for column in columns:
        table.add_column(column, no_wrap=bool(column))
    return table
