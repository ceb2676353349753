"""`shoal`: the command line. This file knows the options; one module per command does the work.

Each command's module is imported when it is chosen, so that `shoal status` does not pay for Ray. Failures are one line
on stderr and exit code 1; wrong usage is exit code 2.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from cluster.batch_options import add_options as add_batch_options
from cluster.bench_options import add_options as add_bench_options
from cluster.errors import ClusterError, SettingsError
from cluster.keys_options import add_options as add_keys_options
from cluster.settings import ServeSettings, suggest
from cluster.usage_options import add_options as add_usage_options
from experts.errors import ExpertsError
from router.tenancy.errors import TenancyError

DEFAULT_URL = "http://127.0.0.1:8000"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code."""
    try:
        options = build_parser().parse_args(arguments)
        return _run(options)
    except (ClusterError, ExpertsError, TenancyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output left, as `| head` does; nothing more can be said there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="shoal", description="Serve a mixture-of-experts model as a router and expert groups.")
    parser.add_argument("--version", action="version", version=f"shoal {_get_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    _add_serve(commands.add_parser("serve", help="start a cluster and serve a checkpoint until Ctrl-C"))
    _add_serve(commands.add_parser("controller", help="on Kubernetes: control a cluster in the pods of a RayCluster"))
    leave = commands.add_parser("leave", help="in a pod that is being deleted: wait until nothing runs in it any more")
    leave.add_argument("--timeout", type=float, default=600.0, metavar="S", help="longest wait (default: 600)")
    status = commands.add_parser("status", help="what runs where, and in which state")
    _add_url(status)
    _add_json(status)
    top = commands.add_parser("top", help="the status page in a terminal: state, load, latencies, queues, events")
    top.add_argument("--once", action="store_true", help="look once and end")
    _add_url(top)
    _add_json(top)
    _add_scaling(commands)
    check = commands.add_parser("check", help="validate every byte of a checkpoint folder")
    check.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="Hugging Face folder")
    check.add_argument("--groups", type=int, default=4, metavar="N", help="expert groups to size it for (default: 4)")
    _add_json(check)
    fetch = commands.add_parser("fetch", help="copy a checkpoint from an object store or a volume, whole or not at all")
    fetch.add_argument("source", nargs="?", metavar="SOURCE", help="URL of a folder: s3://bucket/model, file:///folder")
    fetch.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="where to put it")
    fetch.add_argument("--verify-digests", action="store_true", help="of files that are there, against SHA256SUMS")
    fetch.add_argument("--wait", type=Path, metavar="FOLDER", help="only wait until another process has fetched it")
    fetch.add_argument("--timeout", type=float, default=3600.0, metavar="S", help="of --wait (default: 3600)")
    _add_certs(commands.add_parser("certs", help="a private CA for the cluster's network, and certificates of it"))
    chat = commands.add_parser("chat", help="talk to the model")
    _add_url(chat)
    _add_json(chat)
    _add_chat(chat)
    bench = commands.add_parser("bench", help="load for any OpenAI endpoint, and how it coped")
    _add_url(bench)
    _add_json(bench)
    add_bench_options(bench)
    add_keys_options(commands.add_parser("keys", help="make, list, rotate and revoke the API keys of teams"))
    add_usage_options(commands.add_parser("usage", help="what teams, keys and models used, and what it cost"))
    batch = commands.add_parser("batch", help="many requests from a file, behind everybody else's; can be resumed")
    _add_url(batch)
    _add_json(batch)
    add_batch_options(batch)
    doctor = commands.add_parser("doctor", help="what is missing or misconfigured on this machine, and how to mend it")
    doctor.add_argument("checkpoint", nargs="?", type=Path, metavar="CHECKPOINT", help="default: the demo checkpoint")
    doctor.add_argument("--groups", type=int, default=4, metavar="N", help="expert groups (default: 4)")
    doctor.add_argument("--port", type=int, default=8000, help="port of the API (default: 8000)")
    doctor.add_argument(
        "--kubernetes", action="store_true", help="look at the Kubernetes cluster to install in instead"
    )
    doctor.add_argument("--namespace", default="default", metavar="NS", help="to install in (default: default)")
    doctor.add_argument("--values", type=Path, metavar="FILE", help="values of the chart: also whether they fit")
    _add_json(doctor)
    return parser


class _Parser(argparse.ArgumentParser):
    """Adds a suggestion to the error for an unknown option."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [*self._option_string_actions]
            if (command := getattr(parsed, "command", None)) is not None:
                known = [*_get_subparser(self, command)._option_string_actions]
            self.error(f"unrecognized argument {unknown[0]}{_hint(unknown[0], known)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def _run(options: argparse.Namespace) -> int:
    match options.command:
        case "serve":
            from cluster.serve_command import run
        case "controller":
            from cluster.controller_command import run
        case "leave":
            from cluster.leave_command import run
        case "status":
            from cluster.status_command import run
        case "top":
            from cluster.top_command import run
        case "scale":
            from cluster.scale_commands import run_scale as run
        case "drain":
            from cluster.scale_commands import run_drain as run
        case "restart":
            from cluster.scale_commands import run_restart as run
        case "upgrade":
            from cluster.upgrade_command import run
        case "plan":
            from cluster.plan_command import run
        case "rebalance":
            from cluster.rebalance_command import run
        case "events":
            from cluster.events_command import run
        case "check":
            from cluster.check_command import run
        case "fetch":
            from cluster.fetch_command import run
        case "certs":
            from cluster.certs_command import run
        case "chat":
            from cluster.chat_command import run
        case "bench":
            from cluster.bench_command import run
        case "keys":
            from cluster.keys_command import run
        case "usage":
            from cluster.usage_command import run
        case "batch":
            from cluster.batch_command import run
        case "doctor":
            from cluster.doctor_command import run
        case _:
            raise SettingsError(f"unknown command {options.command}")
    return run(options)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    """One option per field of ServeSettings; values are checked there, together with environment and YAML."""
    parser.set_defaults(settings={})
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with any of these settings")
    for name, field in ServeSettings.model_fields.items():
        flag = "--" + name.replace("_", "-")
        help_text = (field.description or "").replace("%", "%%")
        # What is empty says so itself, as does what a factory makes.
        if field.default_factory is None and field.default not in (None, ""):
            help_text += f" (default: {_show(field.default)})"
        if name == "checkpoint":
            parser.add_argument(name, nargs="?", metavar="CHECKPOINT", action=_Setting, help=help_text)
        elif name == "admin_token":
            # A command line can be read by every user of the machine.
            continue
        elif field.annotation in (bool, bool | None):
            parser.add_argument(flag, f"--no-{flag[2:]}", dest=name, nargs=0, action=_Setting, help=help_text)
        elif get_origin(field.annotation) is Literal:
            choices = [str(choice) for choice in get_args(field.annotation)]
            metavar = "|".join(choices)
            parser.add_argument(flag, dest=name, choices=choices, metavar=metavar, action=_Setting, help=help_text)
        else:
            parser.add_argument(flag, dest=name, metavar=name.upper(), action=_Setting, help=help_text)


class _Setting(argparse.Action):
    """Collects only the options that were given, so that the others can come from environment or YAML."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        if self.nargs == 0:
            values = not str(option_string).startswith("--no-")
        if values is not None:
            namespace.settings = {**namespace.settings, self.dest: values}


def _add_scaling(commands: Any) -> None:
    scale = commands.add_parser("scale", help="change how many replicas expert groups have")
    scale.add_argument("counts", nargs="+", metavar="GROUP=N", help="for example g0=2")
    scale.add_argument("--force", action="store_true", help="allow 0 replicas, with which no request can be served")
    drain = commands.add_parser("drain", help="replace one expert group replica: start another, then let it leave")
    drain.add_argument("replica", metavar="REPLICA", help="for example g0-1")
    restart = commands.add_parser("restart", help="replace all replicas of expert groups, one at a time")
    restart.add_argument("groups", nargs="*", metavar="GROUP", help="default: every group")
    for parser in (scale, restart):
        parser.add_argument("--wait", action="store_true", help="until the cluster is as desired")
    upgrade = commands.add_parser(
        "upgrade", help="serve another checkpoint instead, group by group and without a pause"
    )
    upgrade.add_argument("checkpoint", nargs="?", type=Path, metavar="CHECKPOINT", help="folder, on every node")
    upgrade.add_argument("--abort", action="store_true", help="undo one that does not serve requests yet")
    upgrade.add_argument("--wait", action="store_true", help="until nothing of the old checkpoint is left")
    upgrade.add_argument(
        "--timeout", type=float, default=3600.0, metavar="S", help="until it is loaded, else undone (default: 3600)"
    )
    upgrade.add_argument(
        "--drain-timeout", type=float, default=3600.0, metavar="S", help="for answers begun before (default: 3600)"
    )
    plan = commands.add_parser("plan", help="what the controller does now, what it waits for, and why")
    events = commands.add_parser("events", help="what happened to the cluster, and why")
    events.add_argument("--follow", "-f", action="store_true", help="go on until Ctrl-C")
    rebalance = commands.add_parser("rebalance", help="host hot experts in more groups, and tell what it gained")
    rebalance.add_argument("--dry-run", action="store_true", help="only say what it would gain; nothing is moved")
    rebalance.add_argument(
        "--extra-share", type=float, default=0.12, metavar="X", help="memory for further copies (default: 0.12)"
    )
    for parser in (scale, drain, restart, rebalance):
        parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="longest wait (default: 600)")
    for parser in (scale, drain, restart, upgrade, plan, events, rebalance):
        _add_url(parser)
        _add_json(parser)


def _add_certs(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="certs_command", required=True, metavar="ACTION")
    init = actions.add_parser("init", help="make a CA: ca.crt and ca.key")
    init.add_argument("ca_folder", type=Path, metavar="CA_FOLDER")
    init.add_argument("--days", type=int, default=3650, metavar="N", help="until it expires (default: 3650)")
    issue = actions.add_parser("issue", help="make a certificate of it: tls.crt, tls.key and ca.crt")
    issue.add_argument("ca_folder", type=Path, metavar="CA_FOLDER")
    issue.add_argument("folder", type=Path, metavar="FOLDER", help="for --cluster-tls-dir")
    issue.add_argument("--name", action="append", default=[], metavar="DNS", help="a further name; repeatable")
    issue.add_argument("--days", type=int, default=90, metavar="N", help="until it expires (default: 90)")


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--message", "-m", help="send this, print the answer and end; without it: a conversation")
    parser.add_argument("--system", help="system message to begin with")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.7, metavar="T", help="0 is greedy (default: 0.7)")
    parser.add_argument("--seed", type=int, help="same seed, same answer; default: a random one")
    parser.add_argument("--api-key", help="bearer token; default: OPENAI_API_KEY, which no other user can read")


def _add_url(parser: argparse.ArgumentParser) -> None:
    default = os.environ.get("SHOAL_URL", DEFAULT_URL)
    parser.add_argument("--url", default=default, help=f"of the running cluster (default: {default})")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _get_subparser(parser: argparse.ArgumentParser, command: str) -> argparse.ArgumentParser:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices[command]
    return parser


def _hint(word: str, known: Sequence[str]) -> str:
    hint = suggest(word.split("=")[0], known)
    return hint if "did you mean" in hint else ""


def _show(value: object) -> str:
    return {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _get_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("shoal")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
