"""Copies a checkpoint from an object store or a mounted volume into a folder, so that it is whole or not there.

A file is copied beside its name, continued after an interruption, and renamed when all its bytes are there and their
digest is right where the source says one. The folder counts as complete when the checkpoint in it has been checked and
a list of its files was written, last of all. Nobody loads a half of something, whatever ended the copy.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import FetchFailed
from experts.check import check_checkpoint
from experts.errors import ExpertsError

logger = logging.getLogger(__name__)

COMPLETE_FILE = ".shoal-complete"
DIGESTS_FILE = "SHA256SUMS"
# Of URLs whose store obstore reads. fsspec's own packages for them come with a botocore that excludes the Kubernetes
# client, both by python-dateutil.
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})
# What a Hugging Face folder holds for us. No .bin and no .py: those would be executed to be read.
_SUFFIXES = (".safetensors", ".json", ".model", ".txt", ".jinja")
_PIECE_BYTES = 16 * 2**20
_LOG_INTERVAL_S = 10.0
_LOCK_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of the source. path: as its file system names it. digest: SHA-256 in hex; None: the source says none."""

    name: str
    path: str
    size_bytes: int
    digest: str | None


def is_complete(target: Path) -> bool:
    """Whether a checkpoint was fetched into the folder, and its files still have the sizes that they had."""
    try:
        sizes: dict[str, int] = json.loads((target / COMPLETE_FILE).read_text(encoding="utf-8"))["files"]
        return all((target / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def wait_complete(target: Path, timeout_s: float, poll_s: float = 2.0) -> None:
    """Block until somebody else has fetched it. Raises FetchFailed after timeout_s."""
    deadline_s = time.monotonic() + timeout_s
    logged_s = 0.0
    while not is_complete(target):
        now_s = time.monotonic()
        if now_s >= deadline_s:
            raise FetchFailed(f"{target} was not complete after {timeout_s:.0f} s: look at the job that fetches it")
        if now_s - logged_s >= _LOG_INTERVAL_S:
            logger.info("waiting for %s", target)
            logged_s = now_s
        time.sleep(min(poll_s, deadline_s - now_s))


def fetch(source: str, target: Path, *, verify_digests: bool) -> None:
    """Make target a complete checkpoint of what the URL holds; does nothing if it is one already.

    verify_digests: also of files that are there already. One process per folder works, others wait for it. Raises
    FetchFailed with the file and the remedy.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
        with _locked(target / ".shoal-fetch.lock"):
            if is_complete(target):
                logger.info("complete already: %s", target)
                return
            file_system, files = _list_source(source)
            started_s = time.monotonic()
            for index, file in enumerate(files):
                logger.info("file %d of %d: %s (%.1f MB)", index + 1, len(files), file.name, file.size_bytes / 1e6)
                _fetch_file(file_system, file, target, verify_digests=verify_digests)
            _check(target)
            sizes = {file.name: file.size_bytes for file in files}
            _write_whole(target / COMPLETE_FILE, json.dumps({"source": source, "files": sizes}, indent=1).encode())
    except OSError as error:
        raise FetchFailed(
            f"cannot fetch {source} into {target}: {_describe(error)} (mount it writable, with room enough)"
        ) from error
    duration_s = max(time.monotonic() - started_s, 1e-3)
    total_bytes = sum(sizes.values())
    logger.info("complete: %s, %.1f GB in %.0f s, %.2f GB/s", target, total_bytes / 1e9, duration_s,
                total_bytes / duration_s / 1e9)  # fmt: skip


def parse_digests(text: str) -> dict[str, str]:
    """Digest by file name, of what `sha256sum` writes. Lines that are none are left out."""
    digests: dict[str, str] = {}
    for line in text.splitlines():
        digest, _, name = line.strip().partition(" ")
        name = name.strip().removeprefix("*").removeprefix("./")
        if len(digest) == 64 and name and all(letter in "0123456789abcdef" for letter in digest.lower()):
            digests[name] = digest.lower()
    return digests


def _list_source(source: str) -> tuple[Any, list[SourceFile]]:
    """The file system behind a URL, and what to fetch of it, the large files first."""
    import fsspec

    protocol = source.partition("://")[0]
    try:
        if protocol in _OBJECT_STORES:
            from obstore.fsspec import register

            register(protocol)
        file_system, root = fsspec.core.url_to_fs(source)
        found: list[dict[str, Any]] = file_system.ls(root, detail=True)
        digests = _read_digests(file_system, found)
    except ImportError as error:
        raise FetchFailed(f"{source}: {error} (for {protocol}:// install shoal[object-store])") from error
    except Exception as error:
        # Every file system raises errors of its own.
        raise FetchFailed(f"cannot list {source}: {_describe(error)}") from error
    files = [
        SourceFile(name, str(item["name"]), int(item["size"]), digests.get(name))
        for item in found
        if item["type"] == "file" and (name := str(item["name"]).rsplit("/", 1)[-1]).endswith(_SUFFIXES)
    ]
    if not any(file.name == "config.json" for file in files):
        raise FetchFailed(f"{source} holds no config.json: name the folder of a Hugging Face checkpoint")
    return file_system, sorted(files, key=lambda file: (not file.name.endswith(".safetensors"), file.name))


def _read_digests(file_system: Any, found: list[dict[str, Any]]) -> Mapping[str, str]:
    paths = [str(item["name"]) for item in found if str(item["name"]).rsplit("/", 1)[-1] == DIGESTS_FILE]
    return parse_digests(file_system.cat_file(paths[0]).decode("utf-8", errors="replace")) if paths else {}


def _fetch_file(file_system: Any, file: SourceFile, target: Path, *, verify_digests: bool) -> None:
    path = target / file.name
    if path.is_file() and path.stat().st_size == file.size_bytes:
        if not (verify_digests and file.digest) or _hash_file(path).hexdigest() == file.digest:
            return
        logger.warning("%s is there with another digest: fetched again", file.name)
    part = target / f".{file.name}.part"
    _copy(file_system, file, part)
    size_bytes = part.stat().st_size
    if size_bytes != file.size_bytes:
        raise FetchFailed(f"{file.name}: {size_bytes} bytes came, the source says {file.size_bytes}: run it again")
    if file.digest and (found := _hash_file(part).hexdigest()) != file.digest:
        part.unlink()
        raise FetchFailed(f"{file.name}: SHA-256 is {found}, {DIGESTS_FILE} says {file.digest}: the source is damaged")
    os.replace(part, path)


def _copy(file_system: Any, file: SourceFile, part: Path) -> None:
    """Append to what an earlier run left."""
    done_bytes = part.stat().st_size if part.exists() else 0
    if done_bytes > file.size_bytes:
        part.unlink()
        done_bytes = 0
    logged_s = time.monotonic()
    try:
        with file_system.open(file.path, "rb") as source, part.open("ab") as copy:
            source.seek(done_bytes)
            while piece := source.read(_PIECE_BYTES):
                copy.write(piece)
                done_bytes += len(piece)
                if time.monotonic() - logged_s >= _LOG_INTERVAL_S:
                    logged_s = time.monotonic()
                    logger.info("%s: %d %%", file.name, 100 * done_bytes // max(file.size_bytes, 1))
            copy.flush()
            os.fsync(copy.fileno())
    except OSError:
        raise
    except Exception as error:
        # See _list_source. What came stays, and the next run goes on with it.
        raise FetchFailed(f"{file.name}: {_describe(error)} (run it again, it goes on from here)") from error


def _describe(error: Exception) -> str:
    """In one line: obstore adds pages of its inner state."""
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"


def _check(target: Path) -> None:
    try:
        report = check_checkpoint(target, 1, read_values=False)
    except ExpertsError as error:
        raise FetchFailed(f"what was fetched is no checkpoint: {error}") from error
    if report.problems:
        raise FetchFailed(f"what was fetched is no sound checkpoint: {report.problems[0]}")


def _hash_file(path: Path) -> Any:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")


def _write_whole(path: Path, data: bytes) -> None:
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the folder's lock; a holder that dies releases it."""
    with path.open("w") as file:
        is_told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not is_told:
                    logger.info("another process fetches into %s: waiting for it", path.parent)
                is_told = True
                time.sleep(_LOCK_POLL_S)
        yield
