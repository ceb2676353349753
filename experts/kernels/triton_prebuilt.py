"""Triton's own C module, built beforehand: an image without a compiler can launch kernels.

Triton compiles kernels by itself, but the module through which it talks to the driver is C, which it compiles on first
use with a compiler that it expects to find. The image's build stage does that with `python -m
experts.kernels.triton_prebuilt`, against an empty libcuda: the real one comes with the node. The module lies beside the
sources, like the CPU kernel, and at run time TRITON_CACHE_MANAGER names the class below.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from triton.backends.nvidia import driver
from triton.runtime import build
from triton.runtime.cache import FileCacheManager

PREBUILT_FOLDER = Path(__file__).parent / "triton_prebuilt_modules"
_MODULE = "cuda_utils"


class PrebuiltCacheManager(FileCacheManager):
    """Triton's cache of files, and behind it a folder that is only read."""

    def get_file(self, filename: str) -> str | None:
        found = super().get_file(filename)
        if found is not None:
            return found
        prebuilt = PREBUILT_FOLDER / str(self.key) / filename
        return str(prebuilt) if prebuilt.is_file() else None


def build_driver_module(folder: Path = PREBUILT_FOLDER) -> Path:
    """Compile the driver module into folder, where PrebuiltCacheManager finds it. Raises CalledProcessError."""
    source = Path(driver.dirname, "driver.c").read_text(encoding="utf-8")
    # As triton.runtime.build.compile_module_from_src and its cache name it.
    digest = hashlib.sha256((source + build.platform_key()).encode()).hexdigest()
    # Typed loosely: the base class of Triton's cache managers says nothing of a key.
    cache: Any = build.get_cache_manager(digest)
    target = folder / str(cache.key)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        stub = Path(work, "stub.c")
        stub.touch()
        library = str(Path(work, driver.libraries[0]))
        compiler = os.environ.get("CC", "gcc")
        subprocess.run(
            [compiler, "-shared", "-fPIC", f"-Wl,-soname,{driver.libraries[0]}", "-o", library, str(stub)], check=True
        )
        code = Path(work, "driver.c")
        code.write_text(source, encoding="utf-8")
        built = build._build(_MODULE, str(code), work, [driver.libdevice_dir, work], driver.include_dirs,
                             driver.libraries, [])  # fmt: skip
        path = target / f"{_MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}"
        path.write_bytes(Path(built).read_bytes())
    return path


if __name__ == "__main__":
    print(build_driver_module())
