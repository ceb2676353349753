"""Triton's driver module of the image: built without a card, and found by Triton under the name that it looks for."""

from __future__ import annotations

import hashlib
import importlib.machinery
import shutil
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")

from triton.backends.nvidia import driver
from triton.runtime import build

from experts.kernels import triton_prebuilt


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to build with")
def test_the_driver_module_is_found_where_triton_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_CACHE_MANAGER", "experts.kernels.triton_prebuilt:PrebuiltCacheManager")
    monkeypatch.setattr(triton_prebuilt, "PREBUILT_FOLDER", tmp_path / "prebuilt")
    module = triton_prebuilt.build_driver_module(tmp_path / "prebuilt")
    assert module.suffixes[-1] in importlib.machinery.EXTENSION_SUFFIXES[-1]
    # The lookup of Triton's compile_module_from_src, which compiles only if this finds nothing.
    source = Path(driver.dirname, "driver.c").read_text()
    key = hashlib.sha256((source + build.platform_key()).encode()).hexdigest()
    name = f"cuda_utils{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert build.get_cache_manager(key).get_file(name) == str(module)
    assert b"libcuda.so.1" in module.read_bytes()


def test_what_triton_compiles_itself_still_goes_to_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    cache = triton_prebuilt.PrebuiltCacheManager("key")
    assert cache.get_file("kernel.cubin") is None
    cache.put(b"code", "kernel.cubin")
    assert Path(cache.get_file("kernel.cubin") or "").read_bytes() == b"code"
