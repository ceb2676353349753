"""A checkpoint that cannot be served: exit code 1 and one clear line that names the file and the tensor.

Every program is told about a tensor of its own: an expert group never reads attention, a router never reads experts.
Processes take seconds on a busy machine: tests/experts tries every damage on `python -m experts` in its own process,
so that program is only sampled here.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.cli import main as shoal
from tests.local_stack import HOST, run_to_end
from tests.random_checkpoint import read_tensors, rewrite_tensors, write_random_checkpoint

RUN_TIMEOUT_S = 60.0
LFS_POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 4302384\n"
)

# Program, its arguments after the folder, and a tensor that it has to read.
PROGRAMS = {
    "experts": (["--experts", "0:16", "--host", HOST], "model.layers.2.mlp.experts.3.up_proj.weight"),
    "router": (["--host", HOST], "model.layers.2.self_attn.o_proj.weight"),
}

Damage = Callable[[Path, str], Sequence[str]]


def remove_shard(folder: Path, tensor: str) -> Sequence[str]:
    (folder / shard_of(folder, tensor)).unlink()
    return [shard_of(folder, tensor), first_tensor_of(folder, shard_of(folder, tensor))]


def truncate_shard(folder: Path, tensor: str) -> Sequence[str]:
    path = folder / shard_of(folder, tensor)
    with path.open("r+b") as shard:
        shard.truncate(path.stat().st_size - 1000)
    return [path.name, "model.layers."]


def replace_shard_by_lfs_pointer(folder: Path, tensor: str) -> Sequence[str]:
    path = folder / shard_of(folder, tensor)
    path.write_text(LFS_POINTER)
    return [path.name, "LFS", first_tensor_of(folder, path.name)]


def drop_tensor(folder: Path, tensor: str) -> Sequence[str]:
    """From file and index: the folder is consistent but incomplete."""
    tensors = read_tensors(folder)
    del tensors[tensor], tensors[f"{tensor}_scale_inv"]
    rewrite_tensors(folder, tensors)
    return [tensor]


def drop_tensor_from_its_shard(folder: Path, tensor: str) -> Sequence[str]:
    """From the file only: the index still promises it."""
    path = folder / shard_of(folder, tensor)
    tensors = load_file(path)
    del tensors[tensor]
    save_file(tensors, path)
    return [tensor, path.name]


def drop_scale(folder: Path, tensor: str) -> Sequence[str]:
    tensors = read_tensors(folder)
    del tensors[f"{tensor}_scale_inv"]
    rewrite_tensors(folder, tensors)
    return [f"{tensor}_scale_inv"]


def reshape_tensor(folder: Path, tensor: str) -> Sequence[str]:
    tensors = read_tensors(folder)
    tensors[tensor] = tensors[tensor][:-1].contiguous()
    rewrite_tensors(folder, tensors)
    return [tensor, shard_of(folder, tensor)]


def reshape_scale(folder: Path, tensor: str) -> Sequence[str]:
    tensors = read_tensors(folder)
    tensors[f"{tensor}_scale_inv"] = torch.ones(7, 7)
    rewrite_tensors(folder, tensors)
    return [f"{tensor}_scale_inv", shard_of(folder, f"{tensor}_scale_inv")]


def name_unknown_model_type(folder: Path, tensor: str) -> Sequence[str]:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "mixtral"}))
    return ["config.json", "model_type", "mixtral", "deepseek_v3", "deepseek_v2"]


DAMAGES: list[Damage] = [
    remove_shard,
    truncate_shard,
    replace_shard_by_lfs_pointer,
    drop_tensor,
    drop_tensor_from_its_shard,
    drop_scale,
    reshape_tensor,
    reshape_scale,
    name_unknown_model_type,
]


class Outcome(NamedTuple):
    """How a program ended, and the words that its message owes the user."""

    ended: subprocess.CompletedProcess[str]
    expected: Sequence[str]


CASES: list[tuple[str, Damage]] = [
    *(("router", damage) for damage in DAMAGES),
    *(("experts", damage) for damage in (remove_shard, truncate_shard, drop_scale, name_unknown_model_type)),
]


@pytest.fixture(scope="module")
def sound_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "checkpoint"
    write_random_checkpoint(folder, fp8=True, shards=2)
    return folder


@pytest.fixture(scope="module")
def outcomes(sound_checkpoint: Path) -> dict[tuple[str, Damage], Outcome]:
    """Every case, two processes at a time."""

    def run(case: tuple[str, Damage]) -> Outcome:
        program, damage = case
        arguments, tensor = PROGRAMS[program]
        folder = sound_checkpoint.parent / f"{program}-{damage.__name__}"
        shutil.copytree(sound_checkpoint, folder)
        expected = damage(folder, tensor)
        return Outcome(run_to_end([program, "--checkpoint", str(folder), *arguments], RUN_TIMEOUT_S), expected)

    with ThreadPoolExecutor(2) as threads:
        return dict(zip(CASES, threads.map(run, CASES), strict=True))


@pytest.mark.parametrize(
    ("program", "damage"), CASES, ids=[f"{program}-{damage.__name__}" for program, damage in CASES]
)
def test_a_program_ends_with_one_clear_line_and_exit_code_1(
    outcomes: dict[tuple[str, Damage], Outcome], program: str, damage: Damage
) -> None:
    ended, expected = outcomes[program, damage]

    assert ended.returncode == 1, ended.stderr
    assert ended.stdout == ""
    lines = [line for line in ended.stderr.splitlines() if not is_log_line(line)]
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith("error: ")
    assert_names(lines[0], expected)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_shoal_check_names_it_and_returns_1(
    sound_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Damage
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(sound_checkpoint, folder)
    expected = damage(folder, PROGRAMS["experts"][1])

    assert shoal(["check", str(folder), "--groups", "2"]) == 1

    printed = capsys.readouterr()
    lines = (printed.out + printed.err).splitlines()
    assert_names(next((line for line in lines if all(word in line for word in expected)), str(lines)), expected)


def test_shoal_check_accepts_the_undamaged_folder(sound_checkpoint: Path) -> None:
    assert shoal(["check", str(sound_checkpoint), "--groups", "2"]) == 0


def assert_names(line: str, expected: Sequence[str]) -> None:
    for word in expected:
        assert word in line
    assert re.search(r"[\w.-]+\.(safetensors|json)", line), f"no file is named: {line}"


def is_log_line(line: str) -> bool:
    return re.match(r"\d{4}-\d\d-\d\d ", line) is not None


def first_tensor_of(folder: Path, shard: str) -> str:
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return next(name for name, file in weight_map.items() if file == shard)


def shard_of(folder: Path, tensor: str) -> str:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][tensor]
