"""Request fields that completions and chat share, and their translation to the router's SamplingParams."""

from __future__ import annotations

import secrets
from typing import Annotated

from pydantic import BeforeValidator, Field, PlainValidator, StrictBool, StrictInt

from router.api.fields import (
    MAX_TOKEN_COUNT,
    ModelField,
    Number,
    Seed,
    ShortText,
    StreamOptions,
    TokenCount,
    check_logit_bias,
    check_stop,
    check_stop_token_ids,
)
from router.api.sampling_defaults import SamplingDefaults
from router.v1 import router_pb2

_UINT64_MASK = 2**64 - 1


class SamplingFields(ModelField):
    """How to choose tokens, when to stop, and how to send them."""

    temperature: Annotated[Number, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[Number, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1, le=MAX_TOKEN_COUNT)] | None = None
    """-1 and 0 keep every token."""
    min_p: Annotated[Number, Field(ge=0.0, le=1.0)] | None = None
    seed: Seed | None = None
    n: Annotated[StrictInt, Field(ge=1, le=128)] | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(check_stop)] = ()
    stop_token_ids: Annotated[tuple[int, ...], BeforeValidator(check_stop_token_ids)] = ()
    include_stop_str_in_output: StrictBool | None = None
    skip_special_tokens: StrictBool | None = None
    ignore_eos: StrictBool | None = None
    min_tokens: TokenCount | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    user: ShortText | None = None
    priority: Annotated[StrictInt, Field(ge=-(2**31), lt=2**31)] | None = None
    """Lower goes first: below 0 is interactive, 0 standard, above 0 batch. Only what the key allows."""
    cache_salt: Annotated[ShortText, Field(min_length=1)] | None = None
    """Only requests of the same team with the same one share a cached prefix; None: all of the team without one."""
    frequency_penalty: Annotated[Number, Field(ge=-2.0, le=2.0)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2.0, le=2.0)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100.0)] | None = None
    logit_bias: Annotated[dict[int, float], PlainValidator(check_logit_bias)] = Field(default_factory=dict)

    @property
    def num_choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def draw_seed(self) -> int:
        """The request's own seed, or a random one, as uint64."""
        return secrets.randbits(64) if self.seed is None else self.seed & _UINT64_MASK

    def sampling_params(self, seed: int, defaults: SamplingDefaults) -> router_pb2.SamplingParams:
        """The message for one sequence. seed: of any size, taken modulo 2**64. defaults: for what is not given."""
        return router_pb2.SamplingParams(
            temperature=defaults.temperature if self.temperature is None else self.temperature,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            top_k=defaults.top_k if self.top_k is None else max(self.top_k, 0),
            min_p=self.min_p or 0.0,
            seed=seed & _UINT64_MASK,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self.logit_bias,
        )
