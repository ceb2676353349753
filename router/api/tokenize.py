"""POST /tokenize and /detokenize, GET /tokenizer_info: the model's tokenizer for clients that count or cut prompts."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BeforeValidator, Field, StrictBool, model_validator
from starlette.responses import Response

from router.api.chat_job import encode_chat
from router.api.chat_types import MAX_TOOLS, Messages, TemplateSwitches
from router.api.connection import encode_json
from router.api.context import get_context
from router.api.fields import ShortText, StrictModel, Text, check_token_ids
from router.api.form_types import Tool

routes = APIRouter()


class TokenizeRequest(StrictModel):
    """Either a text or a chat."""

    model: ShortText | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: StrictBool | None = None
    """For a text only (a chat's template brings its own); by default true, as for /v1/completions."""
    add_generation_prompt: StrictBool | None = None
    chat_template_kwargs: TemplateSwitches = Field(default_factory=dict)
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    return_token_strs: StrictBool | None = None

    @model_validator(mode="after")
    def _check_together(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(StrictModel):
    model: ShortText | None = None
    tokens: Annotated[list[int], BeforeValidator(check_token_ids)]


@routes.post("/tokenize")
async def tokenize(request: Request) -> Response:
    context = get_context(request)
    body = await context.parse(TokenizeRequest, request)
    context.resolve_model(body.model)
    if body.messages is not None:
        token_ids = await encode_chat(
            context,
            body.messages,
            add_generation_prompt=body.add_generation_prompt is not False,
            switches=body.chat_template_kwargs,
            tools=body.tools or (),
        )
    else:
        (token_ids,) = await context.encode_texts(
            [body.prompt or ""], add_special_tokens=body.add_special_tokens is not False
        )

    def build() -> bytes:
        answer: dict[str, Any] = {"count": len(token_ids), "max_model_len": context.max_model_len, "tokens": token_ids}
        if body.return_token_strs:
            answer["token_strs"] = [context.tokenizer.token_text(token_id) for token_id in token_ids]
        return encode_json(answer)

    return Response(await context.build_body(build, num_tokens=len(token_ids)), media_type="application/json")


@routes.post("/detokenize")
async def detokenize(request: Request) -> Response:
    context = get_context(request)
    body = await context.parse(DetokenizeRequest, request)
    context.resolve_model(body.model)
    context.check_token_ids(body.tokens, "tokens")

    def build() -> bytes:
        return encode_json({"prompt": context.tokenizer.decode(body.tokens, skip_special_tokens=False)})

    return Response(await context.build_body(build, num_tokens=len(body.tokens)), media_type="application/json")


@routes.get("/tokenizer_info")
async def get_tokenizer_info(request: Request) -> dict[str, Any]:
    context = get_context(request)
    tokenizer, template = context.tokenizer, context.chat_template
    return {
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "chat_template": None if template is None else template.source,
        "model_max_length": context.max_model_len,
    }
