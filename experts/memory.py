"""How much memory this process may still take, so that too little is said before loading and not by the kernel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from experts.errors import NotEnoughMemory


def check_memory(needed_bytes: int, what: str, remedy: str, *, root: Path = Path("/")) -> None:
    """Raise NotEnoughMemory, with both numbers, if needed_bytes will not fit.

    root: where /proc and /sys lie. Does nothing on a system that does not say what is available.
    """
    refuse_too_little(needed_bytes, get_available_bytes(root), what, remedy)


def refuse_too_little(
    needed_bytes: int, available_bytes: int | None, what: str, remedy: str, *, place: str = ""
) -> None:
    """Raise NotEnoughMemory if available_bytes are fewer; None means that nobody knows, and nothing is refused.

    place: where the memory is, as " on cuda:0"; empty for this machine's.
    """
    if available_bytes is not None and needed_bytes > available_bytes:
        raise NotEnoughMemory(
            f"{what} need {needed_bytes / 1e9:.2f} GB of memory{place}, "
            f"{available_bytes / 1e9:.2f} GB are available ({remedy})"
        )


def get_available_bytes(root: Path = Path("/")) -> int | None:
    """The least of what the machine and every control group above this process have left; None if unknown."""
    limits = [*_list_machine_limits(root), *_list_cgroup_limits(root)]
    return max(0, min(limits)) if limits else None


def _list_machine_limits(root: Path) -> Iterator[int]:
    for line in _read_text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _list_cgroup_limits(root: Path) -> Iterator[int]:
    """Limit minus use of each memory control group, version 2 or 1. Page cache counts as free: it is given back."""
    for line in _read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, limit_name, use_name, cache_name = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, limit_name, use_name, cache_name = (
                "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file",
            )  # fmt: skip
        else:
            continue
        folder = root / mount / path.lstrip("/")
        while folder.is_relative_to(root / mount):
            limit, use = _read_text(folder / limit_name).strip(), _read_text(folder / use_name).strip()
            if limit.isdecimal() and use.isdecimal():
                cache = dict(line.split() for line in _read_text(folder / "memory.stat").splitlines())
                yield int(limit) - int(use) + int(cache.get(cache_name, 0))
            folder = folder.parent


def _read_text(path: Path) -> str:
    """The content; empty if there is no such file or it may not be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
