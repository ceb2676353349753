"""What all routes share: settings, tokenizer, template, routers, threads. Made once per app."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

from fastapi import Request

from experts.model_config import ModelConfig
from router.api.answer_parser import ANSWER_MARKERS, StandIns
from router.api.api_metrics import ApiMetrics
from router.api.chat_template import ChatTemplate
from router.api.cluster_source import ClusterSource
from router.api.errors import BadRequest, ContextLengthExceeded, ModelNotFound
from router.api.fields import RequestT, parse_request
from router.api.grammar_check import GrammarChecker
from router.api.json_body import decode_json, read_body
from router.api.request_use import get_current_use
from router.api.router_client import RouterClient, RouterEndpoints
from router.api.sampling_defaults import SamplingDefaults
from router.api.settings import ApiSettings
from router.api.status_cache import StatusCache
from router.api.tokenizer import TextTokenizer
from router.tenancy.priority import classify
from router.tracing import Tracer

ResultT = TypeVar("ResultT")

# Bodies up to here are decoded and checked on the event loop, in about a millisecond.
_INLINE_BYTES = 64 * 1024
# Text up to here is tokenised on the event loop, in less than a millisecond.
_INLINE_CHARACTERS = 2048
# Answers with more log probabilities than this are formatted by a thread.
_INLINE_TOKENS = 512


class ApiContext:
    """Loads everything but weights from the checkpoint. Raises ConfigError, TokenizerError."""

    def __init__(self, settings: ApiSettings, endpoints: RouterEndpoints, cluster: ClusterSource) -> None:
        config = ModelConfig.from_folder(settings.checkpoint)
        self.settings = settings
        self.model_names = settings.served_model_names or (settings.checkpoint.resolve().name,)
        self.max_model_len = config.max_position_embeddings
        if settings.max_model_len is not None:
            self.max_model_len = min(settings.max_model_len, config.max_position_embeddings)
        self.vocab_size = config.vocab_size
        self.created_at_s = int(time.time())
        self.sampling_defaults = SamplingDefaults.from_checkpoint(settings.checkpoint)
        self.tokenizer = TextTokenizer(settings.checkpoint, self.max_model_len)
        self.chat_template = ChatTemplate.from_checkpoint(settings.checkpoint, self.tokenizer)
        self.stand_ins = StandIns(
            {marker: token_id for marker, token_id in self.marker_ids.items() if marker in ANSWER_MARKERS}
        )
        self.grammars = GrammarChecker(settings.checkpoint, retry_after_s=settings.retry_after_s)
        self.tracer = None
        if settings.trace_to is not None:
            self.tracer = Tracer("shoal-api", settings.trace_to, settings.trace_share)
        self.metrics = ApiMetrics(self.model_names[0])
        self.routers = RouterClient(endpoints, settings, config.eos_token_ids, self.metrics)
        self.cluster = cluster
        self.statuses = StatusCache(self.routers)
        self._threads = ThreadPoolExecutor(settings.num_text_threads, thread_name_prefix="text")

    async def close(self) -> None:
        await asyncio.gather(self.routers.close(), self.grammars.close(), self.cluster.close())
        if self.tracer is not None:
            await asyncio.to_thread(self.tracer.close)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def parse(self, request_type: type[RequestT], request: Request) -> RequestT:
        """The checked body. Raises what json_body.read_body raises, and BadRequest."""
        body = await read_body(request, max_bytes=self.settings.max_body_bytes, timeout_s=self.settings.body_timeout_s)

        def check() -> RequestT:
            decoded = decode_json(body, request_type.model_fields)
            return parse_request(request_type, decoded, forbids_unknown=self.settings.strict_fields)

        # In one go, so that what was decoded, many times the body's size, is gone before anything waits.
        return check() if len(body) <= _INLINE_BYTES else await self.run_in_thread(check)

    @property
    def marker_ids(self) -> Mapping[str, int]:
        """Token ids of texts that are one token of their own and mark something."""
        return self.tokenizer.vocabulary.marker_ids

    async def run_in_thread(self, function: Callable[[], ResultT]) -> ResultT:
        """For work that would stall the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    def resolve_model(self, name: str | None) -> str:
        """The name to answer under; the first one that the key may use where the request names none.

        Raises ModelNotFound or NotAllowed; the message does not repeat the name.
        """
        if name is not None and name not in self.model_names:
            raise ModelNotFound(f"No such model; served here: {', '.join(self.model_names)}.", param="model")
        return get_current_use().choose_model(name, self.model_names)

    def set_priority(self, number: int | None) -> None:
        """As the body's field has it, over what the header says. Raises NotAllowed."""
        if number is not None:
            get_current_use().set_priority(classify(number), "priority")

    async def encode_texts(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each. Raises ContextLengthExceeded."""

        def encode() -> list[list[int]]:
            return [self.tokenizer.encode_raw(text, add_special_tokens=add_special_tokens) for text in texts]

        if sum(map(len, texts)) <= _INLINE_CHARACTERS:
            return encode()
        return await self.run_in_thread(encode)

    def check_token_ids(self, token_ids: Sequence[int], param: str) -> None:
        """Raises BadRequest if an id is none of the model's."""
        if token_ids and max(token_ids) >= self.vocab_size:
            raise BadRequest(f"{param}: token ids must be less than {self.vocab_size}.", param=param)

    def limit_tokens(self, num_prompt_tokens: int, asked: int | None, default: int | None, param: str) -> int:
        """Number of tokens to generate for a prompt. asked: None where the request does not say, then at most
        default (None: whatever fits). Raises ContextLengthExceeded, with both numbers, naming param."""
        room = self.max_model_len - num_prompt_tokens
        wanted = 1 if asked is None else asked
        if wanted > room:
            raise ContextLengthExceeded(
                f"This model's context is {self.max_model_len} tokens, but the request needs at least "
                f"{num_prompt_tokens + wanted}: {num_prompt_tokens} in the prompt and {wanted} for the answer.",
                param=param,
            )
        if asked is not None:
            return asked
        return room if default is None else min(default, room)

    async def build_body(self, build: Callable[[], bytes], *, num_tokens: int) -> bytes:
        """What build returns. num_tokens: how many of them, or of their log probabilities, it has to format."""
        return build() if num_tokens <= _INLINE_TOKENS else await self.run_in_thread(build)


def get_context(request: Request) -> ApiContext:
    """The context of the app that handles request."""
    return cast(ApiContext, request.app.state.context)
