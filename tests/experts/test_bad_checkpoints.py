"""Each damage gives one clear line that names file and tensor: from the loader, the process and the check alike."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from experts.__main__ import main
from experts.check import check_checkpoint
from experts.checkpoint import Checkpoint
from experts.errors import ExpertsError
from experts.expert_range import split_experts
from experts.weights import load_expert_weights
from tests.random_checkpoint import read_tensors, rewrite_tensors

EXPERT = "model.layers.1.mlp.experts.3"
SHARD = "model-00001-of-00002.safetensors"


def remove_shard(folder: Path) -> None:
    (folder / SHARD).unlink()


def truncate_file(folder: Path) -> None:
    path = folder / SHARD
    os.truncate(path, path.stat().st_size - 100)


def extend_file(folder: Path) -> None:
    with (folder / SHARD).open("ab") as file:
        file.write(b"more")


def write_lfs_pointer(folder: Path) -> None:
    (folder / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n")


def remove_tensor(folder: Path) -> None:
    tensors = read_tensors(folder)
    del tensors[f"{EXPERT}.up_proj.weight"], tensors[f"{EXPERT}.up_proj.weight_scale_inv"]
    rewrite_tensors(folder, tensors)


def misplace_tensor(folder: Path) -> None:
    """Let the index name the other file."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    place = index["weight_map"][f"{EXPERT}.up_proj.weight"]
    index["weight_map"][f"{EXPERT}.up_proj.weight"] = SHARD if place != SHARD else SHARD.replace("00001", "00002", 1)
    path.write_text(json.dumps(index))


def remove_scale(folder: Path) -> None:
    tensors = read_tensors(folder)
    del tensors[f"{EXPERT}.up_proj.weight_scale_inv"]
    rewrite_tensors(folder, tensors)


def reshape_tensor(folder: Path) -> None:
    tensors = read_tensors(folder)
    tensors[f"{EXPERT}.up_proj.weight"] = tensors[f"{EXPERT}.up_proj.weight"][:-1].contiguous()
    rewrite_tensors(folder, tensors)


def reshape_scale(folder: Path) -> None:
    tensors = read_tensors(folder)
    tensors[f"{EXPERT}.up_proj.weight_scale_inv"] = torch.ones(1, 1)
    rewrite_tensors(folder, tensors)


def change_dtype(folder: Path) -> None:
    tensors = read_tensors(folder)
    tensors[f"{EXPERT}.up_proj.weight"] = tensors[f"{EXPERT}.up_proj.weight"].view(torch.int8)
    rewrite_tensors(folder, tensors)


def change_model_type(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "gpt_oss"}))


def remove_quantization_config(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))


def remove_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def break_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")


@dataclass(frozen=True)
class Damage:
    """inflict: what to do to the folder. words: what the one line must contain."""

    inflict: Callable[[Path], None]
    words: tuple[str, ...]


DAMAGES = [
    Damage(remove_shard, (SHARD, "missing from", "download")),
    Damage(truncate_file, (SHARD, "tensor ", "is truncated", "download")),
    Damage(extend_file, (SHARD, "its header accounts for")),
    Damage(write_lfs_pointer, (SHARD, "is a Git LFS pointer", "git lfs pull")),
    Damage(remove_tensor, ("model.safetensors.index.json", f"tensor {EXPERT}.up_proj.weight: ", "is in no file")),
    Damage(misplace_tensor, ("model-0", f"tensor {EXPERT}.up_proj.weight: ", "missing from this file")),
    Damage(
        remove_scale,
        (
            "model.safetensors.index.json",
            f"tensor {EXPERT}.up_proj.weight_scale_inv: ",
            f"{EXPERT}.up_proj.weight in model-0",
            "needs its scales",
        ),
    ),
    Damage(reshape_tensor, ("model-0", f"tensor {EXPERT}.up_proj.weight: ", "has shape [159, 192]", "[160, 192]")),
    Damage(reshape_scale, ("model-0", f"tensor {EXPERT}.up_proj.weight_scale_inv: ", "has shape [1, 1]", "[2, 2]")),
    Damage(change_dtype, ("model-0", f"tensor {EXPERT}.up_proj.weight: ", "has dtype I8; supported:")),
    Damage(change_model_type, ("config.json", 'model_type is "gpt_oss"', "deepseek_v3")),
    Damage(remove_quantization_config, ("model-0", "tensor ", "is FP8, but config.json has no quantization_config")),
    Damage(remove_index, ("neither model.safetensors.index.json nor model.safetensors",)),
    Damage(break_index, ("model.safetensors.index.json: is not valid JSON",)),
]
each_damage = pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.inflict.__name__)


@each_damage
def test_loading_raises_one_line(broken_folder: Path, damage: Damage) -> None:
    damage.inflict(broken_folder)
    with pytest.raises(ExpertsError) as caught, Checkpoint(broken_folder) as checkpoint:
        load_expert_weights(checkpoint, split_experts(checkpoint.config, 1)[0], torch.bfloat16)
    assert "\n" not in str(caught.value)
    for word in damage.words:
        assert word in str(caught.value)


@each_damage
def test_check_names_it(broken_folder: Path, damage: Damage) -> None:
    damage.inflict(broken_folder)
    report = check_checkpoint(broken_folder)
    assert not report.ok
    assert any(all(word in problem for word in damage.words) for problem in report.problems), report.to_text()
    assert not any("\n" in problem for problem in report.problems)


@pytest.mark.usefixtures("restore_signals")
@each_damage
def test_the_program_prints_one_line_and_returns_1(
    broken_folder: Path, damage: Damage, capfd: pytest.CaptureFixture[str]
) -> None:
    damage.inflict(broken_folder)
    assert main(["--checkpoint", str(broken_folder), "--log-level", "error"]) == 1
    output, errors = capfd.readouterr()
    assert output == ""
    (line,) = errors.splitlines()
    assert line.startswith("error: ")
    for word in damage.words:
        assert word in line
