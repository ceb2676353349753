"""One router in one process: loads the trunk, owns the event loop, serves the gRPC service.

The loop runs in a thread of its own, so that the host (a Ray actor, or `python -m router`) keeps its own main thread.
Engine, connections and RPC handlers share that loop: no locks, and one step is one turn of it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import threading
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import grpc.aio
import psutil
import torch
import uvloop

from experts.channels import listen
from experts.checkpoint import Checkpoint
from experts.device import resolve_device
from experts.errors import ConfigError
from experts.kernels.cpu_ffn import load_cpu_kernel
from experts.memory import get_available_bytes
from experts.model_config import ModelConfig
from experts.tls import check_listen_address, load_cluster_tls
from experts.wire import MAX_MESSAGE_BYTES, WireFormat
from router.block_pool import BLOCK_SIZE, count_blocks
from router.dispatch import CombineMode, Dispatcher, DispatchOptions
from router.draft_policy import DraftPolicy
from router.drafter import Drafter
from router.engine import Engine
from router.errors import NotReady
from router.expert_pool import ExpertPool, Numerics, PoolOptions
from router.fair_queue import DEFAULT_AGEING_S, FairQueue
from router.grammar import GrammarCompiler
from router.heartbeat import DEFAULT_HEARTBEATS, HeartbeatOptions
from router.latent_cache import LatentCache, cache_bytes_per_token
from router.llguidance_grammars import LlguidanceCompiler
from router.mtp import MtpModule
from router.mtp_drafter import MtpDrafter
from router.overlap_policy import MicroBatchSetting, OverlapPolicy
from router.queue_policy import FirstComeFirstServed
from router.scheduler import SchedulerLimits
from router.service import RouterService, wait_drained
from router.service_tallies import ServiceTallies
from router.static_experts import StaticExperts
from router.tracing import Tracer
from router.trunk import Trunk
from router.v1 import router_pb2_grpc
from router.weights import TrunkWeights, load_trunk_weights

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 30.0
STOP_GRACE_S = 2.0
# Share of the memory that is free after loading which sequences may fill with their latent cache.
CACHE_MEMORY_SHARE = 0.5
# Of expert_wait_s, after which experts count as gone: the step that was under way when they were lost has waited a
# little longer for them than they have been away, and nobody else should wait when it gives up.
OUTAGE_SHARE = 0.9
# Of a card, left free for a step. 2,048 tokens of DeepSeek-V3 take most in attention: projected queries 0.1 GB,
# absorbed ones 0.3, latents 0.3, a run's rows and scores 0.4 (cuda_attention.RUN_BYTES); then waste.
CARD_WORKING_BYTES = 1_500_000_000
# What a policy that measures may choose from. Beyond that, a draft that holds is rare with one MTP layer.
DEFAULT_SPECULATIVE_TOKENS = 2
MAX_SPECULATIVE_TOKENS = 8

_T = TypeVar("_T")


@dataclass(frozen=True)
class RouterConfig:
    """max_model_len: tokens of prompt and answer; None: the checkpoint's max_position_embeddings.
    micro_batches: that a step is split into. expert_endpoints: host:port of known replicas; empty: wait for
    UpdateExpertTable. num_threads: of torch; None: its default. device: auto, cpu, cuda or cuda:INDEX, where the trunk
    computes. kv_cache_tokens: of the latent cache; None: half of the memory that is free once the weights are loaded,
    on a card all of it but what a step takes. deterministic: None: where it costs nothing, which is with the
    native CPU kernel. speculative_tokens: most tokens to draft per step; 0: none;
    None: DEFAULT_SPECULATIVE_TOKENS, if the checkpoint has an MTP layer. call_timeout_s: one attempt of one expert
    call. expert_wait_s: for a group with no usable replica. heartbeats: of the
    expert replicas. numerics: see expert_pool.PoolOptions. queue_policy: who is next; fair: shared out between the
    fairness_keys of requests, fcfs: by arrival. priority_ageing_s: of waiting, after which a request rises a class.
    max_missing_experts: see router/degradation.py; 0: a token waits for all of its experts. tls_dir: of certificates;
    None: unencrypted, which allow_insecure permits on an address that others reach.
    trace_to: see tracing.Tracer; None: no traces. weights_version: of the checkpoint, which answers carry; 0: not
    known, as where nobody upgrades."""

    checkpoint: str
    router_id: str = "r0"
    weights_version: int = 0
    host: str = "127.0.0.1"
    port: int = 0
    dtype: torch.dtype = torch.bfloat16
    wire_format: WireFormat = WireFormat.BFLOAT16
    combine: CombineMode = "reduced"
    deterministic: bool | None = None
    micro_batches: MicroBatchSetting = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_batched_tokens: int = 2048
    max_waiting: int = 2048
    queue_policy: Literal["fair", "fcfs"] = "fair"
    priority_ageing_s: float = DEFAULT_AGEING_S
    speculative_tokens: int | None = None
    kv_cache_tokens: int | None = None
    call_timeout_s: float = 30.0
    expert_wait_s: float = 30.0
    heartbeats: HeartbeatOptions = DEFAULT_HEARTBEATS
    numerics: Numerics = "sticky"
    max_missing_experts: int = 0
    num_threads: int | None = None
    device: str = "cpu"
    expert_endpoints: tuple[str, ...] = ()
    tls_dir: str | None = None
    allow_insecure: bool = False
    trace_to: str | None = None


class RouterServer:
    """Thread-safe from outside; everything inside happens on its event loop."""

    def __init__(self, config: RouterConfig) -> None:
        """Reads the checkpoint's config and index, no weights. Raises ConfigError or CheckpointError."""
        self._config = config
        self._tls = load_cluster_tls(config.tls_dir)
        check_listen_address(config.host, self._tls, allow_insecure=config.allow_insecure)
        self._checkpoint = Checkpoint(config.checkpoint)
        self._model: ModelConfig = self._checkpoint.config
        self._max_model_len = _resolve_max_model_len(config, self._model)
        if config.max_num_seqs > config.max_batched_tokens:
            raise ConfigError(
                f"max_num_seqs ({config.max_num_seqs}) must not exceed max_batched_tokens ({config.max_batched_tokens})"
            )
        if config.kv_cache_tokens is not None and config.kv_cache_tokens < 1:
            raise ConfigError(f"kv_cache_tokens is {config.kv_cache_tokens}: a KV cache holds one token at least")
        # A card's products depend on the rows beside a row: deterministic output is the CPU kernel's.
        wanted = "cpu" if config.deterministic and config.device == "auto" else config.device
        self._device = resolve_device(wanted)
        if config.deterministic and self._device.type != "cpu":
            raise ConfigError(f"deterministic output is not to be had on {self._device}: use --device cpu")
        can_repeat = self._device.type == "cpu" and load_cpu_kernel(config.dtype) is not None
        if config.deterministic and not can_repeat:
            raise ConfigError(
                "deterministic output needs the native CPU kernel (torch's products depend on the rows beside a row): "
                "install g++ 11 or newer, or serve with --no-deterministic"
            )
        self._is_deterministic = can_repeat if config.deterministic is None else config.deterministic
        self._speculative_tokens = _resolve_speculative_tokens(config, self._model)
        self._engine: Engine | None = None
        self._engine_made_at = 0.0
        self._grammars: GrammarCompiler | None = None
        self._drain_requested = False
        self._pool: ExpertPool | None = None
        self._fair_queue = None
        if config.queue_policy == "fair":
            self._fair_queue = FairQueue(time.monotonic, config.priority_ageing_s)
        self._tallies = ServiceTallies(self._fair_queue, time.monotonic)
        # Sampled is what the front says.
        self._tracer = None if config.trace_to is None else Tracer("shoal-router", config.trace_to, share=0.0)
        self._load_progress = 0.0
        self._is_stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._server: grpc.aio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._loaded: concurrent.futures.Future[None] = concurrent.futures.Future()

    @property
    def router_id(self) -> str:
        return self._config.router_id

    @property
    def weights_version(self) -> int:
        return self._config.weights_version

    @property
    def engine(self) -> Engine | None:
        return self._engine

    @property
    def pool(self) -> ExpertPool:
        assert self._pool is not None  # made before the service listens
        return self._pool

    @property
    def tallies(self) -> ServiceTallies:
        return self._tallies

    @property
    def grammars(self) -> GrammarCompiler | None:
        """None while the weights load, and without a tokenizer."""
        return self._grammars

    @property
    def tracer(self) -> Tracer | None:
        return self._tracer

    @property
    def load_progress(self) -> float:
        return self._load_progress

    def start(self) -> str:
        """Listen, and load the weights meanwhile. Returns host:port. Raises OSError if the port is taken."""
        if self._config.num_threads is not None:
            torch.set_num_threads(self._config.num_threads)
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="router", daemon=True)
        self._thread.start()
        return self._submit(self._listen()).result(START_TIMEOUT_S)

    def wait_loaded(self, timeout_s: float | None = None) -> None:
        """Block until the weights are loaded. Raises what loading raised, or TimeoutError."""
        self._loaded.result(timeout_s)

    def is_loaded(self, wait_s: float) -> bool:
        """Whether the weights are loaded, waiting at most wait_s for it. Raises what loading raised."""
        concurrent.futures.wait([self._loaded], timeout=wait_s)
        if not self._loaded.done():
            return False
        self._loaded.result()
        return True

    def drain(self, timeout_s: float) -> int:
        """Take nothing new and let what runs finish. Returns the number of sequences left when the time was over."""
        return self._submit(self._drain(timeout_s)).result(timeout_s + START_TIMEOUT_S)

    def stop(self) -> None:
        """End the service, the connections and the loop. Running calls are ended as UNAVAILABLE."""
        if self._loop is None or self._thread is None:
            return
        self._is_stopping = True
        self._submit(self._close()).result(START_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(START_TIMEOUT_S)
        self._loop = None

    def _submit(self, coroutine: Coroutine[Any, Any, _T]) -> concurrent.futures.Future[_T]:
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _run_loop(self) -> None:
        assert self._loop is not None
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _listen(self) -> str:
        self._pool = ExpertPool(self._model, PoolOptions(self._config.heartbeats, self._config.numerics, self._tls))
        self._server = grpc.aio.server(
            options=(
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
            )
        )
        router_pb2_grpc.add_RouterServiceServicer_to_server(RouterService(self), self._server)
        address = f"{self._config.host}:{self._config.port}"
        try:
            port = listen(self._server, address, self._tls)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: is the port taken?") from error
        await self._server.start()
        loop = asyncio.get_running_loop()
        self._tasks.append(loop.create_task(self._load_and_run(), name="engine"))
        if self._config.expert_endpoints:
            static = StaticExperts(self._config.expert_endpoints, self._pool, self._tls)
            self._tasks.append(loop.create_task(static.run(), name="static experts"))
        return f"{self._config.host}:{port}"

    async def _load_and_run(self) -> None:
        config = self._config
        try:
            weights = await asyncio.to_thread(
                load_trunk_weights,
                self._checkpoint,
                config.dtype,
                device=self._device,
                with_mtp=self._speculative_tokens > 0,
                deterministic=self._is_deterministic,
                on_layer=self._set_load_progress,
            )
            self._grammars = await asyncio.to_thread(
                LlguidanceCompiler.from_checkpoint,
                Path(config.checkpoint),
                self._model.vocab_size,
                self._model.eos_token_ids,
            )
            if self._device.type == "cuda":
                # Kernels are launched on the current device of this thread, which runs the engine.
                torch.cuda.set_device(self._device)
            dispatcher = Dispatcher(
                self.pool,
                DispatchOptions(
                    config.wire_format,
                    config.combine,
                    config.call_timeout_s,
                    config.expert_wait_s,
                    config.max_missing_experts,
                ),
            )
            limits = self._limits()
            with torch.inference_mode():
                cache = LatentCache(self._model, limits.num_blocks, config.dtype, self._device)
                trunk = Trunk(
                    self._model,
                    weights,
                    dispatcher,
                    cache,
                    max_model_len=self._max_model_len,
                    deterministic=self._is_deterministic,
                )
                drafter = self._build_drafter(weights, dispatcher, cache)
            self._engine = Engine(
                self._model,
                trunk,
                limits,
                max_model_len=self._max_model_len,
                drafter=drafter,
                overlap=OverlapPolicy(config.micro_batches),
                find_outage=self._find_outage,
                queue_policy=self._fair_queue or FirstComeFirstServed(),
                count_expert_groups=lambda: len(self.pool.table.groups),
                hops=self.pool.hops,
            )
            self._engine_made_at = time.monotonic()
        except BaseException as error:
            self._loaded.set_exception(error)
            raise
        self._loaded.set_result(None)
        if self._drain_requested:
            self._engine.start_drain()
        try:
            await self._engine.run()
        finally:
            if not self._is_stopping:
                # It never ends by itself. A process without it would look alive and answer nobody: be restarted.
                logger.critical("the engine ended; ending the process", exc_info=True)
                os._exit(1)

    def _build_drafter(self, weights: TrunkWeights, dispatcher: Dispatcher, cache: LatentCache) -> Drafter | None:
        if weights.mtp is None:
            return None
        module = MtpModule(
            self._model,
            weights.mtp,
            dispatcher,
            cache,
            max_model_len=self._max_model_len,
            deterministic=self._is_deterministic,
            device=self._device,
        )
        return MtpDrafter(module, DraftPolicy(self._speculative_tokens), frozenset(self._model.eos_token_ids))

    def _limits(self) -> SchedulerLimits:
        num_blocks = self._count_cache_blocks()
        num_tokens = num_blocks * BLOCK_SIZE
        logger.info(
            "latent cache tokens=%d blocks=%d size_mb=%d requests_at_full_length=%.1f max_model_len=%d",
            num_tokens,
            num_blocks,
            num_tokens * cache_bytes_per_token(self._model, self._config.dtype) // 10**6,
            num_tokens / self._max_model_len,
            self._max_model_len,
        )
        return SchedulerLimits(
            max_num_seqs=self._config.max_num_seqs,
            max_batched_tokens=self._config.max_batched_tokens,
            num_blocks=num_blocks,
            max_waiting=self._config.max_waiting,
        )

    def _count_cache_blocks(self) -> int:
        """As many as asked for, else as half the free memory holds, but no more than could ever be used at once.
        Raises ConfigError if there is no room for them."""
        block_bytes = cache_bytes_per_token(self._model, self._config.dtype) * BLOCK_SIZE
        available_bytes, share = self._get_free_bytes(), CACHE_MEMORY_SHARE
        if self._device.type == "cuda":
            # The card is this router's: all of it but what a step takes.
            available_bytes, share = max(0, available_bytes - CARD_WORKING_BYTES), 1.0
        asked = self._config.kv_cache_tokens
        if asked is None:
            num_blocks = int(available_bytes * share) // block_bytes
            num_blocks = min(num_blocks, self._config.max_num_seqs * count_blocks(self._max_model_len))
            if num_blocks == 0:
                raise ConfigError(
                    f"{available_bytes} bytes of memory are free once the weights are loaded: too little for a KV cache"
                )
            return num_blocks
        num_blocks = count_blocks(asked)
        if num_blocks * block_bytes > available_bytes:
            raise ConfigError(
                f"kv_cache_tokens is {asked}: {num_blocks * block_bytes} bytes of KV cache, but "
                f"{available_bytes} are free once the weights are loaded: at most "
                f"{available_bytes // block_bytes * BLOCK_SIZE} tokens fit"
            )
        return num_blocks

    def _get_free_bytes(self) -> int:
        """Of the memory that the cache will lie in."""
        if self._device.type == "cuda":
            return torch.cuda.mem_get_info(self._device)[0]
        available_bytes = get_available_bytes()
        # A container may be allowed less than the machine has left, which is all that psutil knows.
        return psutil.virtual_memory().available if available_bytes is None else available_bytes

    def _find_outage(self) -> str | None:
        """What no request may wait for any more: experts that have been away for expert_wait_s, unless some may be left
        out. While the weights were being loaded, nobody waited for them."""
        if self._config.max_missing_experts:
            return None
        away_s = min(self.pool.unserved_s, time.monotonic() - self._engine_made_at)
        if away_s < OUTAGE_SHARE * self._config.expert_wait_s:
            return None
        return f"{self.pool.unserved()}, for {away_s:.0f} s now"

    def _set_load_progress(self, fraction: float) -> None:
        """Called by the loading thread, which nothing else could end."""
        if self._is_stopping:
            raise NotReady("the router was stopped while it loaded its weights")
        self._load_progress = fraction

    def start_drain(self) -> None:
        """Take nothing new from now on, also if the weights are still loading. On the event loop only."""
        self._drain_requested = True
        if self._engine is not None:
            self._engine.start_drain()

    async def _drain(self, timeout_s: float) -> int:
        self.start_drain()
        return 0 if self._engine is None else await wait_drained(self._engine, timeout_s)

    async def _close(self) -> None:
        if self._server is not None:
            await self._server.stop(STOP_GRACE_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._pool is not None:
            await self._pool.close()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)


def _resolve_speculative_tokens(config: RouterConfig, model: ModelConfig) -> int:
    has_mtp = model.num_nextn_predict_layers > 0
    asked = config.speculative_tokens
    if asked is None:
        return DEFAULT_SPECULATIVE_TOKENS if has_mtp else 0
    if not 0 <= asked <= MAX_SPECULATIVE_TOKENS:
        raise ConfigError(f"speculative_tokens is {asked}: choose 0 to {MAX_SPECULATIVE_TOKENS}")
    if asked > 0 and not has_mtp:
        raise ConfigError(f"speculative_tokens is {asked}, but the checkpoint has no MTP layer to draft with: choose 0")
    return asked


def _resolve_max_model_len(config: RouterConfig, model: ModelConfig) -> int:
    if config.max_model_len is None:
        return model.max_position_embeddings
    if not 1 <= config.max_model_len <= model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}; the checkpoint's max_position_embeddings allows "
            f"1 to {model.max_position_embeddings}"
        )
    return config.max_model_len
