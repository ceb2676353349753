"""The controller's ServiceAccount, Role and RoleBinding as the chart renders them for the release `shoal`."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

_CHART = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "shoal"
_NAME = "shoal-controller"


def render_account(namespace: str) -> list[dict[str, Any]]:
    return [
        document
        for document in yaml.safe_load_all(_render(namespace))
        if document["kind"] in ("ServiceAccount", "Role", "RoleBinding") and document["metadata"]["name"] == _NAME
    ]


@functools.cache
def _render(namespace: str) -> str:
    helm = Path(sys.executable).with_name("helm")
    command = [str(helm), "template", "shoal", str(_CHART), "--namespace", namespace]
    result = subprocess.run(
        [*command, "--show-only", "templates/access.yaml"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
