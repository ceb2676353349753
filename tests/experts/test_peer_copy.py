"""Experts copied from a replica that lives: the same weights as from disk, or the disk instead."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from experts.checkpoint import Checkpoint
from experts.expert_range import ExpertRange
from experts.group import ExpertGroup
from experts.peer_copy import PeerCopies
from experts.server import ExpertServer, ReplicaIdentity
from experts.weights import ExpertWeights, load_expert_weights
from tests.random_checkpoint import write_random_checkpoint

HOSTED = (ExpertRange(1, 3, 0, 4),)


def load(folder: Path, endpoint: str | None = None) -> tuple[ExpertWeights, int]:
    """The weights, and how many experts were copied."""
    with Checkpoint(folder) as checkpoint:
        if endpoint is None:
            return load_expert_weights(checkpoint, HOSTED, torch.bfloat16), 0
        with closing(PeerCopies(endpoint)) as copies:
            return load_expert_weights(checkpoint, HOSTED, torch.bfloat16, copies=copies), copies.num_copied


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_random_checkpoint(tmp_path / "checkpoint", fp8=True)
    return tmp_path / "checkpoint"


@pytest.fixture
def peer(folder: Path) -> Iterator[ExpertServer]:
    """Hosts experts 0 to 2 only, of two layers."""
    with Checkpoint(folder) as checkpoint:
        weights = load_expert_weights(checkpoint, (ExpertRange(1, 3, 0, 3),), torch.bfloat16)
    server = ExpertServer(ExpertGroup(weights), ReplicaIdentity("g0", "g0-0", 1), checkpoint=str(folder))
    server.start()
    yield server
    server.stop(0)


def test_copies_are_the_weights_that_the_disk_has_until_the_peer_lacks_one(folder: Path, peer: ExpertServer) -> None:
    from_disk, _ = load(folder)
    copied, num_copied = load(folder, peer.endpoint)
    assert copied.digest == from_disk.digest
    assert num_copied >= 3  # expert 3 is not hosted there, and what follows is read


def test_a_peer_that_is_gone_costs_nothing_but_the_disk(folder: Path, peer: ExpertServer) -> None:
    expected, _ = load(folder)
    peer.stop(0)
    found, num_copied = load(folder, peer.endpoint)
    assert (found.digest, num_copied) == (expected.digest, 0)


def test_bytes_that_changed_since_the_peer_loaded_them_are_not_taken(folder: Path, peer: ExpertServer) -> None:
    """Its file was overwritten: what it gives is not what it serves."""
    before, _ = load(folder)
    copy = folder.with_name("copy")
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    with Checkpoint(folder) as checkpoint:
        info = checkpoint.info("model.layers.1.mlp.experts.0.up_proj.weight")
    with (folder / info.file).open("r+b") as file:
        file.seek(info.offset)
        file.write(b"\x01" * 16)
    found, num_copied = load(copy, peer.endpoint)
    # Two are read at a time, and only one of them had changed.
    assert found.digest == before.digest and num_copied <= 1
