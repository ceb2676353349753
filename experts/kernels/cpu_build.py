"""Find or build the shared library of the CPU kernel.

The library holds code for every instruction family and picks at run time, so it depends on the sources, the flags and
the machine architecture, not on the CPU it was built on. It is looked for beside the sources (a container image builds
it there: `python -m experts.kernels.cpu_build`), then in the user's cache, then compiled into that cache, which takes
seconds. Several processes may start at once: one compiles, the others wait, and a library appears whole or not at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCE_FOLDER = Path(__file__).parent
SOURCE = SOURCE_FOLDER / "cpu_ffn.cpp"
# Contraction off: fused or not is spelled out in the sources, so that the compiler cannot change a result.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-fno-math-errno")
COMPILE_TIMEOUT_S = 300


class CompilerMissing(Exception):
    """There is no library and none can be built here; the message says why."""


def library_name() -> str:
    """File name of the library that belongs to the sources as they are."""
    digest = hashlib.sha256(" ".join((*FLAGS, platform.machine())).encode())
    for path in sorted((SOURCE, *SOURCE_FOLDER.glob("cpu/*"))):
        if path.suffix in (".cpp", ".h", ".inc"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"shoal-cpu-{digest.hexdigest()[:16]}.so"


def find_or_build_library(cache_folder: Path | None = None) -> Path:
    """Return the library's path, compiling it if it exists neither beside the sources nor in the cache.

    cache_folder: None takes the user's own. Raises CompilerMissing where that is impossible.
    """
    name = library_name()
    beside = SOURCE_FOLDER / name
    if beside.is_file():
        return beside
    folder = cache_folder or _user_cache()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_foreign(folder)
        library = folder / name
        if not library.is_file():
            with _locked(folder / "build.lock"):
                if not library.is_file():
                    build_library(library)
        _refuse_foreign(library)
    except OSError as error:
        raise CompilerMissing(f"cannot keep a library in {folder}: {error}") from error
    return library


def build_library(path: Path) -> None:
    """Compile the kernel into path, which appears complete. Raises CompilerMissing."""
    compile_library(SOURCE, FLAGS, path)
    logger.info("built the CPU kernel: %s", path)


def compile_library(source: Path, flags: Sequence[str], path: Path) -> None:
    """Compile one C++ file into a shared library, which appears complete. Raises CompilerMissing."""
    compiler = find_compiler()
    if compiler is None:
        raise CompilerMissing("no g++ on PATH (set CXX to a GNU C++ compiler, version 11 or newer)")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        result = Path(folder) / path.name
        command = [compiler, *flags, "-o", str(result), str(source)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CompilerMissing(f"{compiler} did not run: {error}") from error
        if done.returncode != 0:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
            raise CompilerMissing(f"{compiler} failed: {first}")
        os.replace(result, path)


def find_compiler() -> str | None:
    """CXX if set, else g++; other compilers do not know its target pragmas."""
    return shutil.which(os.environ.get("CXX") or "g++")


def _user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "shoal"
    home = Path.home()
    if os.access(home, os.W_OK):
        return home / ".cache" / "shoal"
    return Path(tempfile.gettempdir()) / f"shoal-{os.getuid()}"


def _refuse_foreign(path: Path) -> None:
    """Raise OSError unless path is ours alone to write: what lies there is run."""
    state = path.stat()
    if state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise OSError(f"{path} can be written by others (chmod go-w, or set XDG_CACHE_HOME)")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; a holder that dies releases it, and compiling has a time limit."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    try:
        target = SOURCE_FOLDER / library_name()
        build_library(target)
    except CompilerMissing as failure:
        sys.exit(f"error: {failure}")
    print(target)
