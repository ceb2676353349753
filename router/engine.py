"""The engine: many sequences, one step at a time.

`Engine._step` is the index of the router: schedule -> trunk (which asks the expert groups) -> sample -> hand out.
New requests join between steps and cancelled ones leave there. It runs on one event loop and computes on that loop's
thread; while it waits for experts, the loop serves the RPCs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.model_config import ModelConfig
from router.errors import BadRequest, NotReady, RouterError
from router.micro_batches import MicroBatchRunner
from router.overlap_policy import OverlapPolicy
from router.sampler import SampleRow, TokenLogprobs, compute_logprobs, sample
from router.scheduler import ScheduledChunk, Scheduler, SchedulerLimits
from router.sequence import FinishReason, GeneratedToken, GenerationRequest, Sequence, SequenceOutput
from router.step_batch import StepBatch, TokenSpan, build_step_batch
from router.trunk import Trunk

logger = logging.getLogger(__name__)

# Rows of prompt logits computed at once: 128 x 129,280 float32 are 66 MB for DeepSeek-V3.
LOGITS_ROWS = 128


@dataclass(frozen=True)
class EngineProgress:
    """Proof of life: a frozen engine has an old current step, or waiting sequences and no new steps."""

    num_steps: int
    current_step_ms: int
    num_running: int
    num_waiting: int


class Engine:
    """Owned by one event loop; every method is called on it."""

    def __init__(
        self,
        config: ModelConfig,
        trunk: Trunk,
        limits: SchedulerLimits,
        *,
        max_model_len: int,
        overlap: OverlapPolicy | None = None,
    ) -> None:
        """limits.num_blocks: of the trunk's cache. overlap: None computes every step as one batch."""
        self._config = config
        self._trunk = trunk
        self._micro_batches = MicroBatchRunner(trunk, overlap or OverlapPolicy("off"))
        self._scheduler = Scheduler(limits)
        self._max_model_len = max_model_len
        self._eos_token_ids = frozenset(config.eos_token_ids)
        self._wake = asyncio.Event()
        self._draining = False
        self._num_steps = 0
        self._step_started: float | None = None

    @property
    def draining(self) -> bool:
        return self._draining

    def progress(self) -> EngineProgress:
        started = self._step_started
        return EngineProgress(
            num_steps=self._num_steps,
            current_step_ms=0 if started is None else int((time.monotonic() - started) * 1000),
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
        )

    def submit(self, request: GenerationRequest) -> Sequence:
        """Queue a request; its outputs arrive in the returned sequence's queue.

        Raises BadRequest, QueueFull, or NotReady while draining.
        """
        if self._draining:
            raise NotReady("the router is draining")
        self._validate(request)
        sequence = Sequence(request=request, token_ids=list(request.prompt_token_ids))
        self._scheduler.add(sequence)
        self._wake.set()
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Stop working for a sequence; a step that is under way finishes without handing its token out."""
        sequence.cancelled = True
        self._scheduler.remove(sequence)
        self._wake.set()

    def start_drain(self) -> None:
        """Take nothing new from now on; what was accepted runs to its end."""
        self._draining = True

    async def run(self) -> None:
        """Step for ever. A step that fails ends its own sequences with the error, never the engine."""
        with torch.inference_mode():
            while True:
                chunks = self._scheduler.schedule()
                if not chunks:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                self._step_started = time.monotonic()
                try:
                    await self._step(chunks)
                except RouterError as error:
                    logger.warning("step failed num_sequences=%d reason=%s", len(chunks), error)
                    self._fail(chunks, error)
                except Exception as error:
                    logger.exception("step failed num_sequences=%d", len(chunks))
                    self._fail(chunks, error)
                finally:
                    self._step_started = None
                    self._num_steps += 1
                await asyncio.sleep(0)  # the RPC handlers send what the step gave them

    async def _step(self, chunks: list[ScheduledChunk]) -> None:
        batch = build_step_batch([_span_of(chunk) for chunk in chunks])
        hidden_states = await self._micro_batches.forward(batch)
        self._hand_out_prompt_logprobs(chunks, batch, hidden_states)
        sampled = self._sample(chunks, batch, hidden_states)
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.num_computed += chunk.num_new
            if sequence.cancelled:
                continue
            token = sampled.get(sequence)
            if token is not None:
                self._append(sequence, token)
            elif sequence.num_computed == sequence.num_prompt_tokens and sequence.request.max_tokens == 0:
                self._finish(sequence, SequenceOutput(finish_reason=FinishReason.LENGTH))

    def _sample(
        self, chunks: list[ScheduledChunk], batch: StepBatch, hidden_states: Tensor
    ) -> dict[Sequence, GeneratedToken]:
        """The next token of every sequence whose known tokens are all computed now."""
        sequences: list[Sequence] = []
        last_rows: list[int] = []
        for chunk, segment in zip(chunks, batch.segments, strict=True):
            sequence = chunk.sequence
            complete = sequence.num_computed + chunk.num_new == len(sequence.token_ids)
            if complete and sequence.request.max_tokens > 0 and not sequence.cancelled:
                sequences.append(sequence)
                last_rows.append(segment.start + segment.num_new - 1)
        if not sequences:
            return {}
        logits = self._trunk.compute_logits(hidden_states[last_rows])
        token_ids = sample(logits, [self._sample_row(sequence) for sequence in sequences])
        logprobs: list[TokenLogprobs | None] = [None] * len(sequences)
        wanting = [index for index, sequence in enumerate(sequences) if sequence.request.logprobs is not None]
        if wanting:
            num_top = [sequences[index].request.logprobs or 0 for index in wanting]
            for index, row in zip(wanting, compute_logprobs(logits[wanting], token_ids[wanting], num_top), strict=True):
                logprobs[index] = row
        return {
            sequence: GeneratedToken(token_id, row)
            for sequence, token_id, row in zip(sequences, token_ids.tolist(), logprobs, strict=True)
        }

    def _sample_row(self, sequence: Sequence) -> SampleRow:
        request = sequence.request
        banned: tuple[int, ...] = ()
        if sequence.num_generated < request.min_tokens:
            banned = tuple(sorted(self._eos_token_ids | request.stop_token_ids))
        return SampleRow(request.sampling, len(sequence.token_ids), banned, sequence.counts)

    def _append(self, sequence: Sequence, token: GeneratedToken) -> None:
        request = sequence.request
        sequence.append(token.token_id)
        is_eos = token.token_id in self._eos_token_ids and not request.ignore_eos
        if is_eos or token.token_id in request.stop_token_ids:
            self._finish(sequence, SequenceOutput((token,), (), FinishReason.STOP, token.token_id))
        elif sequence.num_generated >= request.max_tokens:
            self._finish(sequence, SequenceOutput((token,), (), FinishReason.LENGTH))
        else:
            sequence.outputs.put_nowait(SequenceOutput((token,)))

    def _finish(self, sequence: Sequence, output: SequenceOutput) -> None:
        self._scheduler.remove(sequence)
        sequence.outputs.put_nowait(output)

    def _fail(self, chunks: list[ScheduledChunk], error: Exception) -> None:
        for chunk in chunks:
            self._scheduler.remove(chunk.sequence)
            chunk.sequence.outputs.put_nowait(error)

    def _hand_out_prompt_logprobs(self, chunks: list[ScheduledChunk], batch: StepBatch, hidden_states: Tensor) -> None:
        """Row p of a prompt gives the log-probability of prompt token p + 1; the first token has none."""
        for chunk, segment in zip(chunks, batch.segments, strict=True):
            sequence = chunk.sequence
            num_top = sequence.request.prompt_logprobs
            first = sequence.num_computed
            if num_top is None or first >= sequence.num_prompt_tokens or sequence.cancelled:
                continue
            last = min(first + chunk.num_new, sequence.num_prompt_tokens - 1)
            tokens = [GeneratedToken(sequence.token_ids[0], None)] if first == 0 else []
            for start in range(first, last, LOGITS_ROWS):
                stop = min(start + LOGITS_ROWS, last)
                offset = segment.start - first
                logits = self._trunk.compute_logits(hidden_states[offset + start : offset + stop])
                following = sequence.token_ids[start + 1 : stop + 1]
                rows = compute_logprobs(logits, torch.tensor(following), [num_top] * len(following))
                tokens.extend(GeneratedToken(token_id, row) for token_id, row in zip(following, rows, strict=True))
            if tokens:
                sequence.outputs.put_nowait(SequenceOutput(prompt_tokens=tuple(tokens)))

    def _validate(self, request: GenerationRequest) -> None:
        num_prompt = len(request.prompt_token_ids)
        if num_prompt == 0:
            raise BadRequest("the prompt has no tokens")
        if num_prompt + request.max_tokens > self._max_model_len:
            raise BadRequest(
                f"the prompt has {num_prompt} tokens and max_tokens is {request.max_tokens}: together more than the "
                f"context of {self._max_model_len} tokens"
            )
        if request.num_answer_tokens > num_prompt:
            raise BadRequest(f"{request.num_answer_tokens} answer tokens in a prompt of {num_prompt}")
        bias = request.sampling.logit_bias
        for name, ids in (
            ("token id", request.prompt_token_ids),
            ("stop token id", request.stop_token_ids),
            ("logit_bias token id", () if bias is None else bias.token_ids.tolist()),
        ):
            highest = max(ids, default=0)
            if highest >= self._config.vocab_size:
                raise BadRequest(f"{name} {highest} is outside the vocabulary of {self._config.vocab_size}")


def _span_of(chunk: ScheduledChunk) -> TokenSpan:
    sequence, start = chunk.sequence, chunk.sequence.num_computed
    return TokenSpan(sequence.token_ids[start : start + chunk.num_new], start, sequence.block_ids)
