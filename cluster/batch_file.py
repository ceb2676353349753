"""The two files of a batch: requests, one JSON object per line, and answers, appended as they come.

An answer counts as soon as its line is complete, so a batch that was cut off anywhere goes on where it was: a broken
last line is dropped, and what has its answer is not asked again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import RequestFailed

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


@dataclass(frozen=True, slots=True)
class BatchRequest:
    custom_id: str
    url: str
    body: dict[str, Any]


def read_requests(path: Path) -> Iterator[BatchRequest]:
    """In order. Raises RequestFailed naming the line that is no request, or repeats a custom_id."""
    seen: set[str] = set()
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                request = _parse(line, f"{path.name}, line {number}")
                if request.custom_id in seen:
                    raise RequestFailed(f"{path.name}, line {number}: custom_id {request.custom_id} comes twice")
                seen.add(request.custom_id)
                yield request
    except (OSError, UnicodeDecodeError) as error:
        raise RequestFailed(f"{path}: cannot be read: {error}") from error


def _parse(line: str, where: str) -> BatchRequest:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise RequestFailed(f"{where}: is not JSON: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("custom_id"), str):
        raise RequestFailed(f"{where}: needs a custom_id, a text")
    if value.get("method", "POST") != "POST" or value.get("url") not in URLS:
        raise RequestFailed(f"{where}: method must be POST and url one of {', '.join(URLS)}")
    if not isinstance(value.get("body"), dict):
        raise RequestFailed(f"{where}: needs a body, an object")
    return BatchRequest(value["custom_id"], value["url"], {**value["body"], "stream": False})


class AnswerFile:
    """Open for one process at a time. done: the custom_ids that have their answer."""

    def __init__(self, path: Path) -> None:
        """Raises RequestFailed if it cannot be written, is another batch's at the moment, or holds something else."""
        try:
            self._file = path.open("a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RequestFailed(f"{path}: another batch writes it") from error
        except OSError as error:
            raise RequestFailed(f"{path}: cannot be written: {error}") from error
        self.done = self._read_done(path)

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._file.close()

    def append(self, custom_id: str, answer: dict[str, Any]) -> None:
        """Whole, and on the disk."""
        self._file.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done.add(custom_id)

    def _read_done(self, path: Path) -> set[str]:
        done: set[str] = set()
        self._file.seek(0)
        end = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            try:
                done.add(json.loads(line)["custom_id"])
            except (ValueError, KeyError, TypeError) as error:
                raise RequestFailed(f"{path}: holds something else than answers of a batch") from error
            end += len(line)
        self._file.truncate(end)
        return done
