"""What the checkpoint's publisher recommends holds where a request does not say."""

import json
from pathlib import Path

import pytest

from experts.errors import ConfigError
from router.api.sampling_defaults import SamplingDefaults


def write(folder: Path, **fields: object) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return folder


def test_without_the_file_the_distribution_is_plain(tmp_path: Path) -> None:
    assert SamplingDefaults.from_checkpoint(tmp_path) == SamplingDefaults(1.0, 1.0, 0)


def test_the_recommended_values_are_read(tmp_path: Path) -> None:
    folder = write(tmp_path, temperature=0.6, top_p=0.95, top_k=40, do_sample=True)
    assert SamplingDefaults.from_checkpoint(folder) == SamplingDefaults(0.6, 0.95, 40)


def test_a_model_published_without_sampling_is_greedy(tmp_path: Path) -> None:
    assert SamplingDefaults.from_checkpoint(write(tmp_path, do_sample=False, temperature=0.6)).temperature == 0.0


@pytest.mark.parametrize("fields", [{"temperature": -1}, {"top_p": 2}, {"top_k": "40"}, {"temperature": True}])
def test_nonsense_is_refused_by_name(tmp_path: Path, fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        SamplingDefaults.from_checkpoint(write(tmp_path, **fields))
