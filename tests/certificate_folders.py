"""Folders of certificates for tests: good ones, and the three kinds that nobody may take."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from cluster.certificates import issue_certificate, make_ca


class CertificateFolders(NamedTuple):
    """ca: of `good` and `expired`. other: of another CA, with the cluster's ca.crt beside it, which is no secret."""

    ca: Path
    good: Path
    expired: Path
    other: Path


def make_folders(root: Path) -> CertificateFolders:
    folders = CertificateFolders(*(root / name for name in CertificateFolders._fields))
    make_ca(folders.ca)
    issue_certificate(folders.ca, folders.good)
    issue_certificate(folders.ca, folders.expired, days=0)
    make_ca(root / "other-ca")
    issue_certificate(root / "other-ca", folders.other)
    shutil.copy(folders.ca / "ca.crt", folders.other / "ca.crt")
    return folders
