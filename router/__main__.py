"""`python -m router`: one router without Ray, for tests and debugging.

Prints one JSON line on stdout when it listens and its weights are loaded; logs go to stderr. SIGTERM and SIGINT drain
it and end it with exit code 0; a checkpoint that cannot be served ends it with one line and exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

import torch

from experts.allocator import keep_large_buffers
from experts.errors import ExpertsError
from experts.logs import LOG_FORMATS, LogFormat, set_up_logging
from experts.stop_signal import StopSignal
from experts.wire import WireFormat
from router.heartbeat import HeartbeatOptions
from router.overlap_policy import parse_micro_batches
from router.server import RouterConfig, RouterServer

# How long a signal may go unnoticed while the weights load, which can take minutes.
SIGNAL_LATENCY_S = 0.2
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def parse_arguments(arguments: list[str]) -> tuple[RouterConfig, float, LogFormat]:
    """The router's config, the seconds that running sequences get when it is told to end, and the form of its log."""
    parser = argparse.ArgumentParser(prog="python -m router", description="Serve one router without Ray.")
    parser.add_argument("--checkpoint", required=True, help="Hugging Face folder")
    parser.add_argument("--expert", action="append", default=[], metavar="HOST:PORT", help="a replica; repeatable")
    parser.add_argument("--router-id", default="r0")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help="of the trunk")
    parser.add_argument(
        "--wire-dtype",
        choices=[choice.value for choice in WireFormat],
        default=WireFormat.BFLOAT16.value,
        help="of activations on the wire; fp8: out to the experts only",
    )
    parser.add_argument("--combine", choices=["reduced", "exact"], default="reduced")
    parser.add_argument("--deterministic", action=argparse.BooleanOptionalAction)
    parser.add_argument(
        "--micro-batches",
        type=parse_micro_batches,
        default="auto",
        metavar="auto|off|N",
        help="of a step, which compute while others wait for experts; auto: as many as measured to pay",
    )
    parser.add_argument("--max-model-len", type=int, default=None, help="tokens; default: the checkpoint's limit")
    parser.add_argument("--max-batched-tokens", type=int, default=2048, help="tokens of one step")
    parser.add_argument("--max-num-seqs", type=int, default=256, help="sequences running at once")
    parser.add_argument("--queue-policy", choices=["fair", "fcfs"], default="fair", help="fair: between teams")
    parser.add_argument(
        "--priority-ageing-s", type=float, default=60.0, help="seconds of waiting after which a request rises a class"
    )
    parser.add_argument("--kv-cache-tokens", type=int, default=None, help="default: half the free memory")
    parser.add_argument(
        "--speculative-tokens",
        type=int,
        default=None,
        help="most tokens to draft per step with the MTP layer; 0: none; default: as many as pay",
    )
    parser.add_argument("--expert-wait-s", type=float, default=30.0, help="seconds to wait for a lost expert group")
    parser.add_argument("--heartbeat-s", type=float, default=0.2, help="seconds between two heartbeats of a replica")
    parser.add_argument("--missed-heartbeats", type=int, default=3, help="in a row: the replica is dead")
    parser.add_argument(
        "--numerics",
        choices=["sticky", "uniform", "mixed"],
        default="sticky",
        help="replicas of a group with other arithmetic: used when no other is left, never, or always",
    )
    parser.add_argument(
        "--max-missing-experts",
        type=int,
        default=0,
        help="experts of a token that are left out while nobody serves them; 0: it waits for all",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:INDEX; auto: the first card if any")
    parser.add_argument("--threads", type=int, default=None, help="torch threads; default: all cores")
    parser.add_argument("--trace-to", metavar="URL|FILE", help="where spans go: an OTLP/HTTP collector, or a file")
    parser.add_argument("--log-format", choices=LOG_FORMATS, default="text", help="json: one object per line")
    parser.add_argument("--drain-timeout-s", type=float, default=30.0)
    parser.add_argument("--tls-dir", metavar="DIR", help="certificates of the cluster: tls.crt, tls.key, ca.crt")
    parser.add_argument("--insecure-cluster-network", action="store_true", help="listen unencrypted for other machines")
    options = parser.parse_args(arguments)
    config = RouterConfig(
        checkpoint=options.checkpoint,
        router_id=options.router_id,
        host=options.host,
        port=options.port,
        dtype=DTYPES[options.dtype],
        wire_format=WireFormat(options.wire_dtype),
        combine=options.combine,
        deterministic=options.deterministic,
        micro_batches=options.micro_batches,
        max_model_len=options.max_model_len,
        max_batched_tokens=options.max_batched_tokens,
        max_num_seqs=options.max_num_seqs,
        queue_policy=options.queue_policy,
        priority_ageing_s=options.priority_ageing_s,
        kv_cache_tokens=options.kv_cache_tokens,
        speculative_tokens=options.speculative_tokens,
        expert_wait_s=options.expert_wait_s,
        heartbeats=HeartbeatOptions(options.heartbeat_s, options.missed_heartbeats),
        numerics=options.numerics,
        max_missing_experts=options.max_missing_experts,
        num_threads=options.threads,
        device=options.device,
        expert_endpoints=tuple(options.expert),
        tls_dir=options.tls_dir,
        allow_insecure=options.insecure_cluster_network,
        trace_to=options.trace_to,
    )
    return config, options.drain_timeout_s, options.log_format


def main(arguments: list[str] | None = None) -> int:
    config, drain_timeout_s, log_format = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    set_up_logging(log_format=log_format)
    keep_large_buffers()
    ended = StopSignal()
    ended.install()
    server: RouterServer | None = None
    try:
        server = RouterServer(config)
        endpoint = server.start()
        while not server.is_loaded(SIGNAL_LATENCY_S):
            if ended.is_set():
                server.stop()
                return 0
    except (ExpertsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"endpoint": endpoint, "router_id": config.router_id, "pid": os.getpid()}), flush=True)
    ended.wait()
    server.drain(drain_timeout_s)
    server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
