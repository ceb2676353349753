"""The digests of everything that the image installs from a package index: requirements.hashes.

    python -m deploy.locked_hashes write     from what pip would install now, by requirements.lock
    python -m deploy.locked_hashes audit     `make audit`

requirements.lock says versions, for every machine; digests are those of one platform's files (Linux on x86-64, CPython
3.11, as the image's), so they are a file of their own, and `make setup` does without. torch has none: each build of it
(CPU, CUDA 12.x) is another file from another index, and an administrator's choice.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
LOCK = REPOSITORY / "requirements.lock"
HASHES = REPOSITORY / "requirements.hashes"
EXTRAS = "gpu,object-store,postgres,trace"
UNHASHED = frozenset({"torch", "shoal"})
_HEAD = """\
# Digests of what the image installs, for Linux on x86-64 and CPython 3.11, but torch; written by
# `python -m deploy.locked_hashes write`.
"""
_LINE = re.compile(r"(?P<name>[a-z0-9-]+)==(?P<version>\S+) --hash=sha256:(?P<digest>[0-9a-f]{64})")
_PIP = (sys.executable, "-m", "pip")


class Locked(NamedTuple):
    version: str
    digest: str


def read_hashes(text: str) -> dict[str, Locked]:
    """By normalised name. Raises ValueError for a line that is no pinned requirement with one digest."""
    found: dict[str, Locked] = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"no requirement with a digest: {line!r}")
        found[match["name"]] = Locked(match["version"], match["digest"])
    return found


def read_lock(text: str) -> dict[str, str]:
    """Versions by normalised name."""
    pairs = (line.split("==") for line in text.splitlines() if "==" in line and not line.startswith("#"))
    return {normalise(name): version.strip() for name, version in pairs}


def normalise(name: str) -> str:
    """https://packaging.python.org/en/latest/specifications/name-normalization/"""
    return re.sub(r"[-_.]+", "-", name).lower()


def write_hashes(report: Mapping[str, Any]) -> str:
    """report: of `pip install --report`."""
    lines = {
        normalise(item["metadata"]["name"]): (item["metadata"]["version"], item["download_info"])
        for item in report["install"]
    }
    return _HEAD + "".join(
        f"{name}=={version} --hash=sha256:{source['archive_info']['hashes']['sha256']}\n"
        for name, (version, source) in sorted(lines.items())
        if name not in UNHASHED
    )


def find_differences(hashes: Mapping[str, Locked], lock: Mapping[str, str]) -> list[str]:
    """Between the two files: what has a digest is locked, too, as other platforms go by the lock alone."""
    return [
        f"{name}: {locked.version} has a digest, and requirements.lock says {lock.get(name, 'nothing')}"
        for name, locked in hashes.items()
        if lock.get(name) != locked.version
    ]


def judge_audit(report: Mapping[str, Any], expected: frozenset[str]) -> list[str]:
    """What is wrong by a JSON report of pip-audit, which skips what it could not look up and calls that a success: here
    it is a failure."""
    found = {normalise(each["name"]): each for each in report["dependencies"]}
    unknown = sorted(name for name in expected if name not in found or "skip_reason" in found[name])
    problems = [
        f"{name} {each['version']}: {found_one['id']}, mended in {', '.join(found_one['fix_versions']) or 'no version'}"
        for name, each in sorted(found.items())
        for found_one in each.get("vulns", ())
    ]
    if unknown:
        problems.append(
            f"not audited: the vulnerability database did not answer for {len(unknown)} of {len(expected)} packages "
            f"({', '.join(unknown[:3])}, ...)"
        )
    return problems


def audit() -> list[str]:
    hashes, lock = read_hashes(HASHES.read_text()), read_lock(LOCK.read_text())
    problems = find_differences(hashes, lock)
    with tempfile.TemporaryDirectory() as folder:
        print(f"comparing {len(hashes)} files of the index with their digests", flush=True)
        command = [*_PIP, "download", "--quiet", "--require-hashes", "--no-deps", "--dest", folder]
        done = subprocess.run([*command, "--requirement", str(HASHES)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            problems.append(f"the index has other files than were locked, or none:\n{done.stderr.strip()[-2000:]}")
        print(f"asking the vulnerability database for {len(lock)} packages", flush=True)
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text("".join(f"{name}=={version}\n" for name, version in sorted(lock.items())))
        command = [
            sys.executable,
            "-m",
            "pip_audit",
            "--disable-pip",
            "--no-deps",
            "--format",
            "json",
            "--timeout",
            "15",
        ]
        done = subprocess.run(
            [*command, "--requirement", str(requirements), "--progress-spinner", "off"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    try:
        return problems + judge_audit(json.loads(done.stdout), frozenset(lock))
    except ValueError:
        return [*problems, f"not audited: {(done.stderr.strip().splitlines() or ['pip-audit said nothing'])[-1][:500]}"]


def main() -> int:
    if sys.argv[1:] == ["write"]:
        with tempfile.NamedTemporaryFile(suffix=".json") as report:
            command = [*_PIP, "install", "--quiet", "--dry-run", "--ignore-installed", "--report", report.name]
            subprocess.run([*command, "--constraint", str(LOCK), f"{REPOSITORY}[{EXTRAS}]"], check=True)
            HASHES.write_text(write_hashes(json.loads(Path(report.name).read_text())))
        return 0
    if sys.argv[1:] != ["audit"]:
        print(__doc__, file=sys.stderr)
        return 2
    problems = audit()
    for problem in problems:
        print(f"audit: {problem}", file=sys.stderr)
    print(f"audit: {'failed' if problems else 'nothing found'}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
