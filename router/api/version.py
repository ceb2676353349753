"""Which Shoal this is."""

from __future__ import annotations

import importlib.metadata


def find_version() -> str:
    """The installed version; "unknown" when run from a checkout that is not installed."""
    try:
        return importlib.metadata.version("shoal")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
