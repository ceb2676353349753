"""`python -m router.tenancy`: the process that writes the ledger.

Prints one JSON line on stdout when it begins; logs go to stderr. SIGTERM and SIGINT let it collect once more and end it
with exit code 0. With --until-input-closes the first line of its input is the ledger's URL, and the end of the input
ends it: so whoever started it need not live to stop it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from pathlib import Path

from experts.logs import LOG_FORMATS, set_up_logging
from experts.stop_signal import StopSignal
from router.tenancy.ledger_writer import LedgerWriter


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m router.tenancy", description="Write the ledger.")
    parser.add_argument("--journal", type=Path, required=True, help="folder that fronts write usage to")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ledger", metavar="URL", help="sqlite:///FILE or postgresql://...")
    source.add_argument("--until-input-closes", action="store_true", help="and read the URL from there")
    parser.add_argument("--retention-days", type=int, default=400, help="then records become sums by day")
    parser.add_argument("--log-format", choices=LOG_FORMATS, default="text")
    options = parser.parse_args()
    set_up_logging(log_format=options.log_format)
    ended = StopSignal()
    ended.install()
    url = options.ledger
    if options.until_input_closes:
        url = sys.stdin.readline().strip()
        threading.Thread(target=_wait_for_end_of_input, args=(ended,), daemon=True).start()
    print(json.dumps({"pid": os.getpid()}), flush=True)
    LedgerWriter(options.journal, url, options.retention_days, ended).run()
    return 0


def _wait_for_end_of_input(ended: StopSignal) -> None:
    while sys.stdin.readline():
        pass
    ended.set()


if __name__ == "__main__":
    sys.exit(main())
