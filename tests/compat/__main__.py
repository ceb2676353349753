"""python -m tests.compat: runs the real clients and writes what works into docs/compatibility.md. `make compat`."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent
TABLE = FOLDER.parent.parent / "docs" / "compatibility.md"
CLIENTS = {
    "test_openai": ("openai-python", "openai"),
    "test_random_schemas": ("response_format json_schema, 200 random schemas", "llguidance"),
    "test_anthropic": ("anthropic", "anthropic"),
    "test_langchain": ("langchain-openai", "langchain-openai"),
    "test_lm_eval": ("lm-eval local-completions", "lm-eval"),
}
_BEGIN, _END = "<!-- table: make compat -->", "<!-- end of table -->"


@dataclass
class Recorder:
    """A pytest plugin. results: (module, test): whether it passed; None: skipped."""

    results: dict[tuple[str, str], bool | None] = field(default_factory=dict[tuple[str, str], bool | None])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        path, _, name = report.nodeid.partition("::")
        key = (Path(path).stem, name.partition("[")[0])
        if report.failed:
            self.results[key] = False
        elif report.when == "call" and report.passed:
            self.results.setdefault(key, True)
        elif report.skipped:
            self.results.setdefault(key, None)


def main() -> int:
    os.environ["SHOAL_TEST_SCHEMAS"] = "200"
    recorder = Recorder()
    status = pytest.main([str(FOLDER), "-q", "-p", "no:cacheprovider"], plugins=[recorder])
    before, _, rest = TABLE.read_text(encoding="utf-8").partition(_BEGIN)
    _, _, after = rest.partition(_END)
    TABLE.write_text(f"{before}{_BEGIN}\n{write_table(recorder.results)}{_END}{after}", encoding="utf-8")
    return int(status)


def write_table(results: dict[tuple[str, str], bool | None]) -> str:
    lines = ["| client | version | what was done | |", "|---|---|---|---|"]
    for (module, test), passed in results.items():
        client, package = CLIENTS[module]
        what = test.removeprefix("test_").replace("_", " ")
        result = {True: "works", False: "**fails**", None: "not run"}[passed]
        lines.append(f"| {client} | {_find_version(package)} | {what} | {result} |")
    return "\n".join(lines) + "\n"


def _find_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
