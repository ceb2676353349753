"""What documents, comments and docstrings name is there: a file that is renamed takes its mentions along."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
_FOLDERS = ("cluster", "deploy", "docs", "experts", "proto", "router", "tests")
_READ = {".cpp", ".h", ".inc", ".js", ".md", ".proto", ".py", ".toml", ".tpl", ".yaml"}
# Where names begin: at the root, in the folder of the kernel, and as protoc is told.
_ROOTS = (REPOSITORY, REPOSITORY / "experts" / "kernels", REPOSITORY / "proto")
_NAMED = re.compile(
    rf"(?<![\w/.-])(?:{'|'.join((*_FOLDERS, 'cpu'))})(?:/[\w.-]+)*/[\w-]+\.(?:cpp|h|inc|md|proto|py|tpl|yaml)\b"
)


def list_texts() -> Iterator[Path]:
    yield from (REPOSITORY / name for name in ("README.md", "Makefile", "pyproject.toml", "deploy/Dockerfile"))
    for folder in _FOLDERS:
        yield from (path for path in (REPOSITORY / folder).rglob("*") if path.suffix in _READ)


def test_every_file_that_is_named_exists() -> None:
    named = {
        (str(path.relative_to(REPOSITORY)), match[0])
        for path in list_texts()
        for match in _NAMED.finditer(path.read_text(encoding="utf-8"))
    }
    assert len({name for _, name in named}) > 50
    assert {each for each in named if not any((root / each[1]).is_file() for root in _ROOTS)} == set()
