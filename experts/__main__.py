"""`python -m experts`: one expert group replica without Ray, for tests and debugging.

Prints one JSON line on stdout when it serves; logs go to stderr. SIGTERM and SIGINT drain and exit with 0; a bad
checkpoint is one line on stderr and exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence

from experts.allocator import keep_large_buffers
from experts.checkpoint import Checkpoint
from experts.errors import ConfigError, ExpertsError
from experts.expert_range import ExpertRange, list_hosted_pairs
from experts.logs import LOG_FORMATS, set_up_logging
from experts.model_config import ModelConfig
from experts.stop_signal import StopSignal
from experts.tls import check_listen_address, load_cluster_tls


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until a signal. Returns the exit code."""
    options = _parse_arguments(arguments)
    set_up_logging(options.log_level, options.log_format)
    keep_large_buffers()
    stop_requested = StopSignal()
    stop_requested.install()
    try:
        return _serve(options, stop_requested)
    except ExpertsError as error:
        print(f"error: {error}", file=sys.stderr)
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) and "Failed to bind" not in str(error):
            raise
        print(
            f"error: cannot listen on {options.host}:{options.port}: {error} (choose another --port)", file=sys.stderr
        )
    return 1


def _serve(options: argparse.Namespace, stop_requested: StopSignal) -> int:
    tls = load_cluster_tls(options.tls_dir)
    check_listen_address(options.host, tls, allow_insecure=options.insecure_cluster_network)
    with Checkpoint(options.checkpoint) as checkpoint:
        hosted = _parse_hosted(checkpoint.config, options.experts, options.layers)
        for _ in list_hosted_pairs(checkpoint.config, hosted):
            break
        # torch takes a second to import: not before arguments, config and index are known to be good.
        import torch

        from experts.device import resolve_device
        from experts.group import ExpertGroup
        from experts.server import ExpertServer, ReplicaIdentity
        from experts.weights import load_expert_weights

        torch.set_num_threads(options.threads)
        dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[options.dtype]

        device = resolve_device(options.device)

        def stop_early(_fraction: float) -> None:
            if stop_requested.is_set():
                sys.exit(0)

        weights = load_expert_weights(checkpoint, hosted, dtype, device=device, on_fraction=stop_early)
    replica_id = options.replica_id or f"{options.group_name}-0"
    identity = ReplicaIdentity(options.group_name, replica_id, incarnation=time.time_ns())
    server = ExpertServer(
        ExpertGroup(weights),
        identity,
        host=options.host,
        port=options.port,
        tls=tls,
        allow_insecure=options.insecure_cluster_network,
    )
    endpoint = server.start()
    ready = {
        "endpoint": endpoint,
        "replica_id": replica_id,
        "group_name": options.group_name,
        "incarnation": identity.incarnation,
        "weight_digest": weights.digest,
        "pid": os.getpid(),
    }
    print(json.dumps(ready), flush=True)
    stop_requested.wait()
    server.drain(options.drain_grace_s)
    server.stop()
    return 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experts", description="Serve one expert group replica.")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="folder of a Hugging Face checkpoint")
    parser.add_argument("--experts", metavar="FROM:TO", help="half-open range of routed experts (default: all)")
    parser.add_argument("--layers", metavar="FROM:TO", help="half-open range of layers (default: all)")
    parser.add_argument("--group-name", default="g0", help="name of the expert group (default: g0)")
    parser.add_argument("--replica-id", help="name of this replica (default: GROUP_NAME-0)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=0, help="port to listen on; 0 takes a free one (default: 0)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="compute dtype")
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:INDEX; auto: the first card if any (default: auto)"
    )
    parser.add_argument(
        "--threads",
        type=_parse_count,
        default=len(os.sched_getaffinity(0)),
        help="compute threads (default: all cores)",
    )
    parser.add_argument(
        "--drain-grace-s", type=float, default=2.0, help="seconds that open streams are still served after a signal"
    )
    parser.add_argument("--tls-dir", metavar="DIR", help="certificates of the cluster: tls.crt, tls.key, ca.crt")
    parser.add_argument("--insecure-cluster-network", action="store_true", help="listen unencrypted for other machines")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    parser.add_argument("--log-format", choices=LOG_FORMATS, default="text", help="json: one object per line")
    return parser.parse_args(arguments)


def _parse_hosted(config: ModelConfig, experts: str | None, layers: str | None) -> tuple[ExpertRange, ...]:
    layer_start, layer_end = _parse_range("--layers", layers, config.num_layers_total)
    expert_start, expert_end = _parse_range("--experts", experts, config.n_routed_experts)
    return (ExpertRange(layer_start, layer_end, expert_start, expert_end),)


def _parse_range(option: str, text: str | None, count: int) -> tuple[int, int]:
    if text is None:
        return 0, count
    start, separator, end = text.partition(":")
    if not separator or not start.isdecimal() or not end.isdecimal() or not int(start) < int(end) <= count:
        raise ConfigError(f"{option} {text}: expected FROM:TO with 0 <= FROM < TO <= {count}")
    return int(start), int(end)


def _parse_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
