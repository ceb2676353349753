"""The committed stubs are what the protos generate."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ("experts/v1/experts.proto", "router/v1/router.proto")


@pytest.mark.parametrize("proto", PROTOS)
def test_committed_stubs_equal_regenerated_ones(proto: str, tmp_path: Path):
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}"]
    command += [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    subprocess.run([*command, str(ROOT / "proto" / proto)], check=True, timeout=60)

    generated = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.py*"))

    assert len(generated) == 3
    for path in generated:
        assert (ROOT / path).read_text() == (tmp_path / path).read_text(), f"{path} is stale: run `make proto`"
