"""requirements.hashes says what requirements.lock says, and an audit that did not take place is none."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest

from deploy.locked_hashes import (
    EXTRAS,
    HASHES,
    LOCK,
    REPOSITORY,
    UNHASHED,
    Locked,
    find_differences,
    judge_audit,
    normalise,
    read_hashes,
    read_lock,
    write_hashes,
)


def test_every_dependency_of_the_product_has_a_digest_of_the_locked_version() -> None:
    hashes, lock = read_hashes(HASHES.read_text()), read_lock(LOCK.read_text())
    assert find_differences(hashes, lock) == []
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(each for name in EXTRAS.split(",") for each in extras[name])]
    names = {normalise(re.split(r"[\[<>=;, ]", requirement)[0]) for requirement in wanted}
    assert names - UNHASHED <= set(hashes)
    assert not UNHASHED & set(hashes)


def test_the_image_installs_by_digest() -> None:
    dockerfile = (REPOSITORY / "deploy" / "Dockerfile").read_text()
    assert "--require-hashes --no-deps" in dockerfile
    installed = {name for line in re.findall(r"extras=([^;\n]+)", dockerfile) for name in re.findall(r"[a-z-]+", line)}
    assert "object-store" in installed and installed - {"extras"} <= set(EXTRAS.split(","))


def test_other_versions_and_broken_lines_are_found() -> None:
    assert find_differences({"a": Locked("1", "0" * 64), "b": Locked("2", "0" * 64)}, {"a": "1.1"}) != []
    for line in ("a==1", "a==1 --hash=sha256:00", "a>=1 --hash=sha256:" + "0" * 64, "--index-url x"):
        with pytest.raises(ValueError, match="no requirement"):
            read_hashes(line)


def test_a_report_of_pip_becomes_what_is_read_again() -> None:
    def item(name: str) -> dict[str, Any]:
        source = {"url": "x", "archive_info": {"hashes": {"sha256": "ab" * 32}}}
        return {"metadata": {"name": name, "version": "1.0"}, "download_info": source}

    text = write_hashes({"install": [item("Proto_Plus"), item("torch"), item("Jinja2")]})
    assert read_hashes(text) == dict.fromkeys(("jinja2", "proto-plus"), Locked("1.0", "ab" * 32))


def test_what_could_not_be_looked_up_is_a_failure() -> None:
    known: dict[str, Any] = {"name": "A", "version": "1", "vulns": []}
    assert judge_audit({"dependencies": [known]}, frozenset({"a"})) == []
    skipped = {"name": "b", "skip_reason": "not found"}
    assert "1 of 2 packages (b" in judge_audit({"dependencies": [known, skipped]}, frozenset({"a", "b"}))[0]
    assert "not audited" in judge_audit({"dependencies": []}, frozenset({"a"}))[0]
    vulnerable = {**known, "vulns": [{"id": "GHSA-x", "fix_versions": ["1.1"]}]}
    assert judge_audit({"dependencies": [vulnerable]}, frozenset({"a"})) == ["a 1: GHSA-x, mended in 1.1"]
