"""The controller's ServiceAccount, Role and RoleBinding as the chart renders them for the release `shoal`."""

from __future__ import annotations

import functools
from typing import Any

import yaml

from tests.kubernetes.chart import CHART, run_helm

_NAME = "shoal-controller"


def render_account(namespace: str) -> list[dict[str, Any]]:
    return [
        document
        for document in yaml.safe_load_all(_render(namespace))
        if document["kind"] in ("ServiceAccount", "Role", "RoleBinding") and document["metadata"]["name"] == _NAME
    ]


@functools.cache
def _render(namespace: str) -> str:
    where = ("template", "shoal", str(CHART), "--namespace", namespace, "--kube-version", "1.30.0")
    return run_helm(*where, "--show-only", "templates/access.yaml")
