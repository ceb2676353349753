"""What is looked at before an upgrade is begun: whether another checkpoint may take the place of the one that serves,
and whether both fit beside each other. Pure but for reading headers and small files.

Make before break takes room for two copies. Where there is none, that is said with the bytes that are missing, and
nothing is started.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from cluster.desired_state import DesiredState
from cluster.errors import ChangeRefused, PreflightError
from cluster.node_placement import choose_node
from cluster.preflight import PROCESS_BYTES, check_headers
from cluster.spec import ClusterSpec
from experts.check import CheckReport
from experts.model_config import ModelConfig

# What the HTTP front has read of the old checkpoint and goes on with.
_FRONT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@dataclass(frozen=True, slots=True)
class Room:
    """What is free. available_bytes: of memory, by node. num_gpus: that Ray has not given to anybody. num_pods: how
    many more each expert group may have, by name; None where replicas need no pods. num_router_pods: as many more
    pods as routers may have; None: not known, or no pods."""

    available_bytes: Mapping[str, int]
    num_gpus: float = 0.0
    num_pods: Mapping[str, int] | None = None
    num_router_pods: int | None = None


def check_candidate(source: ClusterSpec, folder: Path) -> tuple[ModelConfig, ModelConfig, CheckReport]:
    """The models before and after, and what the new one takes. Raises ChangeRefused if folder cannot take the place of
    the checkpoint that serves."""
    before_folder = Path(source.checkpoint)
    if not folder.is_absolute():
        raise ChangeRefused(f"{folder} is no absolute path: every node must find the checkpoint there")
    if not folder.is_dir():
        raise ChangeRefused(
            f"{folder} is not a folder where the controller runs: name a Hugging Face checkpoint folder"
        )
    if folder.resolve() == before_folder.resolve():
        raise ChangeRefused(
            f"{folder} is what is served already: give the new checkpoint a folder of its own, since replicas that "
            "are restarted read the old one again"
        )
    try:
        report = check_headers(folder, len(source.groups))
    except PreflightError as error:
        raise ChangeRefused(str(error)) from error
    before, after = ModelConfig.from_folder(before_folder), ModelConfig.from_folder(folder)
    changed = [name for name in _FRONT_FILES if _digest(before_folder / name) != _digest(folder / name)]
    if changed or before.vocab_size != after.vocab_size or before.eos_token_ids != after.eos_token_ids:
        what = ", ".join(changed) or "vocabulary or end-of-sequence ids"
        raise ChangeRefused(
            f"{folder} differs in what the HTTP front reads ({what}): clients would see another tokenizer or template "
            "in the middle of it; start another cluster beside this one and move the clients"
        )
    longest = source.router.max_model_len or before.max_position_embeddings
    if after.max_position_embeddings < longest:
        raise ChangeRefused(
            f"{folder} was made for {after.max_position_embeddings} positions, and requests of up to {longest} are "
            "served: start the cluster with a smaller max_model_len first"
        )
    if source.router.speculative_tokens and after.num_nextn_predict_layers == 0:
        raise ChangeRefused(f"{folder} has no MTP layer, and speculative_tokens is {source.router.speculative_tokens}")
    return before, after, report


def check_room(
    source: ClusterSpec,
    target: ClusterSpec,
    desired: DesiredState,
    occupied: Mapping[str, str],
    report: CheckReport,
    room: Room,
) -> None:
    """Raises ChangeRefused, naming what is missing, unless the new checkpoint fits beside the old one.

    occupied: node id of each replica that runs.
    """
    counts = {group.name: len(group.member_ids) for group in desired.groups}
    trunk_bytes = 0 if report.trunk is None else report.trunk.bf16_bytes
    group_bytes = {group.name: part.bf16_bytes for group, part in zip(target.groups, report.groups, strict=True)}
    weights_bytes = sum(group_bytes[name] * count for name, count in counts.items())
    weights_bytes += trunk_bytes * len(target.router_ids)
    num_actors = sum(counts.values()) + len(target.router_ids)
    if room.num_pods is not None:
        _check_pods(counts, len(target.router_ids), group_bytes, trunk_bytes, room)
        return
    if source.gpus_per_actor > 0:
        num_gpus = num_actors * source.gpus_per_actor
        if num_gpus > room.num_gpus + 1e-6:
            missing_bytes = int(weights_bytes * (1 - room.num_gpus / num_gpus))
            _refuse(
                f"it takes {num_gpus:g} GPUs for {weights_bytes:,} bytes of weights, and {room.num_gpus:g} GPUs are "
                f"free: about {missing_bytes:,} bytes",
                "add cards, or stop this cluster and start it with the new checkpoint",
            )
        return
    factor = 2 if source.dtype == "float32" else 1
    needed = _place(target, counts, occupied, room.available_bytes)
    for node_id, parts in needed.items():
        need_bytes = sum(
            PROCESS_BYTES + factor * (trunk_bytes if name is None else group_bytes[name]) * number
            for name, number in parts.items()
        )
        available = room.available_bytes[node_id]
        if need_bytes > available:
            _refuse(
                f"it takes {need_bytes:,} bytes on node {node_id}, and {available:,} are available: "
                f"{need_bytes - available:,} bytes",
                "add memory or nodes, scale groups down, or stop this cluster and start it with the new checkpoint",
            )


def _check_pods(
    counts: Mapping[str, int], num_routers: int, group_bytes: Mapping[str, int], trunk_bytes: int, room: Room
) -> None:
    assert room.num_pods is not None
    for name, count in counts.items():
        free = max(0, room.num_pods.get(name, 0))
        if free < count:
            _refuse(
                f"group {name} takes {count} more pods, of {group_bytes[name]:,} bytes of weights each, and its worker "
                f"group may have {free} more: {(count - free) * group_bytes[name]:,} bytes",
                "raise its maxReplicas, where there are nodes, or install another release beside this one",
            )
    if room.num_router_pods is not None and room.num_router_pods < num_routers:
        free = max(0, room.num_router_pods)
        _refuse(
            f"{num_routers} more router pods are needed, of {trunk_bytes:,} bytes of weights each, and there may be "
            f"{free} more: {(num_routers - free) * trunk_bytes:,} bytes",
            "raise the routers' maxReplicas, where there are nodes, or install another release beside this one",
        )


def _refuse(what: str, remedy: str) -> NoReturn:
    raise ChangeRefused(f"no room for the new checkpoint beside the old one: {what} are missing; {remedy}")


def _place(
    target: ClusterSpec, counts: Mapping[str, int], occupied: Mapping[str, str], node_ids: Collection[str]
) -> dict[str, Counter[str | None]]:
    """What each node gets: replicas by group name, routers by None. As cluster/planner.py and actor_factory.py do."""
    taken = dict(occupied)
    needed: dict[str, Counter[str | None]] = {node_id: Counter() for node_id in node_ids}
    for name, count in counts.items():
        for number in range(count):
            # Numbers that no replica has.
            replica_id = f"{name}-{1000 + number}"
            node_id = choose_node(replica_id, node_ids, taken)
            assert node_id is not None
            taken[replica_id] = node_id
            needed[node_id][name] += 1
    ordered = list(node_ids)
    for number in range(len(target.router_ids)):
        needed[ordered[number % len(ordered)]][None] += 1
    return needed


def _digest(path: Path) -> str | None:
    """None: there is no such file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
