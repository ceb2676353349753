"""`check_checkpoint`: what loading alone would not notice, and the sizes it reports."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experts import check
from experts.check import check_checkpoint
from tests.random_checkpoint import read_tensors, rewrite_tensors, write_random_checkpoint

EXPERT = "model.layers.1.mlp.experts.3"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shards": 1},
        {"fp8": True, "num_nextn_predict_layers": 1},
        {"fp8": True, "num_nextn_predict_layers": 1, "mtp_copies": False},
        {"fp8": True, "ue8m0": True, "scale_dtype": torch.float8_e8m0fnu},
        {"model_type": "deepseek_v2"},
        {"tie_word_embeddings": True},
        {"n_shared_experts": None},
    ],
    ids=str,
)
def test_a_sound_checkpoint_has_no_problem(tmp_path: Path, options: dict[str, Any]) -> None:
    write_random_checkpoint(tmp_path, **options)
    report = check_checkpoint(tmp_path)
    assert report.problems == [] and report.notes == [] and report.ok


def test_sizes_add_up_to_the_files(fp8_folder: Path) -> None:
    report = check_checkpoint(fp8_folder, num_groups=3)
    tensors = read_tensors(fp8_folder)
    assert report.trunk is not None
    parts = [report.trunk, *report.groups]
    assert sum(part.stored_bytes for part in parts) == sum(tensor.nbytes for tensor in tensors.values())
    num_parameters = sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith("_scale_inv"))
    assert report.num_parameters == num_parameters
    assert sum(part.bf16_bytes for part in parts) == 2 * num_parameters
    assert [part.name for part in report.groups] == [
        "group 0 (experts 0:2)",
        "group 1 (experts 2:5)",
        "group 2 (experts 5:8)",
    ]


def test_headers_alone_give_the_same_report_of_a_sound_checkpoint(fp8_folder: Path) -> None:
    assert check_checkpoint(fp8_folder, read_values=False) == check_checkpoint(fp8_folder)


def test_headers_alone_show_what_is_missing_but_no_values(broken_folder: Path) -> None:
    tensors = read_tensors(broken_folder)
    _set_nan_in_bf16(tensors)
    del tensors[f"{EXPERT}.up_proj.weight_scale_inv"]
    rewrite_tensors(broken_folder, tensors, shards=1)
    (problem,) = check_checkpoint(broken_folder, read_values=False).problems
    assert f"{EXPERT}.up_proj.weight_scale_inv: is in no file" in problem


def _set_nan_in_fp8(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{EXPERT}.up_proj.weight"].view(torch.uint8)[3, 5:7] = torch.tensor([0x7F, 0xFF], dtype=torch.uint8)


def _set_nan_in_bf16(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NORM][1] = float("nan")


def _set_infinity_in_fp32(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.gate.e_score_correction_bias"][0] = float("inf")


def _set_scale(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def set_scale(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{EXPERT}.up_proj.weight_scale_inv"][1, 0] = value

    return set_scale


def _remove_weight_of_a_scale(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{EXPERT}.up_proj.weight"]


def _store_weight_plain(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{EXPERT}.up_proj.weight"] = tensors[f"{EXPERT}.up_proj.weight"].to(torch.bfloat16)


def _remove_norm(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[NORM]


def _reshape_embedding(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-1].clone()


def _remove_mtp_layer(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("model.layers.3.")]:
        del tensors[name]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_set_nan_in_fp8, f"tensor {EXPERT}.up_proj.weight: 2 of 30720 values are NaN or infinite"),
        (_set_nan_in_bf16, f"tensor {NORM}: 1 of 192 values are NaN or infinite"),
        (_set_infinity_in_fp32, "tensor model.layers.1.mlp.gate.e_score_correction_bias: 1 of 8 values are NaN or"),
        (_set_scale(0.0), f"tensor {EXPERT}.up_proj.weight_scale_inv: 1 of 4 scales are zero or negative"),
        (_set_scale(-0.0), f"tensor {EXPERT}.up_proj.weight_scale_inv: 1 of 4 scales are zero or negative"),
        (_set_scale(-1.0), f"tensor {EXPERT}.up_proj.weight_scale_inv: 1 of 4 scales are zero or negative"),
        (_set_scale(float("nan")), f"tensor {EXPERT}.up_proj.weight_scale_inv: 1 of 4 values are NaN or infinite"),
        (_remove_weight_of_a_scale, f"tensor {EXPERT}.up_proj.weight_scale_inv: is a scale without a weight"),
        (_store_weight_plain, f"tensor {EXPERT}.up_proj.weight_scale_inv: is a scale, but {EXPERT}.up_proj.weight is"),
        (_remove_norm, f"tensor {NORM}: is in no file of the checkpoint"),
        (_reshape_embedding, "tensor model.embed_tokens.weight: has shape [319, 192], config.json demands [320, 192]"),
        (_remove_mtp_layer, "holds nothing of layer 3, the MTP layer that config.json announces"),
    ],
)
def test_a_damaged_tensor_is_the_one_problem(
    broken_folder: Path, damage: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    tensors = read_tensors(broken_folder)
    damage(tensors)
    rewrite_tensors(broken_folder, tensors, shards=1)
    problems = check_checkpoint(broken_folder).problems
    assert any(message in problem for problem in problems), problems
    # A scale that lost its weight is two problems: the scale, and the missing weight.
    assert len(problems) == (2 if damage is _remove_weight_of_a_scale else 1), problems


def test_all_problems_are_collected(broken_folder: Path) -> None:
    tensors = read_tensors(broken_folder)
    for damage in (_set_nan_in_fp8, _set_scale(0.0), _remove_norm, _reshape_embedding):
        damage(tensors)
    rewrite_tensors(broken_folder, tensors, shards=1)
    (broken_folder / "tokenizer.json").unlink()
    assert len(check_checkpoint(broken_folder).problems) == 5


def test_a_missing_file_is_one_problem_and_not_one_per_tensor(broken_folder: Path) -> None:
    (broken_folder / "model-00002-of-00002.safetensors").unlink()
    (problem,) = check_checkpoint(broken_folder).problems
    assert problem.startswith("model-00002-of-00002.safetensors: missing from")


def test_values_are_examined_in_pieces(fp8_folder: Path, monkeypatch: pytest.MonkeyPatch, broken_folder: Path) -> None:
    tensors = read_tensors(broken_folder)
    tensors["lm_head.weight"][-1, -1] = float("inf")
    tensors["model.embed_tokens.weight"][0, 0] = float("nan")
    rewrite_tensors(broken_folder, tensors, shards=1)
    monkeypatch.setattr(check, "_PIECE_BYTES", 64)
    assert check_checkpoint(fp8_folder).ok
    assert len(check_checkpoint(broken_folder).problems) == 2


def test_a_tensor_that_nobody_reads_is_a_note(broken_folder: Path) -> None:
    tensors = read_tensors(broken_folder)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    rewrite_tensors(broken_folder, tensors, shards=1)
    report = check_checkpoint(broken_folder)
    assert report.ok and len(report.notes) == 1 and "rotary_emb.inv_freq: nobody reads it" in report.notes[0]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "tokenizer.json: missing from"),
        ("tokenizer.json", "{}", "tokenizer.json: is no tokenizer"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n", "tokenizer.json: is a Git LFS pointer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: is not valid JSON"),
        ("tokenizer_config.json", None, "tokenizer_config.json: missing from"),
    ],
)
def test_tokenizer_files_are_examined(broken_folder: Path, file: str, content: str | None, message: str) -> None:
    (broken_folder / file).unlink()
    if content is not None:
        (broken_folder / file).write_text(content)
    (problem,) = check_checkpoint(broken_folder).problems
    assert problem.startswith(message)


def test_a_tokenizer_with_more_ids_than_the_embedding_is_a_problem(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, vocab_size=280)
    (problem,) = check_checkpoint(tmp_path).problems
    assert problem.startswith("tokenizer.json: token id ") and "vocab_size = 280" in problem


def test_too_many_groups_is_a_problem(fp8_folder: Path) -> None:
    (problem,) = check_checkpoint(fp8_folder, num_groups=9).problems
    assert problem == "cannot cut 8 routed experts into 9 expert groups"


def test_reports_render_as_text_and_json(fp8_folder: Path, tmp_path: Path) -> None:
    sound, broken = check_checkpoint(fp8_folder), check_checkpoint(tmp_path / "nowhere")
    assert sound.to_text().endswith("no problem found") and "trunk (each router)" in sound.to_text()
    assert broken.to_text().endswith("1 problem found")
    assert json.loads(sound.to_json())["ok"] is True and len(json.loads(sound.to_json())["groups"]) == 4
    assert json.loads(broken.to_json())["problems"] == broken.problems


def test_a_check_needs_no_torch(fp8_folder: Path) -> None:
    code = (
        "import sys; from experts.check import check_checkpoint; "
        f"assert check_checkpoint({str(fp8_folder)!r}).ok; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
