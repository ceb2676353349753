"""`shoal fetch SOURCE FOLDER`: a checkpoint from anything that fsspec knows; `--wait FOLDER`: until it is there."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from cluster.checkpoint_fetch import fetch, wait_complete
from cluster.errors import SettingsError


def run(options: argparse.Namespace) -> int:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    if options.wait is not None:
        if options.source is not None:
            raise SettingsError("--wait FOLDER fetches nothing: leave SOURCE out")
        wait_complete(options.wait, options.timeout)
        return 0
    if options.source is None or options.folder is None:
        raise SettingsError("name a source and a folder: shoal fetch s3://bucket/model /models/model")
    if "://" not in options.source:
        raise SettingsError(f"{options.source} is no URL: file:///FOLDER names a folder")
    fetch(options.source, Path(options.folder), verify_digests=options.verify_digests)
    return 0
