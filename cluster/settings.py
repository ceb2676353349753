"""One schema for `shoal serve`: command line flags, SHOAL_* environment variables and the YAML of --config.

Precedence: flag > environment > YAML > default. Only this module reads SHOAL_* variables. It knows nothing of
Ray, and builds the plain values that the rest of the package takes.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from cluster.autoscaler import AutoscaleRule
from cluster.errors import SettingsError
from cluster.state_file import get_state_dir
from experts.logs import LogFormat
from router.api.settings import ReasoningField
from router.overlap_policy import MicroBatchSetting, parse_micro_batches

ENV_PREFIX = "SHOAL_"
# Variables that other commands read; they are no settings of a cluster.
_OTHER_VARIABLES = frozenset({"SHOAL_API_KEY", "SHOAL_STATE_DIR", "SHOAL_URL", "SHOAL_SESSION", "SHOAL_KUBE_ASSETS"})
# A Kubernetes service called "shoal" makes the kubelet put such variables into every pod beside it.
_SERVICE_LINK = re.compile(r"SHOAL(_[A-Z0-9_]+)?_(SERVICE_(HOST|PORT)(_[A-Z0-9_]+)?|PORT(_\d+_(TCP|UDP)(_[A-Z]+)?)?)")

# In a database's URL.
_PASSWORD = re.compile(r"(://[^/@:]*:)[^@/]*(@)")

Port = Annotated[int, Field(ge=1, le=65535)]


class AutoscaleSettings(BaseModel):
    """How many replicas a group may have by itself, and for what load; see cluster/autoscaler.py."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min: Annotated[int, Field(ge=1, le=64)] = Field(1, description="fewest replicas")
    max: Annotated[int, Field(ge=1, le=64)] = Field(4, description="most replicas")
    busy_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.6, description="part of the time that a replica should compute"
    )
    queue_ms: Annotated[float, Field(gt=0)] = Field(5.0, description="mean wait of a frame in ms above which it grows")
    grow_after_s: Annotated[float, Field(ge=0)] = Field(3.0, description="seconds of too much load before it grows")
    shrink_after_s: Annotated[float, Field(ge=0)] = Field(30.0, description="seconds of too little before it shrinks")
    cooldown_s: Annotated[float, Field(ge=0)] = Field(10.0, description="seconds after a change without another")

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self

    def build_rule(self) -> AutoscaleRule:
        return AutoscaleRule(
            min_replicas=self.min,
            max_replicas=self.max,
            target_busy_share=self.busy_share,
            target_queue_ms=self.queue_ms,
            grow_after_s=self.grow_after_s,
            shrink_after_s=self.shrink_after_s,
            cooldown_s=self.cooldown_s,
        )


class ServeSettings(BaseModel):
    """What `shoal serve` serves and how. None always means what the field's line says."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    checkpoint: Path | None = Field(None, description="Hugging Face folder to serve; None: the demo checkpoint")
    groups: Annotated[int, Field(ge=1, le=4096)] = Field(4, description="number of expert groups")
    replicas: Annotated[int, Field(ge=1, le=64)] = Field(1, description="replicas of each expert group")
    routers: Annotated[int, Field(ge=1, le=64)] = Field(1, description="number of routers")
    host: str = Field("127.0.0.1", description="address the OpenAI API listens on")
    port: Port = Field(8000, description="TCP port of the OpenAI API")
    admin_host: str = Field("127.0.0.1", description="address the admin API listens on")
    admin_port: Port | None = Field(None, description="TCP port of the admin API; None: port + 1")
    admin_token: SecretStr | None = Field(None, description="bearer token of the admin API; None: a new random one")
    keys_file: Path | None = Field(
        None, description="teams and API keys, as `shoal keys` writes it; None: no keys, on loopback only"
    )
    auth: bool = Field(True, description="off: let everybody in without a key, whatever the address")
    priority_ageing_s: Annotated[float, Field(gt=0, le=86400)] = Field(
        60.0, description="seconds of waiting after which a request rises a class of priority"
    )
    ledger: str | None = Field(
        None,
        description="database of usage: sqlite:///FILE, postgresql://..., or off; None: a file in the state folder",
    )
    ledger_retention_days: Annotated[int, Field(ge=1, le=36500)] = Field(
        400, description="days after which usage is kept as sums by day only"
    )
    gpu_hour_price: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        None, description="of one router or expert group replica for an hour, for `shoal usage`; None: no costs"
    )
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="arithmetic of trunk and experts")
    wire_dtype: Literal["bfloat16", "float32", "fp8", "fp8-both"] = Field(
        "bfloat16",
        description="activations between router and expert groups; fp8: FP8 out and bfloat16 back, fp8-both: both ways",
    )
    combine: Literal["reduced", "exact"] = Field(
        "reduced", description="reduced: one partial sum per row and group; exact: one row per expert, more bytes"
    )
    deterministic: bool | None = Field(
        None,
        description="output independent of batch mates, chunking, retries and failures; None: where it costs nothing, "
        "which is with the native CPU kernel",
    )
    micro_batches: Annotated[MicroBatchSetting, BeforeValidator(parse_micro_batches)] = Field(
        "auto",
        description="parts of a step that compute while others wait for experts; auto: as many as measured to pay, "
        "off, or a number",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where experts and trunk compute; auto: on the Ray cluster's cards if it has any"
    )
    address: str | None = Field(None, description="Ray cluster to join, e.g. auto or HOST:PORT; None: start one here")
    insecure_cluster_network: bool = Field(
        False, description="let routers and expert groups listen, unencrypted, on the cluster's own network"
    )
    cluster_tls_dir: Path | None = Field(
        None,
        description="folder on every node with tls.crt, tls.key and ca.crt, which encrypt the network between routers, "
        "expert groups and the controller; None: no encryption",
    )
    tls_cert: Path | None = Field(None, description="certificate chain to serve the API over HTTPS; None: HTTP")
    tls_key: Path | None = Field(None, description="key of tls_cert")
    max_model_len: Annotated[int, Field(ge=1)] | None = Field(
        None, description="longest sequence in tokens; None: what the checkpoint was made for"
    )
    kv_cache_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="tokens of KV cache in each router; None: half the memory free once the weights are loaded"
    )
    speculative_tokens: Annotated[int, Field(ge=0, le=8)] | None = Field(
        None,
        description="most tokens to draft per step with the MTP layer; 0: none; None: as many as pay, if there is one",
    )
    expert_wait_s: Annotated[float, Field(gt=0, le=3600)] = Field(
        30.0, description="seconds a request waits for an expert group without a live replica, then 503"
    )
    router_wait_s: Annotated[float, Field(gt=0, le=3600)] = Field(
        30.0, description="seconds a request waits for a router while there is none, or its own was lost, then 503"
    )
    heartbeat_s: Annotated[float, Field(ge=0.02, le=60)] = Field(
        0.2, description="seconds between two heartbeats of an expert group replica"
    )
    missed_heartbeats: Annotated[int, Field(ge=1, le=100)] = Field(
        3, description="unanswered heartbeats in a row after which a replica counts as dead"
    )
    numerics: Literal["sticky", "uniform", "mixed"] = Field(
        "sticky",
        description="replicas that compute otherwise than their group's first in the last bits; sticky: only when no "
        "other is left, uniform: never, mixed: always, each by its speed",
    )
    max_missing_experts: Annotated[int, Field(ge=0, le=64)] = Field(
        0,
        description="experts of a token that are left out, not waited for, while nobody serves them; another model "
        "then answers, which responses say; 0: none",
    )
    expert_threads: Annotated[int, Field(ge=1)] | None = Field(
        None, description="CPU threads of one expert group replica; None: the cores divided by the replicas"
    )
    router_threads: Annotated[int, Field(ge=1)] | None = Field(
        None, description="CPU threads of one router; None: half the cores divided by the routers"
    )
    model_name: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None, description="name of the model in the API; None: the name of the checkpoint's folder"
    )
    model_aliases: str = Field(
        "", description="further names of the model in the API, with commas between them; empty: none"
    )
    reasoning_field: ReasoningField = Field(
        "reasoning_content", description="field of chat messages that has the reasoning; reasoning is vLLM's newer name"
    )
    strict_fields: bool = Field(False, description="refuse request fields that have no meaning here; else ignored")
    autoscale: dict[str, AutoscaleSettings] = Field(
        default_factory=dict,
        description='replicas by load, e.g. {"g*": {min: 1, max: 4}}, the first pattern that matches; empty: fixed',
    )
    autoscale_dry_run: bool = Field(False, description="let `shoal plan` say what autoscaling would do, and do nothing")
    load_from: Literal["disk", "peer"] = Field(
        "disk",
        description="where a replica that starts gets its experts; peer: from another one of its group while there is "
        "one, over the network",
    )
    rebalance_interval_s: Annotated[float, Field(ge=10, le=86400)] | None = Field(
        None,
        description="seconds between two looks of the balancer for experts to move or copy; None: when it is asked",
    )
    rebalance_extra_share: Annotated[float, Field(ge=0, le=10)] = Field(
        0.12, description="memory for further copies of hot experts, as a part of what each expert group begins with"
    )
    trace_to: str | None = Field(
        None, description="where spans of sampled requests go: an OTLP/HTTP collector's URL, or a file; None: no traces"
    )
    trace_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01, description="part of the requests without a traceparent of their own that are traced"
    )
    metrics_compat: Literal["none", "vllm"] = Field("none", description="vllm: /metrics has vLLM's names, too")
    drain_timeout_s: Annotated[float, Field(ge=0, le=86400)] = Field(
        120.0, description="seconds that running requests may take to end when the cluster stops"
    )
    start_timeout_s: Annotated[float, Field(gt=0, le=86400)] = Field(
        1800.0, description="seconds until the cluster must be ready, loading included"
    )
    kubernetes_cluster: Annotated[str, Field(min_length=1, max_length=63)] | None = Field(
        None, description="RayCluster on whose pods `shoal controller` runs routers and expert groups"
    )
    kubernetes_namespace: Annotated[str, Field(min_length=1, max_length=63)] = Field(
        "default", description="namespace of that RayCluster"
    )
    kubernetes_lease: Annotated[str, Field(min_length=1, max_length=253)] | None = Field(
        None, description="Lease that says which controller leads; None: the RayCluster's name with -controller"
    )
    kubernetes_scaling: Literal["ray", "controller"] = Field(
        "ray", description="who makes pods; ray: its autoscaler, controller: `shoal controller`, with that one off"
    )
    kubernetes_gpus_per_pod: Annotated[float, Field(ge=0, le=64)] = Field(
        0.0, description="GPUs that the one actor of a pod takes; 0: computes on CPUs"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe message shown")
    log_format: LogFormat = Field("text", description="json: one object per line, in the logs of all processes")

    @field_validator("autoscale", mode="before")
    @classmethod
    def _read_text(cls, value: object) -> object:
        """Flags and variables give the mapping as text."""
        if not isinstance(value, str):
            return value
        try:
            return yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError('must be a mapping such as {"g*": {max: 4}}') from None

    @model_validator(mode="after")
    def _refuse_what_is_not_there(self) -> Self:
        if self.device == "cuda" and self.deterministic:
            raise ValueError(
                "device cuda with deterministic: the trunk's products on a card depend on the rows beside a row; use "
                "device cpu, or --no-deterministic"
            )
        if self.keys_file is not None and not self.auth:
            raise ValueError("keys_file with --no-auth: keys that nobody needs; leave one of them out")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together: give both, or none")
        if self.admin_port is None and self.port == 65535:
            raise ValueError("port 65535 leaves none for the admin API: set admin_port")
        if self.admin_port == self.port:
            raise ValueError(f"admin_port {self.admin_port} is the port of the API too: choose another")
        return self

    @property
    def resolved_admin_port(self) -> int:
        return self.port + 1 if self.admin_port is None else self.admin_port

    @property
    def resolved_kubernetes_lease(self) -> str:
        return self.kubernetes_lease or f"{self.kubernetes_cluster}-controller"

    @property
    def resolved_cluster_tls_dir(self) -> str | None:
        """As processes elsewhere need it."""
        return None if self.cluster_tls_dir is None else str(self.cluster_tls_dir.absolute())

    @property
    def url(self) -> str:
        return f"{'http' if self.tls_cert is None else 'https'}://{_url_host(self.host)}:{self.port}"

    @property
    def admin_url(self) -> str:
        scheme = "http" if self.cluster_tls_dir is None else "https"
        return f"{scheme}://{_url_host(self.admin_host)}:{self.resolved_admin_port}"

    @property
    def ledger_url(self) -> str | None:
        """None: the ledger is off."""
        if self.ledger == "off":
            return None
        return self.ledger or f"sqlite:///{get_state_dir() / 'ledger.db'}"

    def split_aliases(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.model_aliases.split(",") if name.strip())

    def describe(self) -> str:
        """The effective settings as one line; secrets masked."""
        values = self.model_dump(mode="json")
        if self.ledger is not None:
            values["ledger"] = _PASSWORD.sub(r"\1***\2", self.ledger)
        return " ".join(f"{name}={value}" for name, value in values.items() if value is not None)


class ThreadSplit(NamedTuple):
    """CPU threads of one expert group replica and of one router."""

    expert_threads: int
    router_threads: int


def split_threads(settings: ServeSettings, num_cores: int) -> ThreadSplit:
    """Share out the cores of one machine, unless the settings say otherwise.

    Expert groups compute at the same time and get all the cores. Routers compute while these wait, but beside the
    HTTP front, and a second thread on a busy core costs more than it brings (20 against 17 ms per token of the demo
    on 2 cores): they get half.
    """
    return ThreadSplit(
        settings.expert_threads or max(1, num_cores // (settings.groups * settings.replicas)),
        settings.router_threads or max(1, num_cores // (2 * settings.routers)),
    )


def load_settings(
    flags: Mapping[str, Any], *, config_file: Path | None = None, environ: Mapping[str, str] | None = None
) -> ServeSettings:
    """Merge flags (only those given), environment and YAML file; None for environ means the process's own.

    Raises SettingsError naming the source, the value and the remedy.
    """
    environ = os.environ if environ is None else environ
    sources = {
        "command line": dict(flags),
        "environment": _read_environment(environ),
        f"file {config_file}": _read_yaml(config_file) if config_file is not None else {},
    }
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for source, values in sources.items():
        for key, value in values.items():
            if key not in merged:
                merged[key] = value
                origin[key] = source
    try:
        return ServeSettings(**merged)
    except ValidationError as error:
        raise SettingsError(_describe_errors(error, origin)) from None


def _read_environment(environ: Mapping[str, str]) -> dict[str, str]:
    values: dict[str, str] = {}
    for variable, value in environ.items():
        if not variable.startswith(ENV_PREFIX) or variable in _OTHER_VARIABLES or value == "":
            continue
        if _SERVICE_LINK.fullmatch(variable) and (variable != "SHOAL_PORT" or value.startswith(("tcp://", "udp://"))):
            continue
        key = variable.removeprefix(ENV_PREFIX).lower()
        if key not in ServeSettings.model_fields:
            known = [ENV_PREFIX + name.upper() for name in ServeSettings.model_fields]
            raise SettingsError(f"unknown environment variable {variable}{suggest(variable, known)}")
        values[key] = value
    return values


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read the settings file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"the settings file {path} is not valid YAML: {reason}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise SettingsError(f"the settings file {path} must be a mapping of settings, not a {type(document).__name__}")
    for key in document:
        if key not in ServeSettings.model_fields:
            raise SettingsError(
                f"unknown setting {key!r} in {path}{suggest(str(key).replace('-', '_'), ServeSettings.model_fields)}"
            )
    return document


def suggest(word: str, known: Iterable[str]) -> str:
    """A hint such as `: did you mean 'groups'?`, or how to see what there is."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f": did you mean {close[0]!r}?" if close else ": see `shoal serve --help` for what there is"


def _describe_errors(error: ValidationError, origin: Mapping[str, str]) -> str:
    lines: list[str] = []
    for item in error.errors(include_url=False):
        message = item["msg"].removeprefix("Value error, ")
        if not item["loc"]:
            lines.append(message)
            continue
        key = str(item["loc"][0])
        shown = "" if key == "admin_token" else f" (got {str(item['input'])[:80]!r})"
        lines.append(f"{key} from the {origin.get(key, 'settings')}: {message[0].lower()}{message[1:]}{shown}")
    return "; ".join(dict.fromkeys(lines))


def _url_host(host: str) -> str:
    """How a client on this machine reaches a listening address."""
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
