"""python -m tests.fuzz: the long fuzz run, against the demo checkpoint on real processes. `make fuzz`.

Prints one JSON object with the bars. Exit code 1 if any failure was found, each with the seed that repeats it, or a bar
was missed: the memory of every process is flat, and who sends proper requests waits no longer than beside as many
proper ones. Before memory is looked at, the KV cache is filled and the costliest requests that there may be are sent:
what grows afterwards is kept, and not only met for the first time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from router.tenancy.key_file import make_key, new_key_file, save_key_file
from tests.fuzz.fuzzer import FuzzReport, Keys, fill_kv_cache, measure_victim, read_resident_bytes, run_fuzz
from tests.fuzz.mutations import make_costly_request, make_proper_request
from tests.local_stack import REPOSITORY, StackOptions, local_stack

CHECKPOINT = REPOSITORY / "deploy" / "demo" / "checkpoint"
# Of the requests, after which memory is looked at; as often as there are further parts of equal size.
WARM_UP_SHARE = 0.25
NUM_PARTS = 6
# Of a process's largest memory in the second half of these parts over that in the first half. Allocators keep pages,
# and where 32 requests meet at random is not the same twice.
MAX_GROWTH_MB = 8.0
# What is valid, however odd, is short work: many a request that is changed asks for an answer as long as the context.
# With the demo's whole one (--max-model-len 4096: a few minutes more) the victim waits for those, not for broken ones.
MAX_MODEL_LEN = 512
# Fewer contexts than requests come at once where they are long, so that some have to give way.
MIN_KV_CACHE_TOKENS = 32 * MAX_MODEL_LEN
CONTEXTS_IN_CACHE = 16
NUM_COSTLY = 33
# As many requests at once that are proper, for comparison: on a full machine everybody waits.
PROPER_SHARE = 0.1
MAX_SLOWER = 1.0


def split(seeds: Sequence[int], num_parts: int) -> list[Sequence[int]]:
    bounds = [len(seeds) * index // num_parts for index in range(num_parts + 1)]
    return [seeds[start:end] for start, end in itertools.pairwise(bounds)]


def measure_growth_mb(resident: Sequence[Mapping[str, int]]) -> dict[str, float]:
    """By process. resident: at the start and after each part."""
    names = {name: None for each in resident for name in each}
    middle = len(resident) // 2
    return {
        name: (
            max(each.get(name, 0) for each in resident[middle + 1 :])
            - max(each.get(name, 0) for each in resident[: middle + 1])
        )
        / 1e6
        for name in names
    }


def read_vocab_size() -> int:
    return json.loads((CHECKPOINT / "config.json").read_text())["vocab_size"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--parallel", type=int, default=32)
    parser.add_argument("--max-model-len", type=int, default=MAX_MODEL_LEN, help="4096: the demo's whole context")
    options = parser.parse_args()
    max_model_len: int = options.max_model_len
    kv_cache_tokens = max(CONTEXTS_IN_CACHE * max_model_len, MIN_KV_CACHE_TOKENS)
    num_warm = int(options.requests * WARM_UP_SHARE)
    seeds = range(options.first_seed, options.first_seed + options.requests)
    proper_seeds = range(int(options.requests * PROPER_SHARE))
    with tempfile.TemporaryDirectory() as folder:
        file, fuzzer = make_key(new_key_file(), "fuzzer", datetime.now(UTC))
        file, victim = make_key(file, "victim", datetime.now(UTC))
        save_key_file(Path(folder) / "keys.json", file)
        keys = Keys(fuzzer.text, victim.text)
        stack_options = StackOptions(
            num_groups=2,
            dtype="bfloat16",
            wire_dtype="bfloat16",
            max_model_len=max_model_len,
            extra_router_arguments=("--kv-cache-tokens", str(kv_cache_tokens)),
            extra_api_arguments=(
                *("--max-model-len", str(max_model_len)),
                *("--keys-file", str(Path(folder) / "keys.json")),
            ),
        )
        with local_stack(CHECKPOINT, Path(folder) / "logs", stack_options) as stack:
            url, pids = stack.base_url, stack.pids()
            alone = measure_victim(url, 100, keys.victim)
            resident = [read_resident_bytes(pids)]
            fill_kv_cache(url, kv_cache_tokens, max_model_len, read_vocab_size(), keys.fuzzer)
            costly = run_fuzz(url, range(NUM_COSTLY), parallel=8, make=make_costly_request, keys=keys)
            warm = run_fuzz(url, seeds[:num_warm], parallel=options.parallel, keys=keys)
            resident.append(read_resident_bytes(pids))
            proper, rest = FuzzReport(), FuzzReport()
            # In turns, since the machine's speed changes over minutes.
            for proper_part, part in zip(
                split(proper_seeds, NUM_PARTS), split(seeds[num_warm:], NUM_PARTS), strict=True
            ):
                proper.add(run_fuzz(url, proper_part, parallel=options.parallel, make=make_proper_request, keys=keys))
                rest.add(run_fuzz(url, part, parallel=options.parallel, keys=keys))
                resident.append(read_resident_bytes(pids))
            after = measure_victim(url, 100, keys.victim)
    failures = [*alone.failures, *costly.failures, *warm.failures, *proper.failures, *rest.failures, *after.failures]
    slower = max(rest.victim_quantile_s(percent) / proper.victim_quantile_s(percent) for percent in (50, 95))
    growth_mb = measure_growth_mb(resident[1:])
    num_requests = warm.num_requests + rest.num_requests
    result = {
        "requests": num_requests,
        "max_model_len": max_model_len,
        "kv_cache_tokens": kv_cache_tokens,
        "requests_per_s": round(num_requests / (warm.seconds + rest.seconds), 1),
        "statuses": {str(status): count for status, count in sorted((warm.statuses + rest.statuses).items())},
        "num_failures": len(failures),
        "failures": failures[:40],
        "longest_stall_of_the_fuzzer_s": round(max(warm.longest_stall_s, rest.longest_stall_s), 1),
        "resident_mb": {name: [round(each.get(name, 0) / 1e6, 1) for each in resident] for name in growth_mb},
        "victim_ms": {
            name: {f"p{percent}": round(1000 * report.victim_quantile_s(percent), 1) for percent in (50, 95, 99)}
            for name, report in (
                ("alone", alone),
                ("beside_costly", costly),
                ("beside_proper", proper),
                ("beside_fuzz", rest),
                ("alone_after", after),
            )
        },
        "bars": [
            {"name": "requests", "asked": 20_000, "measured": num_requests, "unit": "", "ok": num_requests >= 20_000},
            {"name": "failures", "asked": 0, "measured": len(failures), "unit": "", "ok": not failures},
        ]
        + [
            {
                "name": f"memory growth of {name}",
                "asked": MAX_GROWTH_MB,
                "measured": round(growth, 1),
                "unit": "MB",
                "ok": growth <= MAX_GROWTH_MB,
            }
            for name, growth in growth_mb.items()
        ]
        + [
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
    return 1 if failures or max(growth_mb.values()) > MAX_GROWTH_MB or slower > MAX_SLOWER else 0


if __name__ == "__main__":
    sys.exit(main())
