"""POST /v1/responses: OpenAI's Responses API without a memory."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from router.api.answer_parser import CallArguments, CallStart, Content, Event, Reasoning
from router.api.chat_job import ChatJob, ChatUsage, prepare_chat, run_chat
from router.api.connection import NAMED, encode_event, encode_json, open_stream, until_gone
from router.api.context import ApiContext, get_context
from router.api.form_types import NamedTool
from router.api.generation import mark_left_out
from router.api.responses_types import ResponsesRequest

routes = APIRouter()


@routes.post("/v1/responses")
async def create_response(request: Request) -> Response:
    context = get_context(request)
    body = await context.parse(ResponsesRequest, request)
    job = await until_gone(request, prepare_chat(context, body.to_chat(), request.state.request_id))
    if body.stream:
        return await open_stream(request, _stream(context, job, body), context.settings, NAMED)
    return await until_gone(request, _collect(context, job, body))


async def _collect(context: ApiContext, job: ChatJob, body: ResponsesRequest) -> Response:
    """The last event of the stream has the whole."""
    writer = _ResponseWriter(job, body)
    usage = ChatUsage(context, job)
    async with aclosing(run_chat(context, job)) as deltas:
        async for delta in deltas:
            usage.add(delta)
            for event in delta.events:
                for _ in writer.write(event):
                    pass
            if delta.finish_reason is not None:
                for _ in writer.finish(delta.finish_reason, usage):
                    pass
    return Response(encode_json(writer.response), media_type="application/json")


async def _stream(context: ApiContext, job: ChatJob, body: ResponsesRequest) -> AsyncGenerator[bytes, None]:
    writer = _ResponseWriter(job, body)
    usage = ChatUsage(context, job)
    is_started = False
    async with aclosing(run_chat(context, job)) as deltas:
        async for delta in deltas:
            if not is_started:
                is_started = True
                for written in writer.start():
                    yield encode_event(written)
            usage.add(delta)
            for event in delta.events:
                for written in writer.write(event):
                    yield encode_event(written)
            if delta.finish_reason is not None:
                for written in writer.finish(delta.finish_reason, usage):
                    yield encode_event(written)


def _format_choice(job: ChatJob) -> Any:
    choice = job.body.tool_choice
    return {"type": "function", "name": choice.name} if isinstance(choice, NamedTool) else choice or "auto"


class _ResponseWriter:
    """The response as it grows, and the events that tell of it. One item is open at a time.

    response: what GET would return, if anything were stored.
    """

    def __init__(self, job: ChatJob, body: ResponsesRequest) -> None:
        self._num_events = 0
        self._item: dict[str, Any] | None = None
        self._num_prompt_tokens = job.num_prompt_tokens
        self.response: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": job.created,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": job.model,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"} if body.text is None or body.text.format is None else
                     body.text.format.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": _format_choice(job),
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_p": body.top_p,
            "usage": None,
        }  # fmt: skip

    def start(self) -> Iterator[dict[str, Any]]:
        yield self._event("response.created", response={**self.response, "output": []})
        yield self._event("response.in_progress", response={**self.response, "output": []})

    def write(self, event: Event) -> Iterator[dict[str, Any]]:
        match event:
            case Content(text):
                yield from self._turn_to("message")
                yield from self._add_text(text, "response.output_text.delta", logprobs=[])
            case Reasoning(text):
                yield from self._turn_to("reasoning")
                yield from self._add_text(text, "response.reasoning_text.delta")
            case CallStart(_, call_id, name):
                yield from self._close()
                yield from self._open({"type": "function_call", "id": f"fc_{uuid.uuid4().hex}", "call_id": call_id,
                                       "name": name, "arguments": "", "status": "in_progress"})  # fmt: skip
            case CallArguments(_, text):
                assert self._item is not None
                self._item["arguments"] += text
                yield self._item_event("response.function_call_arguments.delta", delta=text)

    def finish(self, finish_reason: str, usage: ChatUsage) -> Iterator[dict[str, Any]]:
        is_complete = finish_reason != "length"
        yield from self._close(status="completed" if is_complete else "incomplete")
        self.response["status"] = "completed" if is_complete else "incomplete"
        if not is_complete:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        self.response["usage"] = {
            "input_tokens": self._num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": self._num_prompt_tokens + usage.completion_tokens,
            **mark_left_out(usage.num_left_out),
        }
        yield self._event("response.completed" if is_complete else "response.incomplete", response=self.response)

    def _turn_to(self, item_type: str) -> Iterator[dict[str, Any]]:
        """An open item with one part of text."""
        if self._item is not None and self._item["type"] == item_type:
            return
        yield from self._close()
        if item_type == "message":
            yield from self._open({"type": "message", "id": f"msg_{uuid.uuid4().hex}", "role": "assistant",
                                   "status": "in_progress", "content": []})  # fmt: skip
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            yield from self._open({"type": "reasoning", "id": f"rs_{uuid.uuid4().hex}", "summary": [], "content": []})
            part = {"type": "reasoning_text", "text": ""}
        assert self._item is not None
        yield self._item_event("response.content_part.added", content_index=0, part=dict(part))
        self._item["content"].append(part)

    def _add_text(self, text: str, event_type: str, **fields: Any) -> Iterator[dict[str, Any]]:
        assert self._item is not None
        self._item["content"][0]["text"] += text
        yield self._item_event(event_type, content_index=0, delta=text, **fields)

    def _open(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        self._item = item
        self.response["output"].append(item)
        shown = {**item, "content": []} if "content" in item else dict(item)
        yield self._event("response.output_item.added", output_index=self._index, item=shown)

    def _close(self, status: str = "completed") -> Iterator[dict[str, Any]]:
        item = self._item
        if item is None:
            return
        if "status" in item:
            item["status"] = status
        if item["type"] == "function_call":
            arguments = {"arguments": item["arguments"], "name": item["name"]}
            yield self._item_event("response.function_call_arguments.done", **arguments)
        else:
            part = item["content"][0]
            extra = {"logprobs": []} if item["type"] == "message" else {}
            yield self._item_event(f"response.{part['type']}.done", content_index=0, text=part["text"], **extra)
            yield self._item_event("response.content_part.done", content_index=0, part=part)
        yield self._event("response.output_item.done", output_index=self._index, item=item)
        self._item = None

    @property
    def _index(self) -> int:
        return len(self.response["output"]) - 1

    def _item_event(self, event_type: str, **fields: Any) -> dict[str, Any]:
        assert self._item is not None
        return self._event(event_type, item_id=self._item["id"], output_index=self._index, **fields)

    def _event(self, event_type: str, **fields: Any) -> dict[str, Any]:
        event = {"type": event_type, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return event
