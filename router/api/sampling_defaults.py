"""How a request is sampled where it does not say: as the checkpoint's publisher recommends.

generation_config.json may name a temperature, top_p and top_k (DeepSeek-R1: 0.6 and 0.95). A model answers badly far
from them, and most clients send none. Fields of the request always win.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experts.errors import ConfigError
from experts.model_config import load_json_object

FILE = "generation_config.json"


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """temperature 0 is greedy; top_p 1 and top_k 0 keep every token."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    @staticmethod
    def from_checkpoint(folder: Path) -> SamplingDefaults:
        """Read generation_config.json; without it, the plain distribution. Raises ConfigError naming the field."""
        path = folder / FILE
        if not path.exists():
            return SamplingDefaults()
        fields = load_json_object(path)
        if fields.get("do_sample") is False:
            return SamplingDefaults(temperature=0.0)
        return SamplingDefaults(
            temperature=_number(fields, "temperature", 1.0, 2.0),
            top_p=_number(fields, "top_p", 1.0, 1.0),
            top_k=int(_number(fields, "top_k", 0, 2**31 - 1)),
        )


def _number(fields: Mapping[str, Any], name: str, default: float, maximum: float) -> float:
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= maximum:
        raise ConfigError(f"{FILE}: {name} must be a number from 0 to {maximum:g}")
    return value
