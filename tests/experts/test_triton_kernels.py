"""The Triton kernels against the reference, without a GPU: runs triton_cases.py under Triton's interpreter.

In a process of its own, because triton reads TRITON_INTERPRET when it is first imported, and the compiler's tests of
the same run need it unset.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton has no build for this platform")


def test_cases_under_the_interpreter() -> None:
    cases = Path(__file__).with_name("triton_cases.py")
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(cases)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=110,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout
