"""`shoal chat`: a conversation on the terminal, or one message, over the OpenAI API like any other client."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

import httpx

from cluster.errors import RequestFailed

CONNECT_TIMEOUT_S = 5.0
# Between two pieces of a stream; the server sends a comment at least every 15 s.
READ_TIMEOUT_S = 120.0
KEY_VARIABLE = "OPENAI_API_KEY"


def run(options: argparse.Namespace) -> int:
    url = options.url if "//" in options.url else f"http://{options.url}"
    timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    key = options.api_key or os.environ.get(KEY_VARIABLE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=url, timeout=timeout, headers=headers, trust_env=False) as client:
        chat = _Chat(client, options, _fetch_model(client))
        if options.message is not None:
            return chat.answer_once(options.message, as_json=options.json)
        return chat.converse(sys.stdin, is_terminal=sys.stdin.isatty())


class _Chat:
    """Owns the history of one conversation."""

    def __init__(self, client: httpx.Client, options: argparse.Namespace, model: str) -> None:
        self._client = client
        self._options = options
        self._model = model
        self._messages: list[dict[str, str]] = []
        if options.system:
            self._messages.append({"role": "system", "content": options.system})

    def answer_once(self, message: str, *, as_json: bool) -> int:
        self._messages.append({"role": "user", "content": message})
        if as_json:
            document = _read_json(_send(self._client, "POST", "/v1/chat/completions", self._body(stream=False)))
            print(json.dumps(document, indent=2))
        else:
            self._print_answer()
        return 0

    def converse(self, lines: TextIO, *, is_terminal: bool) -> int:
        """One message per line until the end of input; Ctrl-C ends an answer, or the conversation between two."""
        if is_terminal:
            print(f"{self._model}. Ctrl-D ends the conversation, Ctrl-C an answer.", file=sys.stderr)
        while True:
            if is_terminal:
                print("> ", end="", file=sys.stderr, flush=True)
            line = lines.readline()
            if not line:
                return 0
            if not line.strip():
                continue
            self._messages.append({"role": "user", "content": line.rstrip("\n")})
            try:
                answer = self._print_answer()
            except KeyboardInterrupt:
                print()
                self._messages.pop()
                continue
            except RequestFailed as error:
                if not is_terminal:
                    raise
                print(f"error: {error}", file=sys.stderr)
                self._messages.pop()
                continue
            self._messages.append({"role": "assistant", "content": answer})

    def _print_answer(self) -> str:
        parts: list[str] = []
        for part in self._stream_answer():
            parts.append(part)
            print(part, end="", flush=True)
        print(flush=True)
        return "".join(parts)

    def _stream_answer(self) -> Iterator[str]:
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=self._body(stream=True)) as response:
                if not response.is_success:
                    response.read()
                    raise RequestFailed(_describe_failure(response))
                for line in response.iter_lines():
                    data = line.removeprefix("data: ")
                    if data == line:
                        continue
                    if data == "[DONE]":
                        return
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise RequestFailed(str(chunk["error"].get("message")))
                    for choice in chunk["choices"]:
                        if content := choice["delta"].get("content"):
                            yield content
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise RequestFailed(f"the answer broke off: {error or type(error).__name__}") from error
        raise RequestFailed("the answer broke off: the stream ended without [DONE]")

    def _body(self, *, stream: bool) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            "messages": self._messages,
            "max_tokens": self._options.max_tokens,
            "temperature": self._options.temperature,
            "stream": stream,
        }
        if self._options.seed is not None:
            body["seed"] = self._options.seed
        return body


def _fetch_model(client: httpx.Client) -> str:
    document = _read_json(_send(client, "GET", "/v1/models", None))
    try:
        return str(document["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise RequestFailed(f"{client.base_url} is no OpenAI API: /v1/models names no model") from None


def _send(client: httpx.Client, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
    try:
        return client.request(method, path, json=body)
    except httpx.HTTPError as error:
        raise RequestFailed(
            f"{client.base_url} does not answer ({error or type(error).__name__}): is `shoal serve` running there? "
            "Name another with --url"
        ) from error


def _read_json(response: httpx.Response) -> Any:
    if not response.is_success:
        raise RequestFailed(_describe_failure(response))
    try:
        return response.json()
    except ValueError:
        raise RequestFailed(f"{response.url} answered something that is no JSON") from None


def _describe_failure(response: httpx.Response) -> str:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:200]
    return f"{response.status_code} from {response.url.path}: {message}"
