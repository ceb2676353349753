"""python -m tests.fuzz: the long fuzz run, against the demo checkpoint on real processes. `make fuzz`.

Prints one JSON object with the bars. Exit code 1 if any failure was found, each with the seed that repeats it, or a bar
was missed: memory is flat, and who sends proper requests waits no longer than beside as many proper ones.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.fuzz.fuzzer import measure_victim, run_fuzz, sum_resident_bytes
from tests.fuzz.mutations import make_proper_request
from tests.local_stack import REPOSITORY, StackOptions, local_stack

CHECKPOINT = REPOSITORY / "deploy" / "demo" / "checkpoint"
# Of the requests, after which memory has to be flat: caches of grammars and prefixes are full by then.
WARM_UP_SHARE = 0.25
MAX_GROWTH = 0.10
# As many requests at once that are proper, for comparison: on a full machine everybody waits.
PROPER_SHARE = 0.1
MAX_SLOWER = 1.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--parallel", type=int, default=32)
    options = parser.parse_args()
    num_warm = int(options.requests * WARM_UP_SHARE)
    seeds = range(options.first_seed, options.first_seed + options.requests)
    proper_seeds = range(int(options.requests * PROPER_SHARE))
    stack_options = StackOptions(num_groups=2, dtype="bfloat16", wire_dtype="bfloat16")
    with tempfile.TemporaryDirectory() as folder, local_stack(CHECKPOINT, Path(folder), stack_options) as stack:
        pids = list(stack.pids().values())
        alone = measure_victim(stack.base_url, 100)
        warm = run_fuzz(stack.base_url, seeds[:num_warm], parallel=options.parallel)
        proper = run_fuzz(stack.base_url, proper_seeds, parallel=options.parallel, make=make_proper_request)
        before_bytes = sum_resident_bytes(pids)
        rest = run_fuzz(stack.base_url, seeds[num_warm:], parallel=options.parallel)
        after_bytes = sum_resident_bytes(pids)
        after = measure_victim(stack.base_url, 100)
    failures = [*alone.failures, *warm.failures, *proper.failures, *rest.failures, *after.failures]
    slower = max(rest.victim_quantile_s(percent) / proper.victim_quantile_s(percent) for percent in (50, 95))
    growth = after_bytes / before_bytes - 1
    num_requests = warm.num_requests + rest.num_requests
    result = {
        "requests": num_requests,
        "requests_per_s": round(num_requests / (warm.seconds + rest.seconds), 1),
        "statuses": {str(status): count for status, count in sorted((warm.statuses + rest.statuses).items())},
        "failures": failures[:20],
        "resident_mb": [round(before_bytes / 1e6), round(after_bytes / 1e6)],
        "victim_ms": {
            name: {f"p{percent}": round(1000 * report.victim_quantile_s(percent), 1) for percent in (50, 95, 99)}
            for name, report in (
                ("alone", alone),
                ("beside_proper", proper),
                ("beside_fuzz", rest),
                ("alone_after", after),
            )
        },
        "bars": [
            {"name": "requests", "asked": 20_000, "measured": num_requests, "unit": "", "ok": num_requests >= 20_000},
            {"name": "failures", "asked": 0, "measured": len(failures), "unit": "", "ok": not failures},
            {
                "name": "memory growth",
                "asked": MAX_GROWTH,
                "measured": round(growth, 3),
                "unit": "share",
                "ok": growth <= MAX_GROWTH,
            },
            {
                "name": "victim's p50 and p95 beside broken requests over those beside proper ones",
                "asked": MAX_SLOWER,
                "measured": round(slower, 2),
                "unit": "",
                "ok": slower <= MAX_SLOWER,
            },
        ],
    }
    print(json.dumps(result, indent=2))
    return 1 if failures or growth > MAX_GROWTH or slower > MAX_SLOWER else 0


if __name__ == "__main__":
    sys.exit(main())
