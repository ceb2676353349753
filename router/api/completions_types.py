"""The body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator, StrictBool, StrictInt, field_validator, model_validator

from router.api.fields import (
    MAX_LOGPROBS,
    TokenCount,
    UnsupportedField,
    UnsupportedValue,
    WrongField,
    check_text,
    check_token_ids,
)
from router.api.form_types import StructuredOutputs
from router.api.sampling_types import SamplingFields

# A limit on the list alone; ApiSettings.max_sequences bounds prompts times n.
_MAX_PROMPTS = 1024
DEFAULT_MAX_TOKENS = 16  # The OpenAI API's default for this route.

Prompt = str | list[int]


def _check_prompt(value: Any) -> tuple[Prompt, ...]:
    """Normalise the four shapes of `prompt` to a tuple of texts or of lists of token ids."""
    if isinstance(value, str):
        return (_check_one(value),)
    if not isinstance(value, list):
        raise ValueError("must be a string, a list of strings, a list of token ids, or a list of lists of token ids")
    if not value:
        raise ValueError("must not be empty")
    if type(value[0]) is int:
        return (_check_one(value),)
    if len(value) > _MAX_PROMPTS:
        raise ValueError(f"must not have more than {_MAX_PROMPTS} items")
    return tuple(_check_one(item) for item in value)


def _check_one(value: Any) -> Prompt:
    if isinstance(value, str):
        return check_text(value)
    token_ids = check_token_ids(value)
    if not token_ids:
        raise ValueError("must not hold an empty list")
    return token_ids


class CompletionRequest(SamplingFields):
    prompt: Annotated[tuple[Prompt, ...], PlainValidator(_check_prompt)]
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    """The newer name of max_tokens, which it overrides."""
    echo: StrictBool | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[StrictInt, Field(ge=1, le=128)] | None = None
    structured_outputs: StructuredOutputs | None = None
    suffix: Any = None
    add_special_tokens: StrictBool | None = None
    """False: text prompts get no beginning-of-sequence token."""

    @field_validator("suffix", mode="before")
    @classmethod
    def _refuse_suffix(cls, value: Any) -> None:
        if value is not None and value != "":
            raise UnsupportedField("not supported")

    @model_validator(mode="after")
    def _check_together(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.num_choices:
            raise UnsupportedValue("best_of", "other than n is not supported")
        if self.structured_outputs is not None and self.ignore_eos:
            raise WrongField("ignore_eos", "an answer that has a form ends where that is complete")
        if self.token_limit == 0 and not self.echo:
            field = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
            raise WrongField(field, "must be at least 1 unless echo is true")
        return self

    @property
    def token_limit(self) -> int | None:
        """Most tokens to generate; None where the request does not say."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
