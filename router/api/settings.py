"""Settings of the HTTP front: one frozen dataclass, filled by the command line or by cluster/."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from experts.logs import LogFormat

ReasoningField = Literal["reasoning_content", "reasoning", "both"]


@dataclass(frozen=True)
class ApiSettings:
    """What the front serves and the bounds it keeps. Bounds are refusals, never truncations."""

    checkpoint: Path
    """Folder of the Hugging Face checkpoint: config.json and the tokenizer files are read, no weights."""
    served_model_names: tuple[str, ...] = ()
    """Names that requests may give as `model`, the first one being answered; empty: the folder's name."""
    keys_file: Path | None = None
    """Teams and keys (router/tenancy/key_file.py); None: everybody may use everything, without a key."""
    usage_journal: Path | None = None
    """Folder for what requests use, from which the ledger's writer takes it; None: usage is not recorded."""
    ledger_url: str | None = field(default=None, repr=False)
    """Database that a child of the front writes the journal into; None: somebody else does. May hold a password."""
    ledger_retention_days: int = 400
    """Then records become sums by day."""
    max_model_len: int | None = None
    """Context length in tokens, prompt and answer together; None: the checkpoint's max_position_embeddings.
    Must not be larger than the routers' own."""
    cluster_tls_dir: str | None = None
    """Folder of the certificates with which routers are called; None: unencrypted."""
    request_timeout_s: float = 600.0
    """Longest life of one request; the same 600 s as the openai client's default."""
    router_wait_s: float = 30.0
    """How long a request that no router takes, or whose router was lost, waits for one before it is answered with 503.
    """
    router_silence_s: float = 1.0
    """A stream without a token for this long has its router asked for its status."""
    router_dead_s: float = 5.0
    """A router that does not answer that question for so long loses its streams to another. Longer than any router
    computes without a pause."""
    status_timeout_s: float = 2.0
    """Deadline of one question for a router's status."""
    max_step_s: float = 60.0
    """A router whose current step runs longer counts as stuck: not ready."""
    body_timeout_s: float = 30.0
    """Longest time that a client may take to send its body."""
    send_timeout_s: float = 60.0
    """A client that does not read a chunk of its stream for this long counts as gone."""
    ping_interval_s: float = 15.0
    """A comment is sent on a silent stream this often, so that proxies keep it open."""
    status_line_wait_s: float = 40.0
    """A stream's status line waits this long for a first token, so that a request that is turned away after
    router_wait_s, or the routers' expert_wait_s, gets a proper status."""
    retry_after_s: int = 2
    """Advice to clients that are turned away for the moment."""
    max_body_bytes: int = 8 * 1024 * 1024
    max_concurrent_requests: int = 1024
    """Requests for text being worked on in this process; more are answered with 429."""
    max_sequences: int = 128
    """Most sequences one request may ask for: prompts times n."""
    strict_fields: bool = False
    """Refuse request fields that have no meaning here, instead of ignoring them as most servers do."""
    viewer_token: str | None = None
    """With which the front reads the controller's admin API for the status page; whoever sends a token that it follows
    from is the administrator. None: there is no controller."""
    trace_to: str | None = None
    """Where spans of sampled requests go: URL of an OTLP/HTTP collector, or a file; None: no traces."""
    trace_share: float = 0.01
    """Of the requests without a traceparent that are sampled; the others go by what theirs says."""
    metrics_compat: Literal["none", "vllm"] = "none"
    """vllm: /metrics has vLLM's names, too."""
    reasoning_field: ReasoningField = "reasoning_content"
    """Of chat messages: DeepSeek's and SGLang's name, vLLM's newer one, or both of them."""
    host_sends_request_id: bool = False
    """Ray Serve's proxy does: it adds the client's, or one that it has made for the request, to every answer."""
    log_format: LogFormat = "text"
    """Of this process and its children."""
    num_text_threads: int = 2
    """Threads for tokenising, templates and large JSON, which would stall the event loop."""
