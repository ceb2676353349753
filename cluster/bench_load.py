"""What `shoal bench` asks for: arrival times, prompts and lengths, drawn from one seed. Pure: no clock, no network."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from cluster.errors import SettingsError

Prompt = str | list[int] | list[dict[str, Any]]
PromptKind = Literal["ids", "text"]

# Ids below are special tokens in most vocabularies.
_FIRST_ID = 16
# Short and frequent, so that nearly every tokenizer has one token for each.
_WORDS = (
    "the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not",
    "he", "his", "but", "at", "are", "this", "have", "from", "or", "had", "an", "they", "which", "one", "you",
    "were", "all", "her", "she", "there", "would", "their", "we", "him", "been", "has", "when", "who", "will", "no",
    "more", "if", "out", "so", "said", "what", "up", "its", "about", "than", "into", "them", "can", "only", "other",
    "time", "new", "some", "could", "these", "two", "may", "then", "do", "first", "any", "my", "now", "such",
    "like", "our", "over", "man", "me",
)  # fmt: skip
_NUMBER = r"(\d+(?:\.\d+)?)"


class Lengths(NamedTuple):
    """A distribution of numbers of tokens: N, LOW:HIGH (uniform), normal:MEAN,STD or lognormal:MEDIAN,SIGMA."""

    kind: Literal["fixed", "uniform", "normal", "lognormal"]
    first: float
    second: float

    def draw(self, source: random.Random) -> int:
        """At least 1."""
        match self.kind:
            case "fixed":
                length = self.first
            case "uniform":
                length = source.randint(int(self.first), int(self.second))
            case "normal":
                length = source.gauss(self.first, self.second)
            case "lognormal":
                length = source.lognormvariate(math.log(self.first), self.second)
        return max(1, round(length))


def parse_lengths(text: str) -> Lengths:
    """Raises SettingsError."""
    if match := re.fullmatch(r"\d+", text):
        lengths = Lengths("fixed", int(text), 0)
    elif match := re.fullmatch(r"(\d+):(\d+)", text):
        lengths = Lengths("uniform", int(match[1]), int(match[2]))
        if lengths.second < lengths.first:
            raise SettingsError(f"the length {text} ends before it begins: write {match[2]}:{match[1]}")
    elif match := re.fullmatch(rf"(normal|lognormal):{_NUMBER},{_NUMBER}", text):
        lengths = Lengths("normal" if match[1] == "normal" else "lognormal", float(match[2]), float(match[3]))
    else:
        raise SettingsError(
            f"{text!r} is no length: write 128, 64:256 (uniform), normal:128,32 or lognormal:128,0.5 (median, sigma)"
        )
    if lengths.first < 1:
        raise SettingsError(f"the length {text} must be at least 1 token")
    return lengths


class FilePrompt(NamedTuple):
    """One prompt of a file. max_tokens: None where the file does not say."""

    prompt: Prompt
    max_tokens: int | None


@dataclass(frozen=True)
class LoadOptions:
    """num_requests: None for as many as the duration allows. rate: requests per second, Poisson arrivals; None: as fast
    as running requests end. shared_prefix: tokens at the start of every random prompt that are the same in all."""

    num_requests: int | None
    rate: float | None
    input_lengths: Lengths
    output_lengths: Lengths
    shared_prefix: int
    kind: PromptKind
    seed: int
    num_ids: int = 256
    file_prompts: tuple[FilePrompt, ...] = ()


class PlannedRequest(NamedTuple):
    """at_s: when to send it, from the start; None: as soon as there is room."""

    index: int
    at_s: float | None
    prompt: Prompt
    max_tokens: int
    seed: int


def plan_load(options: LoadOptions) -> Iterator[PlannedRequest]:
    """The same for the same options; endless without num_requests. Every prompt is new but for the shared prefix."""
    source = random.Random(options.seed)
    prefix = _draw_tokens(source, options.shared_prefix, options)
    at_s = 0.0
    for index in itertools.count() if options.num_requests is None else range(options.num_requests):
        max_tokens = options.output_lengths.draw(source)
        if options.file_prompts:
            prompt, asked = options.file_prompts[index % len(options.file_prompts)]
            max_tokens = asked or max_tokens
        else:
            num_own = max(1, options.input_lengths.draw(source) - options.shared_prefix)
            prompt = _join(prefix + _draw_tokens(source, num_own, options), options.kind)
        yield PlannedRequest(index, None if options.rate is None else at_s, prompt, max_tokens, options.seed + index)
        if options.rate is not None:
            at_s += source.expovariate(options.rate)


def parse_prompts(text: str, *, is_jsonl: bool) -> tuple[FilePrompt, ...]:
    """Prompts of a file: one per line of text, or JSON objects with prompt (text or token ids) or messages, and
    perhaps max_tokens. Raises SettingsError naming the line."""
    prompts: list[FilePrompt] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        prompts.append(_parse_json_prompt(line, number) if is_jsonl else FilePrompt(line, None))
    if not prompts:
        raise SettingsError("the prompts file holds no prompt")
    return tuple(prompts)


def _parse_json_prompt(line: str, number: int) -> FilePrompt:
    try:
        item = json.loads(line)
    except ValueError as error:
        raise SettingsError(f"line {number} of the prompts file is no JSON: {error}") from None
    if isinstance(item, str) and item:
        return FilePrompt(item, None)
    prompt = item.get("prompt", item.get("messages")) if isinstance(item, dict) else None
    max_tokens = item.get("max_tokens") if isinstance(item, dict) else None
    if not isinstance(prompt, str | list) or not prompt:
        raise SettingsError(f"line {number} of the prompts file has neither prompt nor messages")
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise SettingsError(f"line {number} of the prompts file: max_tokens must be a positive number")
    return FilePrompt(prompt, max_tokens)


def _draw_tokens(source: random.Random, count: int, options: LoadOptions) -> list[Any]:
    if options.kind == "ids":
        return [source.randrange(_FIRST_ID, options.num_ids) for _ in range(count)]
    return source.choices(_WORDS, k=count)


def _join(tokens: Sequence[Any], kind: PromptKind) -> Prompt:
    return list(tokens) if kind == "ids" else " ".join(tokens)
