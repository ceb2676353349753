"""Too little memory is said before loading, with the numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from experts import weights
from experts.checkpoint import Checkpoint
from experts.errors import NotEnoughMemory
from experts.expert_range import split_experts
from experts.memory import check_memory, get_available_bytes


def write_files(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


MACHINE = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n"}


def test_without_control_groups_the_machine_counts(tmp_path: Path) -> None:
    assert get_available_bytes(write_files(tmp_path, MACHINE)) == 8000 * 1024


def test_the_tightest_control_group_above_the_process_counts(tmp_path: Path) -> None:
    files = {
        **MACHINE,
        "proc/self/cgroup": "0::/pod/container\n",
        "sys/fs/cgroup/pod/memory.max": "5000000",
        "sys/fs/cgroup/pod/memory.current": "3000000",
        "sys/fs/cgroup/pod/memory.stat": "anon 1\ninactive_file 500000\n",
        "sys/fs/cgroup/pod/container/memory.max": "max",
        "sys/fs/cgroup/pod/container/memory.current": "1000",
    }
    assert get_available_bytes(write_files(tmp_path, files)) == 2_500_000


def test_version_1_control_groups_count_too(tmp_path: Path) -> None:
    files = {
        **MACHINE,
        "proc/self/cgroup": "5:cpu:/a\n4:memory:/a\n",
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "4000000",
        "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "1000000",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000000",
    }
    assert get_available_bytes(write_files(tmp_path, files)) == 3_000_000


def test_nothing_is_refused_where_nothing_is_known(tmp_path: Path) -> None:
    assert get_available_bytes(tmp_path) is None
    check_memory(10**15, "weights", "remedy", root=tmp_path)


def test_refuses_with_both_numbers_and_the_remedy(tmp_path: Path) -> None:
    root = write_files(tmp_path, {"proc/meminfo": "MemAvailable: 2000000 kB\n"})
    check_memory(2_000_000_000, "weights", "use more groups", root=root)
    with pytest.raises(NotEnoughMemory) as caught:
        check_memory(3_000_000_000, "weights", "use more groups", root=root)
    assert str(caught.value) == "weights need 3.00 GB of memory, 2.05 GB are available (use more groups)"


def test_loading_asks_before_it_reads(fp8_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    asked: list[int] = []

    def refuse(device: torch.device, needed_bytes: int, what: str, remedy: str) -> None:
        asked.append(needed_bytes)
        raise NotEnoughMemory(what)

    monkeypatch.setattr(weights, "check_device_memory", refuse)
    monkeypatch.setattr(fp8_checkpoint, "read_into", None)
    with pytest.raises(NotEnoughMemory):
        weights.load_expert_weights(fp8_checkpoint, split_experts(fp8_checkpoint.config, 1)[0], torch.bfloat16)
    # 3 layers x 8 experts x 3 matrices of 192 x 160, a byte each if the kernel keeps FP8
    assert asked[0] >= 3 * 8 * 3 * 192 * 160
