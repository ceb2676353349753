"""`shoal certs init CA_FOLDER` and `shoal certs issue CA_FOLDER FOLDER`."""

from __future__ import annotations

import argparse

from cluster.certificates import issue_certificate, make_ca
from cluster.errors import SettingsError


def run(options: argparse.Namespace) -> int:
    if options.days < 1:
        raise SettingsError(f"--days must be at least 1, not {options.days}")
    if options.certs_command == "init":
        make_ca(options.ca_folder, days=options.days)
        print(f"a CA is in {options.ca_folder}; keep ca.key where no node of the cluster can read it")
        return 0
    expires_at = issue_certificate(options.ca_folder, options.folder, tuple(options.name), days=options.days)
    print(
        f"a certificate until {expires_at:%Y-%m-%d} is in {options.folder}; issue it again before, there or as a Secret"
    )
    return 0
