"""What `python -m router` makes of its arguments."""

from __future__ import annotations

import pytest

from experts.wire import WireFormat
from router.__main__ import parse_arguments


def test_activations_travel_as_bfloat16_unless_told_otherwise() -> None:
    config, *_ = parse_arguments(["--checkpoint", "folder"])
    assert config.wire_format is WireFormat.BFLOAT16


@pytest.mark.parametrize("name", ["bfloat16", "float32", "fp8", "fp8-both"])
def test_every_wire_format_has_its_name(name: str) -> None:
    config, *_ = parse_arguments(["--checkpoint", "folder", "--wire-dtype", name])
    assert config.wire_format.value == name


def test_an_unknown_wire_format_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--checkpoint", "folder", "--wire-dtype", "int8"])
    assert "fp8-both" in capsys.readouterr().err
