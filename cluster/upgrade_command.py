"""`shoal upgrade`: serve another checkpoint in place of the one that serves, without a pause."""

from __future__ import annotations

import argparse
import contextlib
import json
from typing import Any

from cluster.admin_client import connect
from cluster.errors import SettingsError


def run(options: argparse.Namespace) -> int:
    if (options.checkpoint is None) != options.abort:
        raise SettingsError("name a CHECKPOINT to upgrade to, or give --abort to undo an upgrade that is under way")
    with contextlib.closing(connect(options.url)) as admin:
        if options.abort:
            upgrade = admin.abort_upgrade()
        else:
            # The controller may run elsewhere: a path is meant as it is written, but for the folder it begins at.
            checkpoint = str(options.checkpoint.expanduser().absolute())
            upgrade = admin.upgrade(checkpoint, options.timeout, options.drain_timeout)
            if options.wait:
                version = upgrade["to"]["weights_version"]
                upgrade = admin.wait_upgraded(version, options.timeout + options.drain_timeout)
    print(json.dumps(upgrade, indent=2) if options.json else _render(upgrade))
    return 0


def _render(upgrade: dict[str, Any]) -> str:
    line = f"{upgrade['from']['checkpoint']} to {upgrade['to']['checkpoint']}: {upgrade['phase']}"
    if upgrade["reason"]:
        line += f", {upgrade['reason']}"
    return line if upgrade["phase"] == "done" else f"{line}; `shoal events --follow` shows every step"
