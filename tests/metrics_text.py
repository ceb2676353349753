"""What a /metrics page says, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


@dataclass(frozen=True)
class Scrape:
    """One page. types: of families, by name."""

    samples: tuple[Sample, ...]
    types: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> Scrape:
        families = list(text_string_to_metric_families(text))
        samples = tuple(sample for family in families for sample in family.samples)
        return cls(samples, {family.name: family.type for family in families})

    def get(self, name: str, **labels: str) -> float:
        """The sum of the samples with this name and these labels. Raises LookupError if there is none."""
        found = [
            sample.value for sample in self.samples if sample.name == name and labels.items() <= sample.labels.items()
        ]
        if not found:
            raise LookupError(f"no sample {name} {labels}")
        return sum(found)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(sample.name for sample in self.samples)
